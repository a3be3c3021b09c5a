"""One measurement and metric = one JSON row, with its provenance."""

import math
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from kvprism.errors import BadInput

UNKNOWN = "unknown"
T = TypeVar("T")
Phase = Literal["none", "prefill", "decode", "both"]


class Row(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One figure of one arm.

    budget: the cap as a fraction of 16 bits, or as it was written where it is no fraction; null for
    the fixed-rate policies, whose own `fraction` stands. delta: value / baseline - 1 for
    perplexity, else value - baseline; the baseline is `raw`, the interval 95 %, paired, over `n`
    documents. *_bytes: mean per document; fraction: wire bytes over the cache at 16 bits,
    fraction_native: over its own dtype. fixed_rate: the policy has one size; wire_only: it frees no
    decode memory. reason: why there is no value. subtask: of a suite; `average` is the mean over
    them. query_aware: the plan was made knowing the question. phase: which phases compress or evict
    (`none`, `prefill`, `decode`, `both`; null in rows that are older than the field); decode: the
    decode phase, such as `h2o@256tok`, under which resident_bytes is what is held at the end.
    protection: `4+32`, what eviction policies keep in any case where it is not each one's own.

    Raises:
        BadInput: a number that JSON cannot hold (not finite).
    """

    task: str
    model: str
    policy: str
    budget: float | str | None
    metric: str
    value: float | None
    baseline: float | None
    delta: float | None
    ci_low: float | None
    ci_high: float | None
    n: int
    wire_bytes: int | None
    reference_bytes: int | None
    fraction: float | None
    fraction_native: float | None
    resident_bytes: int | None
    length: int
    distractors: int | None
    seed: int
    commit: str
    versions: dict[str, str]
    codec: str
    importance: str
    fixed_rate: bool
    wire_only: bool | None
    reason: str | None = None
    subtask: str | None = None
    query_aware: bool = False
    phase: Phase | None = None
    decode: str | None = None
    protection: str | None = None

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            number = getattr(self, name)
            if isinstance(number, float) and not math.isfinite(number):
                raise BadInput(f"{self.task} {self.policy} {self.metric}: {name} is {number}")


class Provenance(msgspec.Struct, frozen=True):
    """Which code made a row: the commit, and the versions of everything that computes."""

    commit: str
    versions: dict[str, str]


def provenance(model: Any = None) -> Provenance:
    """The commit of this checkout (`unknown` outside one) and the versions of what computes."""
    names = ("kvprism", "torch", "transformers")
    versions = {name: _version(name) for name in names} | {"python": platform.python_version()}
    if model is not None:
        versions["attention"] = str(model.config._attn_implementation).removeprefix("kvprism_")
    return Provenance(_commit(), versions)


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return UNKNOWN


def _commit() -> str:
    """The commit, with `-dirty` when the code or the built-in models differ from it."""
    package = Path(__file__).parents[1]
    top, commit = _git(package, "rev-parse", "--show-toplevel"), _git(package, "rev-parse", "HEAD")
    # Installed below some other project's repository, that project's commit would say nothing.
    if top is None or commit is None or package != Path(top) / "src" / "kvprism":
        return UNKNOWN
    # A run that leaves its results beside the code is the same code.
    code = [str(Path(top) / name) for name in ("src", "kvprism-tiny")]
    return f"{commit}-dirty" if _git(package, "status", "--porcelain", "--", *code) else commit


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def write_rows(path: Path, rows: Sequence[msgspec.Struct]) -> None:
    """Write a list of rows as readable JSON, in one step: the old file or the new one.

    Raises:
        BadInput: a place that cannot be written.
    """
    replace_file(path, msgspec.json.format(msgspec.json.encode(rows), indent=1) + b"\n")


def read_rows(path: Path) -> list[Row]:
    """The rows of a file that `write_rows` made; `BadInput` when it is none."""
    return read_json(path, list[Row], "a file of evaluation rows")


def read_json(path: Path, kind: type[T], what: str) -> T:
    """A JSON file as `kind`; `BadInput` says that it is not `what`."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.DecodeError) as error:
        raise BadInput(f"{path} is not {what}: {error}") from error


def replace_file(path: Path, contents: bytes) -> None:
    """Write beside `path`, then rename over it; `BadInput` when the place cannot be written."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        temporary.write_bytes(contents)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise BadInput(f"cannot write {path}: {error}") from error
