"""Facts hidden in a haystack, asked for on the restored cache: exact match, digit NLL."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch

from kvprism.errors import BadInput
from kvprism.evaluate.arms import Arm
from kvprism.evaluate.haystack import NeedleCase, needle_case
from kvprism.evaluate.lexicon import WORDINGS
from kvprism.evaluate.measure import Case, LoadedModel, check_fits, measure
from kvprism.evaluate.records import CellKey, Header, Record, header_of, record_of
from kvprism.evaluate.rows import provenance
from kvprism.evaluate.texts import TextFile


class NeedleId(NamedTuple):
    """Which case: its cell, and its number in the cell."""

    length: int
    distractors: int
    number: int

    @property
    def document(self) -> str:
        return f"{self.length}-{self.distractors}-{self.number}"


@dataclass(frozen=True, eq=False)
class Needle:
    """Ask for hidden values: every length x distractor count is a cell of depths x trials cases.

    The context is captured and sent before the question is known; the question is fed on the
    restored cache, and the answer with it (teacher-forced: all tokens right is greedy's exact
    match). The cache is kept at `cache_dtype` and restored to float32.

    haystack: a text file instead of generated text.

    Raises:
        BadInput: counts that are not positive, an unreadable or too short haystack.
    """

    subject: LoadedModel
    arms: Sequence[Arm]
    lengths: Sequence[int] = (1024, 2048)
    depths: int = 11
    trials: int = 5
    distractors: Sequence[int] = (0, 3)
    seed: int = 0
    haystack: Path | None = None
    template: str = WORDINGS[0]
    cache_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        counts = (self.depths, self.trials, len(self.distractors), len(self.lengths), *self.lengths)
        if min(counts) < 1 or min(*self.distractors, self.seed) < 0:
            raise BadInput(
                f"lengths, depths and trials must be positive, distractors and seed not negative; "
                f"got {self.lengths}, {self.depths}, {self.trials}, {self.distractors}, {self.seed}"
            )
        for length in self.lengths:  # what does not fit is found before the first hour
            case = case_of(self.needle(NeedleId(length, max(self.distractors), 0)))
            check_fits(self.subject.model, case)

    @cached_property
    def _haystack(self) -> TextFile | None:
        if self.haystack is None:
            return None
        return TextFile(self.haystack, self.subject.tokenizer)

    @cached_property
    def header(self) -> Header:
        configuration = {
            "lengths": self.lengths,
            "depths": self.depths,
            "trials": self.trials,
            "distractors": self.distractors,
            "seed": self.seed,
            "haystack": None if self._haystack is None else self._haystack.digest,
            "template": self.template,
            "arms": self.arms,
            "cache_dtype": self.cache_dtype,
            "fingerprint": self.subject.fingerprint,
        }
        found = provenance(self.subject.model)
        return header_of("needle", self.subject.name, self.seed, configuration, found)

    @cached_property
    def _ids(self) -> list[NeedleId]:
        return [
            NeedleId(length, distractors, number)
            for length in dict.fromkeys(self.lengths)
            for distractors in dict.fromkeys(self.distractors)
            for number in range(self.depths * self.trials)
        ]

    @property
    def documents(self) -> Sequence[str]:
        return [needle.document for needle in self._ids]

    def records(self, skip: Collection[str] = ()) -> Iterator[Record]:
        """One record per (case, arm)."""
        for which in self._ids:
            if which.document in skip:
                continue
            arms = [arm.for_document(which.number) for arm in self.arms]
            case, cell = case_of(self.needle(which)), CellKey(which.length, which.distractors)
            for arm, outcome in measure(self.subject.model, case, arms, self.cache_dtype):
                yield record_of(which.document, cell, arm, outcome)

    def needle(self, which: NeedleId) -> NeedleCase:
        """The case, the same whatever else is measured: depth by its number, text by its seed."""
        depth = (which.number % self.depths) / max(1, self.depths - 1)
        return needle_case(
            self.subject.tokenizer,
            which.length,
            depth,
            which.distractors,
            seed=(self.seed, *which),
            haystack_ids=None if self._haystack is None else self._haystack.ids,
            template=self.template,
        )


def case_of(needle: NeedleCase) -> Case:
    """The whole context is sent before question and answer are fed."""
    context, question, answer = (
        torch.from_numpy(ids)
        for ids in (needle.context_ids, needle.question_ids, needle.answer_ids)
    )
    both = torch.cat([question, answer])
    return Case(context, both, (slice(len(question), len(both)),))
