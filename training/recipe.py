"""A recipe: everything that decides what a training run makes, in one readable TOML file."""

from pathlib import Path
from typing import Annotated, Any

import msgspec

from kvprism.errors import BadInput

FOLDER = Path(__file__).parent / "recipes"
Positive = Annotated[float, msgspec.Meta(gt=0)]
Count = Annotated[int, msgspec.Meta(ge=1)]
Mixture = dict[str, Annotated[float, msgspec.Meta(ge=0)]]


class Optimizer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """AdamW; the rates are the peaks, which stages scale."""

    learning_rate: Positive
    embedding_learning_rate: Positive
    betas: tuple[float, float]
    weight_decay: float
    clip: Positive
    warmup_steps: Count


class Stage(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Sequences of one length from one mixture, until the gate opens.

    length, batch: tokens of a sequence, sequences of a step; text_length: steps that draw nothing
    but text read it in windows of about this length, which cost less attention; tokens: fewest,
    and most; mixture: kind of sequence -> share; tasks: kind of task -> share of the task
    sequences; gate: figure of the learning curve -> value to be reached, losses from above;
    learning_rate: factor at the start, and after the most tokens; required: without its gate the
    run stops, because later stages would learn nothing.
    """

    length: Count
    batch: Count
    mixture: Mixture
    tasks: Mixture
    tokens: tuple[Count, Count]
    text_length: Count | None = None
    gate: dict[str, float] = {}
    learning_rate: tuple[float, float] = (1.0, 1.0)
    required: bool = False


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What to train, on what, and when to go on.

    model: a transformers configuration, `model_type` included; start: a model by name or folder,
    whose weights are trained further instead of drawn ones.
    """

    name: str
    about: str
    seed: int
    vocabulary: Count
    model: dict[str, Any]
    optimizer: Optimizer
    # Unset, not null: a run of a recipe without it keeps its digest.
    start: str | msgspec.UnsetType = msgspec.UNSET
    stages: Annotated[tuple[Stage, ...], msgspec.Meta(min_length=1)]

    @classmethod
    def read(cls, name_or_path: str) -> "Recipe":
        """A recipe by name, or a file.

        Raises:
            BadInput: no such recipe, or a field that is missing, unknown or out of range.
        """
        path = FOLDER / f"{name_or_path}.toml"
        path = path if path.is_file() else Path(name_or_path)
        try:
            return msgspec.toml.decode(path.read_bytes(), type=cls)
        except OSError as error:
            known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.toml")))
            raise BadInput(f"no recipe {name_or_path!r}; known: {known}, or a file") from error
        except msgspec.DecodeError as error:
            raise BadInput(f"{path} is no recipe: {error}") from error
