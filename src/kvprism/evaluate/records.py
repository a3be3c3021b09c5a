"""Records: what was measured, one per (document, arm), kept as it is measured and resumable.

A record file is JSON lines: a header that says what is measured, then records. Rows and comparisons
are computed from records, never from rows.
"""

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec

from kvprism.errors import BadInput, BudgetTooSmall
from kvprism.evaluate.arms import Arm
from kvprism.evaluate.measure import Outcome
from kvprism.evaluate.rows import Provenance, replace_file
from kvprism.retention import label_of

FORMAT = "kvprism-records/2"
SHOWN_DIFFERENCES = 4
Progress = Callable[[int, int], None]


class ArmKey(NamedTuple):
    """What tells two arms of one run apart.

    decode: its decode phase, such as `h2o@256tok`; protection: `4+32` where eviction policies keep
    other tokens in any case than their own.
    """

    policy: str
    budget: float | str | None
    codec: str
    importance: str
    decode: str | None = None
    protection: str | None = None


class CellKey(NamedTuple):
    """What tells two cells of one run apart: documents of one cell make one figure.

    length: context tokens; distractors: of needle tests; subtask: of a suite.
    """

    length: int
    distractors: int | None = None
    subtask: str | None = None


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What one arm did to one document; a reason instead where the budget is too small.

    document: unique within the run.
    """

    document: str
    cell: CellKey
    arm: ArmKey
    outcome: Outcome | None
    reason: str | None


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """What a record file holds: the task, its configuration, and the code that measured it.

    digest: SHA-256 over the other fields, which are all that the figures depend on.
    """

    format: str
    digest: str
    task: str
    model: str
    seed: int
    configuration: dict[str, Any]
    provenance: Provenance


class Records(NamedTuple):
    """A header and its records, in the order in which they were measured."""

    header: Header
    records: list[Record]


class Task(Protocol):
    """Something to measure: named documents, and every arm on each of them."""

    @property
    def header(self) -> Header: ...

    @property
    def arms(self) -> Sequence[Arm]: ...

    @property
    def documents(self) -> Sequence[str]: ...

    def records(self, skip: Collection[str] = ()) -> Iterator[Record]:
        """One record per (document, arm), document by document, without those in `skip`."""
        ...


def header_of(task: str, model: str, seed: int, configuration: Any, found: Provenance) -> Header:
    """A header with its digest; `configuration`: plain values in dataclasses, dicts and tuples."""
    # As JSON gives it back: a header that was stored compares with one that was not.
    plain = msgspec.json.decode(msgspec.json.encode(configuration, order="deterministic"))
    fields = {
        "format": FORMAT,
        "task": task,
        "model": model,
        "seed": seed,
        "configuration": plain,
        "provenance": found,
    }
    encoded = msgspec.json.encode(fields, order="deterministic")
    return Header(**fields, digest=hashlib.sha256(encoded).hexdigest())


def key_of(arm: Arm) -> ArmKey:
    """The arm as records name it."""
    decode = None if arm.decode is None else label_of(arm.decode)
    its = arm.options
    protection = None if its.protection is None else str(its.protection)
    return ArmKey(arm.policy, arm.budget, its.codec, its.importance, decode, protection)


def record_of(document: str, cell: CellKey, arm: Arm, found: Outcome | BudgetTooSmall) -> Record:
    """Label what `measure` yielded."""
    infeasible = isinstance(found, BudgetTooSmall)
    return Record(
        document=document,
        cell=cell,
        arm=key_of(arm),
        outcome=None if isinstance(found, BudgetTooSmall) else found,
        reason=str(found) if infeasible else None,
    )


def collect(task: Task, path: Path | None = None, on_progress: Progress | None = None) -> Records:
    """Measure what `path` does not hold yet, appending every record as it is measured.

    on_progress: called with (records so far, all records). Documents of which an arm is missing are
    measured again; without a path nothing is kept.

    Raises:
        BadInput: `path` is something else, or the records of another configuration or version.
    """
    header = task.header
    kept = [] if path is None else _resume(task, header, path)
    total = len(task.documents) * len(task.arms)
    done = {record.document for record in kept}
    with _appending(path) as append:
        for record in task.records(skip=done):
            append(record)
            kept.append(record)
            if on_progress is not None:
                on_progress(len(kept), total)
    return Records(header, kept)


def load_records(path: Path) -> Records:
    """The records of a file, finished or not; a last line that was cut short is left out.

    Raises:
        BadInput: no record file, or a damaged one.
    """
    try:
        first, *lines = path.read_bytes().split(b"\n")
        header = msgspec.json.decode(first, type=Header)
        if header.format != FORMAT:
            raise BadInput(
                f"{path} is of format {header.format!r}, expected {FORMAT!r}; measure again into "
                "another file, or read this one with the version that wrote it"
            )
        # What follows the last line end is empty, or a record that was being written.
        records = [msgspec.json.decode(line, type=Record) for line in lines[:-1]]
    except (OSError, msgspec.DecodeError) as error:
        raise BadInput(f"{path} is not a file of kvprism evaluation records: {error}") from error
    return Records(header, records)


def _resume(task: Task, header: Header, path: Path) -> list[Record]:
    """The records of complete documents, rewritten so that the file holds nothing else."""
    found: list[Record] = []
    if path.exists():
        stored, found = load_records(path)
        require_same(path, stored, header)
    arms = {key_of(arm) for arm in task.arms}
    seen: dict[str, set[ArmKey]] = {}
    for record in found:
        seen.setdefault(record.document, set()).add(record.arm)
    kept = [record for record in found if seen[record.document] == arms]
    lines = [msgspec.json.encode(item) for item in (header, *kept)]
    replace_file(path, b"\n".join([*lines, b""]))
    return kept


def require_same(path: Path, stored: Header, header: Header) -> None:
    """Refuse the records of another configuration or version (`BadInput`)."""
    if stored.digest == header.digest:
        return
    differences = list(_differences(_settings(stored), _settings(header)))
    more = len(differences) - SHOWN_DIFFERENCES
    raise BadInput(
        f"{path} holds records of another run "
        f"({'; '.join(differences[:SHOWN_DIFFERENCES])}"
        f"{f'; and {more} more' if more > 0 else ''}); name another file, remove this one, "
        "or repeat the run with its own settings"
    )


def _differences(theirs: Any, ours: Any, name: str = "") -> Iterator[str]:
    """Where two settings differ, such as `arms.3.budget: 0.3, now 0.4`; long values are cut."""
    a, b = _members(theirs), _members(ours)
    if a is not None and b is not None:
        for key in {**a, **b}:
            yield from _differences(a.get(key), b.get(key), f"{name}.{key}" if name else str(key))
    elif theirs != ours:
        yield f"{name}: {theirs!s:.80}, now {ours!s:.80}"


def _members(value: Any) -> dict[Any, Any] | None:
    if isinstance(value, list):
        return dict(enumerate(value))
    return value if isinstance(value, dict) else None


def _settings(header: Header) -> dict[str, Any]:
    return {
        "task": header.task,
        "model": header.model,
        "seed": header.seed,
        **header.configuration,
        "commit": header.provenance.commit,
        "versions": header.provenance.versions,
    }


@contextmanager
def _appending(path: Path | None) -> Iterator[Callable[[Record], None]]:
    if path is None:
        yield lambda record: None
        return
    with path.open("ab") as file:

        def append(record: Record) -> None:
            file.write(msgspec.json.encode(record) + b"\n")
            file.flush()

        yield append
