"""LongBench (Bai et al. 2024, arXiv 2308.14508): answers generated on the restored cache."""

import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import Any, NamedTuple

import msgspec
import torch

from kvprism.errors import BadInput, BudgetTooSmall, MissingExtra
from kvprism.evaluate.arms import Arm, through_the_wire
from kvprism.evaluate.longbench_data import TASKS, LongBenchFile, LongBenchRow, read_task
from kvprism.evaluate.longbench_scores import CHINESE, chinese_segmenter
from kvprism.evaluate.measure import (
    Case,
    LoadedModel,
    Outcome,
    capture_for,
    feed,
    generate_on,
    known_dtype,
    outcome_of,
    require_finite,
)
from kvprism.evaluate.records import CellKey, Header, Record, header_of, record_of
from kvprism.evaluate.rows import provenance
from kvprism.retention import Decode
from kvprism.tensors import RequestKV

CONTENT = "{content}"


class LongBenchId(NamedTuple):
    """Which row: its task, and its number in the task's file, from 0."""

    task: str
    number: int

    @property
    def document(self) -> str:
        return f"{self.task}-{self.number}"


class Prompt(NamedTuple):
    """A prompt's token ids: those whose cache is sent, and those that are computed after it."""

    context: torch.Tensor
    question: torch.Tensor


