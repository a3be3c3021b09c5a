"""Where a run stands, on disk: weights and moments in safetensors, the rest in JSON. No pickle."""

import os
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import load_file, save_file

from kvprism.errors import BadInput
from kvprism.evaluate.rows import replace_file

TENSORS, PROGRESS = "checkpoint.safetensors", "checkpoint.json"
Named = dict[str, torch.Tensor]


class Progress(msgspec.Struct, kw_only=True):
    """digest: of the recipe, seed and text; averages: running figures of the learning curve."""

    digest: str
    step: int = 0
    tokens: int = 0
    stage: int = 0
    stage_tokens: int = 0
    seconds: float = 0.0
    averages: dict[str, float] = {}


def save(folder: Path, progress: Progress, parameters: Named, optimizer: Any) -> None:
    """Write both files anew, the JSON last: it names the step of the tensors that it belongs to."""
    tensors = {f"weight/{name}": x.detach() for name, x in parameters.items()}
    for name, x in parameters.items():
        for key, value in optimizer.state.get(x, {}).items():
            tensors[f"{key}/{name}"] = value
    step = {"step": str(progress.step)}
    temporary = folder / f"{TENSORS}.part"
    save_file({name: x.contiguous() for name, x in tensors.items()}, temporary, metadata=step)
    os.replace(temporary, folder / TENSORS)
    replace_file(folder / PROGRESS, msgspec.json.encode(progress))


def resume(folder: Path, digest: str, parameters: Named, optimizer: Any) -> Progress:
    """Fill weights and moments from `folder`; a fresh start where it holds nothing.

    Raises:
        BadInput: the folder holds another run, or tensors of another step.
    """
    if not (folder / PROGRESS).exists():
        return Progress(digest=digest)
    progress = msgspec.json.decode((folder / PROGRESS).read_bytes(), type=Progress)
    if progress.digest != digest:
        raise BadInput(
            f"{folder} holds a run of another recipe, seed or text; name another --out or remove it"
        )
    tensors = load_file(folder / TENSORS)
    for name, x in parameters.items():
        x.data.copy_(tensors.pop(f"weight/{name}"))
        moments = [key for key in tensors if key.endswith(f"/{name}")]
        optimizer.state[x] = {key.split("/")[0]: tensors.pop(key) for key in moments}
    return progress
