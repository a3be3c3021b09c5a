"""Continuations of a text on restored caches: perplexity, KL to raw, top-1 flips."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from kvprism.errors import BadInput
from kvprism.evaluate.arms import Arm
from kvprism.evaluate.measure import Case, LoadedModel, measure
from kvprism.evaluate.records import CellKey, Header, Record, header_of, record_of
from kvprism.evaluate.rows import provenance
from kvprism.evaluate.texts import TextFile


@dataclass(frozen=True, eq=False)
class Perplexity:
    """Score `continuation` tokens after a `context` of as many documents as asked for.

    A document is a window of the text, windows do not overlap and are spread evenly over it; each
    begins with the begin-of-text token. The cache holds all but the last context token: the decode
    side computes that position again, as it does in use. The cache is kept at `cache_dtype` and
    restored to float32, so that what is measured is the cache and not the noise of 16-bit
    arithmetic.

    Raises:
        BadInput: an unreadable text, one that is too short, or settings that are not positive.
    """

    subject: LoadedModel
    text: Path
    arms: Sequence[Arm]
    context: int = 1536
    continuation: int = 512
    n_documents: int = 40
    seed: int = 0
    cache_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.context < 2 or min(self.continuation, self.n_documents) < 1:
            raise BadInput(
                f"context must be at least 2 tokens, continuation and documents at least 1; got "
                f"{self.context}, {self.continuation} and {self.n_documents}"
            )
        if self.seed < 0:
            raise BadInput(f"seed must not be negative, got {self.seed}")
        if self._n_windows < self.n_documents:
            needed = self.n_documents * self._window
            raise BadInput(
                f"{self.text} has {len(self._ids)} tokens, {self.n_documents} documents of "
                f"{self.context} + {self.continuation} need {needed}; ask for at most "
                f"{self._n_windows} documents, or give a longer text"
            )

    @cached_property
    def _text(self) -> TextFile:
        return TextFile(self.text, self.subject.tokenizer)

    @cached_property
    def _ids(self) -> torch.Tensor:
        return torch.from_numpy(self._text.ids)

    @property
    def _bos(self) -> list[int]:
        bos = self.subject.tokenizer.bos_token_id
        return [] if bos is None else [bos]

    @property
    def _window(self) -> int:
        """Text tokens of one document, the begin-of-text token not counted."""
        return self.context + self.continuation - len(self._bos)

    @property
    def _n_windows(self) -> int:
        return len(self._ids) // self._window

    @cached_property
    def header(self) -> Header:
        configuration = {
            "text": self._text.digest,
            "context": self.context,
            "continuation": self.continuation,
            "documents": self.n_documents,
            "seed": self.seed,
            "arms": self.arms,
            "cache_dtype": self.cache_dtype,
            "fingerprint": self.subject.fingerprint,
        }
        found = provenance(self.subject.model)
        return header_of("perplexity", self.subject.name, self.seed, configuration, found)

    @property
    def documents(self) -> Sequence[str]:
        return [str(index) for index in range(self.n_documents)]

    def records(self, skip: Collection[str] = ()) -> Iterator[Record]:
        """One record per (document, arm)."""
        for index, document in enumerate(self.documents):
            if document in skip:
                continue
            arms = [arm.for_document(index) for arm in self.arms]
            for arm, outcome in measure(
                self.subject.model, self.case(index), arms, self.cache_dtype
            ):
                yield record_of(document, CellKey(self.context), arm, outcome)

    def case(self, index: int) -> Case:
        """One document: context without its last token, then that one and the continuation."""
        gap = (self._n_windows - 1) / max(1, self.n_documents - 1)
        start = int(index * gap) * self._window
        ids = torch.cat([torch.tensor(self._bos), self._ids[start : start + self._window]]).long()
        context, continuation = ids[: self.context - 1], ids[self.context - 1 :]
        return Case(context, continuation, (slice(1, len(continuation)),))