@dataclass(frozen=True, eq=False)
class LongBench:
    """Every task is a cell of its rows: the cache is sent, then the answer is generated greedily.

    The context is captured and sent, and the rest of the prompt, with the question in it, is fed on
    the restored cache. With `query_aware` the whole prompt but its last token is captured and sent,
    as papers on eviction do: their window of last queries is then the question. That is another
    protocol and gives tables of its own.

    A prompt of more than `max_length` tokens loses its middle. The benchmark cuts it as text and
    encodes it again; here the ids are cut, which differs where the halves meet. Figures of KL and
    flips are over raw's own answer, fed to every arm.

    data, tasks: see `read_task`; max_length: by default what the model has positions for, less the
    longest answer; documents: of every task the first so many rows, by default all; chat: wrap the
    prompt in the tokenizer's chat template, where the benchmark does so. The cache is kept at
    `cache_dtype` and restored to the model's own.

    Raises:
        UnknownName: no such task.
        BadInput: data that cannot be read or used, a prompt length that does not fit the model, no
            document, a tokenizer without a chat template.
        MissingExtra: a Chinese task without jieba, or a chat template without jinja2.
    """

    subject: LoadedModel
    arms: Sequence[Arm]
    data: str
    tasks: Sequence[str] = tuple(TASKS)
    max_length: int | None = None
    n_documents: int | None = None
    chat: bool = False
    seed: int = 0
    cache_dtype: str = "bfloat16"
    query_aware: bool = False

    def __post_init__(self) -> None:
        if not self.tasks:
            raise BadInput("at least one task is needed")
        if self.n_documents is not None and self.n_documents < 1:
            raise BadInput(f"documents must be at least 1, got {self.n_documents}")
        if self.seed < 0:
            raise BadInput(f"seed must not be negative, got {self.seed}")
        known_dtype("cache dtype", self.cache_dtype)
        if any(TASKS[name].score in CHINESE for name in self.tasks):
            chinese_segmenter()
        if not 2 <= self.length <= self._longest:
            raise BadInput(
                f"prompts of {self.length} tokens: with {self._new_tokens} generated ones, this "
                f"model has positions for 2 to {self._longest}"
            )
        _ = self._files, self._around  # what is wrong with them is found before the first hour

    @property
    def length(self) -> int:
        """Most tokens of a prompt."""
        return self._longest if self.max_length is None else self.max_length

    @property
    def _new_tokens(self) -> int:
        return max(TASKS[name].new_tokens for name in self.tasks)

    @property
    def _longest(self) -> int:
        # Nothing follows the last generated token.
        return int(self.subject.model.config.max_position_embeddings) - self._new_tokens + 1

    @cached_property
    def _files(self) -> dict[str, LongBenchFile]:
        return {name: read_task(self.data, name) for name in self.tasks}

    @cached_property
    def _around(self) -> tuple[str, str]:
        """What the chat template puts before and after a prompt."""
        return chat_around(self.subject.tokenizer) if self.chat else ("", "")

    @cached_property
    def header(self) -> Header:
        configuration = {
            "rows": {name: file.digest for name, file in self._files.items()},
            "prompts": {name: TASKS[name] for name in self.tasks},
            "max_length": self.length,
            "documents": self.n_documents,
            "chat": self._around,
            "seed": self.seed,
            "arms": self.arms,
            "cache_dtype": self.cache_dtype,
            "query_aware": self.query_aware,
            "dtype": str(self.subject.model.dtype).removeprefix("torch."),
            "device": self.subject.model.device.type,
            "fingerprint": self.subject.fingerprint,
        }
        found = provenance(self.subject.model)
        return header_of("longbench", self.subject.name, self.seed, configuration, found)

    @cached_property
    def _ids(self) -> list[LongBenchId]:
        """Task by task within a number, so that an unfinished run has some of each."""
        counts = {name: len(file.rows[: self.n_documents]) for name, file in self._files.items()}
        return [
            LongBenchId(name, number)
            for number in range(max(counts.values()))
            for name, count in counts.items()
            if number < count
        ]

    @property
    def documents(self) -> Sequence[str]:
        return [which.document for which in self._ids]

    def records(self, skip: Collection[str] = ()) -> Iterator[Record]:
        """One record per (row, arm)."""
        for which in self._ids:
            if which.document in skip:
                continue
            arms = [arm.for_document(zlib.crc32(which.document.encode())) for arm in self.arms]
            cell = CellKey(self.length, subtask=which.task)
            for arm, outcome in self._answers(which, arms):
                yield record_of(which.document, cell, arm, outcome)

    def prompt(self, which: LongBenchId) -> Prompt:
        """The row's prompt, cut to `length`, and apart where the context ends."""
        task, (opening, closing) = TASKS[which.task], self._around
        if not task.chat:
            opening = closing = ""
        before, after = task.fill(self._row(which))
        whole = self._encode(opening + before + after + closing, special=not opening)
        # The tokens that the context has, whatever is asked: the one that joins its end with the
        # question's beginning, if there is one, is part of the question.
        n = _n_common(whole, self._encode(opening + before, special=not opening))
        ids, n = cut_middle(whole, n, self.length)
        n = len(ids) - 1 if self.query_aware else min(max(n, 1), len(ids) - 1)
        return Prompt(ids[:n], ids[n:])

    def _row(self, which: LongBenchId) -> LongBenchRow:
        return self._files[which.task].rows[which.number]

    def _encode(self, text: str, special: bool) -> torch.Tensor:
        # Not verbose: it is no mistake that a prompt is longer than the model's context.
        ids = self.subject.tokenizer.encode(text, add_special_tokens=special, verbose=False)
        return torch.tensor(ids)

    def _answers(
        self, which: LongBenchId, arms: Sequence[Arm]
    ) -> Iterator[tuple[Arm, Outcome | BudgetTooSmall]]:
        """Capture once; for each arm send the cache through the wire, restore it, and answer."""
        model, (context, question) = self.subject.model, self.prompt(which)
        kv, view = capture_for(model, context, arms, self.cache_dtype)
        case: Case | None = None
        raw: torch.Tensor | None = None
        for arm in arms:
            try:
                restored, plan = through_the_wire(kv, view, arm)
            except BudgetTooSmall as error:
                yield arm, error
                continue
            answer = self._generate(which.task, restored, question, arm.decode)
            case = case_of(context, question, answer) if case is None else case
            fed = torch.cat([question[:-1], case.fed])
            logits, resident = feed(model, restored, fed, arm.decode, last=len(case.fed))
            require_finite(logits, arm)
            raw = logits if raw is None else raw
            text = self.subject.tokenizer.decode(answer.tolist(), skip_special_tokens=True)
            score = TASKS[which.task].score_of(text, self._row(which))
            outcome = outcome_of(plan, resident, case, raw, logits)
            yield arm, msgspec.structs.replace(outcome, text=text, score=score)

    def _generate(
        self, task: str, restored: RequestKV, question: torch.Tensor, decode: Decode | None
    ) -> torch.Tensor:
        stops, line = self._ends, TASKS[task].ends_at_newline
        if line:
            stops = (*stops, int(self._encode("\n", special=False)[-1]))
        n = TASKS[task].new_tokens
        model, fewest = self.subject.model, int(line)
        return generate_on(model, restored, question, n, stops, decode, fewest)

    @cached_property
    def _ends(self) -> tuple[int, ...]:
        """Tokens that end an answer: the tokenizer's, and those of the model's own settings."""
        own = self.subject.model.generation_config.eos_token_id
        ends = {self.subject.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
        return tuple(sorted(ends - {None}))


def case_of(context: torch.Tensor, question: torch.Tensor, answer: torch.Tensor) -> Case:
    """An answer to be predicted, from the last token before it on."""
    ids = torch.cat([question[-1:], answer])
    return Case(torch.cat([context, question[:-1]]), ids, (slice(1, len(ids)),))


def cut_middle(ids: torch.Tensor, n: int, limit: int) -> tuple[torch.Tensor, int]:
    """At most `limit` ids, the same number from either end, and how many of the first `n` are left.

    Example:
        >>> ids, n = cut_middle(torch.arange(10), 7, 4)
        >>> ids.tolist(), n
        ([0, 1, 8, 9], 2)
    """
    removed, half = len(ids) - 2 * (limit // 2), limit // 2
    if len(ids) <= limit:
        return ids, n
    return torch.cat([ids[:half], ids[-half:]]), min(n, max(half, n - removed))


def _n_common(a: torch.Tensor, b: torch.Tensor) -> int:
    """How many ids two sequences begin with."""
    n = min(len(a), len(b))
    return int((a[:n] == b[:n]).int().cumprod(0).sum())


def chat_around(tokenizer: Any) -> tuple[str, str]:
    """What a tokenizer's chat template puts before a user's only message, and after it.

    Raises:
        BadInput: the tokenizer has no chat template, or one that does not show the message.
        MissingExtra: jinja2, which renders templates, is not installed.
    """
    if tokenizer.chat_template is None:
        raise BadInput("this model's tokenizer has no chat template; leave out --chat")
    if find_spec("jinja2") is None:
        raise MissingExtra("a chat template", "jinja2", "eval")
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": CONTENT}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=False,  # where it is known: answers are short, and thoughts are none
    )
    before, found, after = rendered.partition(CONTENT)
    if not found:
        raise BadInput("this model's chat template does not show the user's message")
    return before, after
