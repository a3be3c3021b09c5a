"""A suite of long-context tasks after RULER, asked on the restored cache: answers right, NLL."""

import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from kvprism.errors import BadInput
from kvprism.evaluate.arms import Arm
from kvprism.evaluate.haystack import NEW_LINE, ask, hide
from kvprism.evaluate.lexicon import EVALUATION, UNSEEN_WORDINGS, Lexicon
from kvprism.evaluate.measure import Case, LoadedModel, check_fits, measure
from kvprism.evaluate.records import CellKey, Header, Record, header_of, record_of
from kvprism.evaluate.rows import provenance
from kvprism.evaluate.tasks import KINDS, Exchange, Kind, Sample
from kvprism.evaluate.texts import Ids, TextFile
from kvprism.registry import Registry

DEPTHS = 11
# What comes after an answer when another question follows.
STOP = " ."


class Subtask(NamedTuple):
    """A kind of task, and the words that it is made of."""

    kind: Kind
    lexicon: Lexicon


SUBTASKS: Registry[Subtask] = Registry(
    "ruler task",
    [
        *((name, Subtask(kind, EVALUATION)) for name, kind in KINDS.items()),
        ("needle-unseen", Subtask(KINDS["needle"], UNSEEN_WORDINGS)),
    ],
)


class RulerId(NamedTuple):
    """Which case: its cell, and its number in the cell."""

    length: int
    subtask: str
    number: int

    @property
    def document(self) -> str:
        return f"{self.length}-{self.subtask}-{self.number}"

    @property
    def seed(self) -> tuple[int, int, int]:
        """Numbers of this case alone, whatever else is measured."""
        return self.length, zlib.crc32(self.subtask.encode()), self.number


@dataclass(frozen=True, eq=False)
class RulerCase:
    """A case with what it was made of; facts: where in the context each of them stands."""

    sample: Sample
    case: Case
    facts: tuple[slice, ...]


@dataclass(frozen=True, eq=False)
class Ruler:
    """Every length x subtask is a cell of 11 depths x `trials` cases.

    The context is captured and sent, then the questions are fed, and the answers with them: an
    answer is right when greedy decoding gives it after right ones. The plan does not know the
    question, unless `query_aware`, which is another protocol and gives tables of its own.

    subtasks: names in `SUBTASKS`; haystack: a text file instead of generated text. The cache is
    kept at `cache_dtype` and restored to float32.

    Raises:
        UnknownName: no such subtask.
        BadInput: counts that are not positive, a length that does not fit, an unreadable or too
            short haystack, or `query_aware` with an importance that no question changes.
    """

    subject: LoadedModel
    arms: Sequence[Arm]
    lengths: Sequence[int] = (2048,)
    subtasks: Sequence[str] = tuple(SUBTASKS)
    trials: int = 10
    seed: int = 0
    haystack: Path | None = None
    cache_dtype: str = "bfloat16"
    query_aware: bool = False

    def __post_init__(self) -> None:
        if min(self.trials, len(self.lengths), *self.lengths, len(self.subtasks)) < 1:
            raise BadInput(
                "lengths and trials must be positive and at least one task is needed; got "
                f"{self.lengths}, {self.trials}, {self.subtasks}"
            )
        if self.seed < 0:
            raise BadInput(f"seed must not be negative, got {self.seed}")
        blind = {arm.options.importance for arm in self.arms} - {"attention"}
        if self.query_aware and blind:
            raise BadInput(
                f"no question changes importance {sorted(blind)}; query-aware plans need "
                "importance 'attention'"
            )
        for length in self.lengths:  # what does not fit is found before the first hour
            for subtask in self.subtasks:
                check_fits(self.subject.model, self.case(RulerId(length, subtask, 0)).case)

    @cached_property
    def _haystack(self) -> TextFile | None:
        if self.haystack is None:
            return None
        return TextFile(self.haystack, self.subject.tokenizer)

    @cached_property
    def header(self) -> Header:
        configuration = {
            "lengths": self.lengths,
            "subtasks": self.subtasks,
            "trials": self.trials,
            "seed": self.seed,
            "haystack": None if self._haystack is None else self._haystack.digest,
            "arms": self.arms,
            "cache_dtype": self.cache_dtype,
            "query_aware": self.query_aware,
            "fingerprint": self.subject.fingerprint,
        }
        found = provenance(self.subject.model)
        return header_of("ruler", self.subject.name, self.seed, configuration, found)

    @cached_property
    def _ids(self) -> list[RulerId]:
        """Subtask by subtask within a number, so that an unfinished run has some of each."""
        return [
            RulerId(length, subtask, number)
            for length in dict.fromkeys(self.lengths)
            for number in range(DEPTHS * self.trials)
            for subtask in dict.fromkeys(self.subtasks)
        ]

    @property
    def documents(self) -> Sequence[str]:
        return [which.document for which in self._ids]

    def records(self, skip: Collection[str] = ()) -> Iterator[Record]:
        """One record per (case, arm)."""
        for which in self._ids:
            if which.document in skip:
                continue
            arms = [arm.for_document(zlib.crc32(which.document.encode())) for arm in self.arms]
            case, cell = self.case(which).case, CellKey(which.length, subtask=which.subtask)
            for arm, outcome in measure(
                self.subject.model, case, arms, self.cache_dtype, self.query_aware
            ):
                yield record_of(which.document, cell, arm, outcome)

    def case(self, which: RulerId) -> RulerCase:
        """The case, the same whatever else is measured: depth by its number, text by its seed."""
        kind, lexicon = SUBTASKS[which.subtask]
        rng = np.random.default_rng((self.seed, *which.seed))
        sample = kind.sample(rng, lexicon)
        depths = [which.number % DEPTHS / (DEPTHS - 1), *rng.random(len(sample.facts) - 1)]
        hidden = hide(
            self.subject.tokenizer,
            which.length,
            sample.facts,
            sorted(depths) if kind.ordered else depths,
            rng,
            None if self._haystack is None else self._haystack.ids,
        )
        asked = sample.exchanges if kind.asks_all else sample.exchanges[:1]
        return RulerCase(sample, self._case(hidden.context_ids, asked), hidden.facts)

    def _case(self, context: Ids, exchanges: Sequence[Exchange]) -> Case:
        """The questions follow the context as a new paragraph, each after the last one's answer."""
        parts: list[Ids] = []
        answers: list[slice] = []
        for question, expected in exchanges:
            asked = ask(self.subject.tokenizer, (STOP if parts else NEW_LINE) + question, expected)
            start = sum(len(part) for part in parts)
            answers += [slice(start + span.start, start + span.stop) for span in asked.answers]
            parts.append(asked.ids)
        continuation = torch.from_numpy(np.concatenate(parts))
        return Case(torch.from_numpy(context), continuation, tuple(answers))
