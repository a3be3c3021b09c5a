"""Paired bootstrap over documents, Holm's adjustment and equivalence. numpy only.

Documents are the independent unit: tokens of one document are not. A resample draws as many
documents as there are, with replacement, which is one multinomial weight per document; the same
weights go to both arms, so that what a document does to both cancels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from kvprism.errors import BadInput

Floats = NDArray[np.float64]
Weights = Floats
Change = Literal["relative", "difference"]

RESAMPLES = 10_000
BLOCK_CELLS = 4_000_000


class Statistic(Protocol):
    """A figure of a weighted sample of documents."""

    @property
    def n_documents(self) -> int: ...

    def __call__(self, weights: Weights) -> Floats:
        """weights: `[resample, document]` counts -> the figure of every resample."""
        ...


@dataclass(frozen=True, eq=False)
class Ratio:
    """sum(numerator) / sum(denominator) over documents, times `factor`; `exponential`: exp of that.

    Pooled means (denominator = tokens or cases) and perplexity (NLL over tokens, exponential).
    """

    numerator: Floats
    denominator: Floats
    factor: float = 1.0
    exponential: bool = False

    @property
    def n_documents(self) -> int:
        return len(self.numerator)

    def __call__(self, weights: Weights) -> Floats:
        ratio = (weights @ self.numerator) / (weights @ self.denominator) * self.factor
        return np.asarray(np.exp(ratio) if self.exponential else ratio, np.float64)


@dataclass(frozen=True, eq=False)
class Average:
    """The mean of figures over samples of their own, whose documents stand one after the other."""

    parts: Sequence[Statistic]

    @property
    def n_documents(self) -> int:
        return sum(part.n_documents for part in self.parts)

    def __call__(self, weights: Weights) -> Floats:
        stops = np.cumsum([part.n_documents for part in self.parts])[:-1]
        own = np.split(weights, stops, axis=1)
        figures = [part(weight) for part, weight in zip(self.parts, own, strict=True)]
        return np.asarray(np.mean(figures, axis=0), np.float64)


@dataclass(frozen=True, eq=False)
class Quantile:
    """The `q` quantile of all documents' values pooled: the smallest value that q of them reach."""

    values: Sequence[Floats]
    q: float

    @property
    def n_documents(self) -> int:
        return len(self.values)

    def __call__(self, weights: Weights) -> Floats:
        """Counts from the top until more than 1 - q of the weight is passed; one sort for all."""
        pooled = np.concatenate([np.asarray(value, np.float64) for value in self.values])
        lengths = np.array([len(value) for value in self.values])
        owner = np.repeat(np.arange(len(lengths)), lengths)
        descending = np.argsort(-pooled, kind="stable")
        # Values strictly above the quantile weigh at most (1 - q) of the total; the slack keeps a
        # product such as 0.01 * 100 from falling to either side of the integer that it means.
        allowed = (1 - self.q) * (weights @ lengths) + 1e-9
        at = np.zeros(len(weights), np.intp)
        above = np.zeros(len(weights))
        for block in _blocks(len(pooled), max(1, BLOCK_CELLS // len(weights))):
            running = above[:, None] + weights[:, owner[descending[block]]].cumsum(axis=1)
            at += (running <= allowed[:, None]).sum(axis=1)
            above = running[:, -1]
            if (above > allowed).all():
                break
        return np.asarray(pooled[descending[at]], np.float64)


def _blocks(n: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, n, size)]


class Estimate(NamedTuple):
    """A figure, its baseline, and the change between them with its paired intervals.

    delta: value / baseline - 1 or value - baseline; ci: 95 %; ci90: for equivalence; p: two-sided,
    from the resamples that fall on the other side of zero.
    """

    value: float
    baseline: float
    delta: float
    ci: tuple[float, float]
    ci90: tuple[float, float]
    p: float


def bootstrap_weights(n_documents: int, seed: int, resamples: int = RESAMPLES) -> Weights:
    """`[resample, document]` multinomial counts; each row sums to `n_documents`."""
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(n_documents, np.full(n_documents, 1 / n_documents), size=resamples)
    return counts.astype(np.float64)


def paired_bootstrap(
    value: Statistic, baseline: Statistic, change: Change, weights: Weights
) -> Estimate:
    """The change from `baseline` to `value` over the same documents, with percentile intervals.

    Raises:
        BadInput: the two are not over the same number of documents, or a figure is not finite.
    """
    n = weights.shape[1]
    if not n == value.n_documents == baseline.n_documents:
        raise BadInput(
            f"a paired comparison needs the same documents: {value.n_documents} against "
            f"{baseline.n_documents}, resampled for {n}"
        )
    once = np.ones((1, n))
    point, reference = value(once), baseline(once)
    if not np.isfinite([point, reference]).all():
        raise BadInput(f"a figure is not finite: {point[0]} against a baseline of {reference[0]}")
    deltas = _change(value(weights), baseline(weights), change)
    low, low90, high90, high = np.quantile(deltas, [0.025, 0.05, 0.95, 0.975]).tolist()
    delta = float(_change(point, reference, change)[0])
    return Estimate(
        float(point[0]), float(reference[0]), delta, (low, high), (low90, high90), _p_value(deltas)
    )


def _change(value: Floats, baseline: Floats, change: Change) -> Floats:
    return value / baseline - 1 if change == "relative" else value - baseline


def _p_value(deltas: Floats) -> float:
    """Two-sided; plus one, because no finite number of resamples proves a probability of zero."""
    crossing = min(int((deltas <= 0).sum()), int((deltas >= 0).sum()))
    return min(1.0, 2 * (crossing + 1) / (len(deltas) + 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment over one family of tests, in the order given."""
    order = np.argsort(p_values, kind="stable")
    adjusted = np.empty(len(p_values))
    running = 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return [float(p) for p in adjusted]


def equivalent(ci90: tuple[float, float], margin: float) -> bool:
    """TOST at 5 %: the 90 % interval of the difference lies inside (-margin, margin)."""
    return -margin < ci90[0] and ci90[1] < margin
