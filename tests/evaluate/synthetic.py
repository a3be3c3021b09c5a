"""A task whose outcomes are formulas: what is tested with it is what happens to records."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from kvprism.errors import BudgetTooSmall
from kvprism.evaluate.arms import Arm, arms_of
from kvprism.evaluate.measure import Outcome
from kvprism.evaluate.records import CellKey, Header, Record, header_of, record_of
from kvprism.evaluate.rows import Provenance

ARMS = arms_of(["int4", "spectrum", "random-tiers", "sinks-recent"], ["0.3", "0.52"])
KL = {"raw": 0.0, "int4": 2e-3, "spectrum": 1e-3, "random-tiers": 1.1e-3, "sinks-recent": 5e-2}


class Interrupted(Exception):
    """Stands for a machine that goes away."""


@dataclass(frozen=True, eq=False)
class Synthetic:
    """`spectrum` at 0.3 fits no document whose number is in `infeasible`."""

    task: str = "perplexity"
    n_documents: int = 40
    arms: Sequence[Arm] = ARMS
    seed: int = 0
    cells: Sequence[CellKey] = (CellKey(1536),)
    infeasible: Collection[int] = ()
    commit: str = "unknown"
    raw_exact: float = 1.0
    query_aware: bool = False
    stop_after: int | None = None
    measured: list[str] = field(default_factory=list)

    @cached_property
    def header(self) -> Header:
        configuration = {
            "arms": self.arms,
            "documents": self.n_documents,
            "cells": self.cells,
            "query_aware": self.query_aware,
        }
        found = Provenance(self.commit, {"python": "3"})
        return header_of(self.task, "tiny", self.seed, configuration, found)

    @property
    def documents(self) -> Sequence[str]:
        return [f"{cell}/{i}" for cell in self.cells for i in range(self.n_documents)]

    def records(self, skip: Collection[str] = ()) -> Iterator[Record]:
        for cell in self.cells:
            for index in range(self.n_documents):
                document = f"{cell}/{index}"
                if document in skip:
                    continue
                self.measured.append(document)
                for arm in self.arms:
                    if self.stop_after is not None and len(self.measured) > self.stop_after:
                        raise Interrupted
                    yield record_of(document, cell, arm, self.found(index, arm))

    def found(self, index: int, arm: Arm) -> Outcome | BudgetTooSmall:
        if index in self.infeasible and (arm.policy, arm.budget) == ("spectrum", 0.3):
            return BudgetTooSmall("spectrum", 400, 300, 1000)
        rng = np.random.default_rng(index)
        hardness = rng.uniform(0.5, 2)
        kl = hardness * KL[arm.policy] / (arm.budget or 0.25) ** 2  # type: ignore[operator]
        wire = int(1000 * (1.0 if arm.policy == "raw" else float(arm.budget or 0.26)))
        drops = arm.policy == "sinks-recent"
        return Outcome(
            wire_bytes=wire,
            reference_bytes=1000,
            native_bytes=1000,
            resident_bytes=wire if drops else 1000,
            nll=300.0 * hardness + 100 * kl,
            targets=100,
            answers=4,
            right=1 if drops else 4 if rng.random() < self.raw_exact else 3,
            kl=tuple((kl * rng.uniform(0.5, 1.5, 20)).tolist()),
            flips=int(kl * 100),
        )
