"""LongBench's rows and tasks: JSON lines in the benchmark's own format, its prompts and limits."""

import hashlib
import re
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath

import msgspec

from kvprism.errors import BadInput
from kvprism.evaluate.longbench_scores import SCORES
from kvprism.registry import Registry

CONTEXT, INPUT = "{context}", "{input}"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILE = "data.zip"
# The largest of the benchmark's files is a tenth of that.
MAX_FILE_NBYTES = 2**30
# What the true answers of a task with this score look like.
ANSWERS = {"retrieval": r"Paragraph \d+", "retrieval_zh": r"段落\d+", "count": r"\d+"}


class LongBenchTask(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One of the 21 tasks.

    prompt: with `{context}`, and mostly `{input}`, to fill in; new_tokens: most tokens to generate;
    score: a name in `SCORES`; chat: whether chat models get it in their chat template; first_line:
    whether only the prediction's first line counts; ends_at_newline: whether generation ends there.
    """

    prompt: str
    new_tokens: int
    score: str
    chat: bool = True
    first_line: bool = False
    ends_at_newline: bool = False

    def fill(self, row: "LongBenchRow") -> tuple[str, str]:
        """The prompt up to the end of the context, and what comes after it."""
        before, after = self.prompt.split(CONTEXT)
        return before + row.context, after.replace(INPUT, row.input)

    def score_of(self, prediction: str, row: "LongBenchRow") -> float:
        """The best score of a prediction over the true answers, in [0, 1]."""
        if self.first_line:
            prediction = prediction.lstrip("\n").split("\n")[0]
        score, classes = SCORES[self.score], row.all_classes or ()
        return max(score(prediction, answer, classes) for answer in row.answers)

    def check(self, row: "LongBenchRow") -> None:
        """Raises `ValueError`, naming the field, for a row that this task cannot be scored on."""
        if self.score == "classification" and not row.all_classes:
            raise ValueError("`all_classes` must name the classes")
        expected = ANSWERS.get(self.score)
        for answer in row.answers:
            if expected is not None and re.search(expected, answer) is None:
                raise ValueError(f"`answers` must be like {expected!r}, got {answer!r}")


TASKS: Registry[LongBenchTask] = Registry(
    "LongBench task",
    list(
        msgspec.toml.decode(
            Path(__file__).with_name("longbench.toml").read_bytes(), type=dict[str, LongBenchTask]
        ).items()
    ),
)


class LongBenchRow(msgspec.Struct, frozen=True):
    """One line of a task's file; fields that nothing here needs are left out.

    input: the question, empty where the task is one by itself; all_classes: of a classification.
    """

    dataset: str
    input: str
    context: str
    answers: tuple[str, ...]
    all_classes: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not self.context.strip():
            raise ValueError("`context` is empty")
        if not self.answers:
            raise ValueError("`answers` is empty")


@dataclass(frozen=True)
class LongBenchFile:
    """A task's rows; digest: SHA-256 of the file, for headers."""

    rows: tuple[LongBenchRow, ...]
    digest: str


def read_task(data: str, name: str) -> LongBenchFile:
    """The rows of a task.

    data: a directory with `NAME.jsonl` in it, the benchmark's `data.zip`, or the name of its data
    set on the hub, `owner/name`, whose `data.zip` is fetched once and kept in the hub's own cache.

    Raises:
        UnknownName: no such task.
        BadInput: none of these, no such file in it, or a row that is malformed: the message names
            file, line and field.
    """
    task, contents = TASKS[name], _contents(data, f"{name}.jsonl")
    rows = []
    for number, line in enumerate(contents.splitlines(), start=1):
        try:
            row = msgspec.json.decode(line, type=LongBenchRow)
            if row.dataset != name:
                raise ValueError(f"`dataset` must be {name!r}, got {row.dataset!r}")
            task.check(row)
        except ValueError as error:  # msgspec's are, too
            raise BadInput(f"{data}: {name}.jsonl, line {number}: {error}") from error
        rows.append(row)
    if not rows:
        raise BadInput(f"{data}: {name}.jsonl is empty")
    return LongBenchFile(tuple(rows), hashlib.sha256(contents).hexdigest())


def _contents(data: str, file: str) -> bytes:
    path = Path(data)
    try:
        if path.is_dir():
            return (path / file).read_bytes()
        return _unpacked(path if path.is_file() else _fetched(data), file)
    except FileNotFoundError as error:
        raise BadInput(f"{data} has no {file}; name the tasks that it has with --tasks") from error
    except (OSError, zipfile.BadZipFile) as error:
        raise BadInput(f"cannot read {file} of {data}: {error}") from error


def _unpacked(archive: Path, file: str) -> bytes:
    with zipfile.ZipFile(archive) as opened:
        for member in opened.infolist():
            if PurePosixPath(member.filename).name == file:
                if member.file_size > MAX_FILE_NBYTES:
                    raise BadInput(
                        f"{archive}: {file} would be {member.file_size} bytes, at most "
                        f"{MAX_FILE_NBYTES} are read"
                    )
                return opened.read(member)
    raise FileNotFoundError(file)


@cache
def _fetched(name: str) -> Path:
    """The benchmark's archive in the hub's cache, downloaded if it is not there."""
    if HUB_NAME.fullmatch(name) is None:
        raise BadInput(
            f"{name!r} is neither a directory, nor a file, nor a data set's name such as "
            "THUDM/LongBench"
        )
    # Not at the top: reading a directory needs no network library.
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    try:
        return Path(hf_hub_download(name, HUB_FILE, repo_type="dataset"))
    except (OSError, EntryNotFoundError, HFValidationError) as error:
        raise BadInput(
            f"{name} is no directory here, and {HUB_FILE} of the data set of that name cannot be "
            f"fetched: {str(error).strip().partition(chr(10))[0]}"
        ) from error
