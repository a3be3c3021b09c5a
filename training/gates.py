"""What a trained model must do before it may be frozen, measured on what it never saw."""

import math
import os
import platform
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import numpy as np
import torch

from kvprism.evaluate.arms import RAW, Arm
from kvprism.evaluate.haystack import encode
from kvprism.evaluate.measure import LoadedModel
from kvprism.evaluate.needle import Needle
from kvprism.evaluate.records import Task, collect
from kvprism.evaluate.rows import provenance
from kvprism.evaluate.ruler import SUBTASKS, Ruler
from kvprism.evaluate.tasks import KINDS
from training.kneser_ney import Trigram

WINDOW = 512
LENGTHS = (1024, 2048, 4096)
TRIALS = 19  # of 11 depths: 209 cases, as the gates ask for at least 200
KINDS_ABOVE = 0.80


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One measured figure of one model.

    n: cases, or tokens; low, high: 95 % Wilson interval of a share; gate: what the value must be
    at least, or at most where `lower_is_better`; null where it is only reported.
    """

    model: str
    seed: int
    name: str
    value: float
    n: int
    low: float | None = None
    high: float | None = None
    gate: float | None = None
    lower_is_better: bool = False
    commit: str
    versions: dict[str, str]
    machine: str
    date: str

    @property
    def held(self) -> bool | None:
        if self.gate is None:
            return None
        return self.value <= self.gate if self.lower_is_better else self.value >= self.gate


class Gates(msgspec.Struct, frozen=True, kw_only=True):
    """Least shares of cases right, most perplexity; null = only reported."""

    needle: dict[int, float] = {}
    distractors: dict[int, float] = {}
    unseen_wordings: float | None = None
    kinds: int = 0
    perplexity: float | None = None
    of_trigram: float | None = None


GATES = {
    "tiny": Gates(
        needle={1024: 0.97, 2048: 0.97, 4096: 0.97},
        distractors={1024: 0.75, 2048: 0.70},
        unseen_wordings=0.90,
        kinds=6,
        perplexity=28.0,
        of_trigram=0.92,
    ),
    "tiny-deep": Gates(kinds=5),
}


def perplexity(model: object, ids: np.ndarray, bos: int) -> float:
    """Per token of `ids`, int64 `[token]`, in windows of 512 without overlap, each after BOS."""
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(ids), WINDOW):
            window = torch.from_numpy(ids[start : start + WINDOW])
            inputs = torch.cat([torch.tensor([bos]), window[:-1]])
            logits = model(inputs[None]).logits[0]  # type: ignore[operator]
            total += float(torch.nn.functional.cross_entropy(logits, window, reduction="sum"))
    return math.exp(total / len(ids))


def wilson(right: float, n: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    z = 1.959964
    middle = (right + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(right * (1 - right) / n + z * z / (4 * n * n))
    return middle - half, middle + half


def measure(
    folder: Path, name: str, seed: int, train: str, valid: str, on_figure: Callable[[Figure], None]
) -> list[Figure]:
    """All figures of the checkpoint in `folder`, each passed on as it is found."""
    subject = LoadedModel.load(str(folder))
    found = provenance(subject.model)
    figures = []
    for figure in _figures(subject, GATES.get(name, Gates()), train, valid):
        figures.append(
            Figure(
                model=name,
                seed=seed,
                commit=found.commit,
                versions=found.versions,
                machine=f"{platform.machine()}, {os.cpu_count()} cores",
                date=datetime.now(UTC).date().isoformat(),
                **figure,
            )
        )
        on_figure(figures[-1])
    return figures


def _figures(
    subject: LoadedModel, gates: Gates, train: str, valid: str
) -> Iterator[dict[str, object]]:
    yield from _text_figures(subject, gates, train, valid)
    for distractors, least in ((0, gates.needle), (3, gates.distractors)):
        for length in LENGTHS:
            needle = Needle(
                subject, (Arm(RAW),), (length,), trials=TRIALS, distractors=(distractors,), seed=7
            )
            name = f"needle, {distractors} distractors, {length} tokens"
            yield _share(name, needle, least.get(length))
    for length in LENGTHS[:2]:
        above = 0
        for subtask in SUBTASKS:
            task = Ruler(subject, (Arm(RAW),), (length,), (subtask,), trials=TRIALS, seed=7)
            least = gates.unseen_wordings if subtask == "needle-unseen" and length == 2048 else None
            figure = _share(f"{subtask}, {length} tokens", task, least)
            above += subtask in KINDS and figure["value"] > KINDS_ABOVE
            yield figure
        yield {
            "name": f"task kinds above {KINDS_ABOVE:.0%}, {length} tokens",
            "value": above,
            "n": len(KINDS),
            "gate": gates.kinds,
        }


def _text_figures(
    subject: LoadedModel, gates: Gates, train: str, valid: str
) -> Iterator[dict[str, object]]:
    ids = encode(subject.tokenizer, valid)
    found = perplexity(subject.model, ids, subject.tokenizer.bos_token_id)
    shared = {"n": len(ids), "lower_is_better": True}
    yield {"name": "perplexity", "value": found, "gate": gates.perplexity, **shared}
    trigram = Trigram.fit(encode(subject.tokenizer, train), subject.model.config.vocab_size)
    counted = trigram.perplexity(ids)
    yield {"name": "perplexity of the trigram", "value": counted, **shared}
    name = "perplexity over the trigram's"
    yield {"name": name, "value": found / counted, "gate": gates.of_trigram, **shared}


def _share(name: str, task: Task, least: float | None) -> dict[str, object]:
    outcomes = [record.outcome for record in collect(task).records]
    right = float(np.mean([outcome.exact for outcome in outcomes if outcome is not None]))
    low, high = wilson(right, len(outcomes))
    return {
        "name": name,
        "value": right,
        "n": len(outcomes),
        "low": low,
        "high": high,
        "gate": least,
    }
