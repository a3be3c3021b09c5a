"""From records to rows and comparisons."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, islice
from typing import Any

import msgspec
import numpy as np

from kvprism.errors import BadInput
from kvprism.evaluate.arms import RAW
from kvprism.evaluate.measure import Outcome
from kvprism.evaluate.records import ArmKey, CellKey, Header, Record, Records
from kvprism.evaluate.rows import Phase, Row
from kvprism.evaluate.stats import (
    Average,
    Change,
    Estimate,
    Quantile,
    Ratio,
    Statistic,
    Weights,
    bootstrap_weights,
    holm,
    paired_bootstrap,
)
from kvprism.policies import POLICIES
from kvprism.solve import ALL_NATIVE

FEWEST_CASES = 100
LOWEST_RAW_EXACT_MATCH = 0.9
AVERAGE = "average"


@dataclass(frozen=True)
class Metric:
    """A named figure of many outcomes, and how its change against a baseline is stated."""

    name: str
    change: Change
    statistic: Callable[[Sequence[Outcome]], Statistic]


def _ratio(
    numerator: Callable[[Outcome], float], denominator: Callable[[Outcome], float], **kind: Any
) -> Callable[[Sequence[Outcome]], Statistic]:
    def statistic(outcomes: Sequence[Outcome]) -> Ratio:
        above, below = ([part(o) for o in outcomes] for part in (numerator, denominator))
        return Ratio(np.array(above, np.float64), np.array(below, np.float64), **kind)

    return statistic


def _kl_p99(outcomes: Sequence[Outcome]) -> Quantile:
    return Quantile([np.array(outcome.kl) for outcome in outcomes], 0.99)


_EXACT_MATCH = Metric("exact_match", "difference", _ratio(lambda o: o.exact, lambda o: 1))
_KL_MEAN = Metric("kl_mean", "difference", _ratio(lambda o: sum(o.kl), lambda o: len(o.kl)))
_FLIPS = Metric(
    "top1_flips_per_1000",
    "difference",
    _ratio(lambda o: o.flips, lambda o: len(o.kl), factor=1000),
)
_SCORE = Metric("score", "difference", _ratio(lambda o: o.score or 0, lambda o: 1))
METRICS = {
    "perplexity": (
        Metric(
            "perplexity",
            "relative",
            _ratio(lambda o: o.nll, lambda o: o.targets, exponential=True),
        ),
        _KL_MEAN,
        Metric("kl_p99", "difference", _kl_p99),
        _FLIPS,
    ),
    "needle": (
        _EXACT_MATCH,
        Metric("digit_nll", "difference", _ratio(lambda o: o.nll, lambda o: o.targets)),
        _KL_MEAN,
    ),
    "ruler": (
        _EXACT_MATCH,
        Metric("answers_right", "difference", _ratio(lambda o: o.right / o.answers, lambda o: 1)),
        Metric("answer_nll", "difference", _ratio(lambda o: o.nll, lambda o: o.targets)),
        _KL_MEAN,
        _FLIPS,
    ),
    "longbench": (_SCORE, _KL_MEAN, _FLIPS),
}


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """One policy against another on the same documents: `delta` is policy against versus.

    delta: policy / versus - 1 for perplexity, else policy - versus; ci_*: 95 %, ci90_*: 90 %, for
    equivalence; p_holm: adjusted over all comparisons of this metric in one call. not_ranked: why
    the cell cannot rank; reason: why there is no figure.
    """

    task: str
    model: str
    metric: str
    policy: str
    budget: float | str | None
    versus: str
    versus_budget: float | str | None
    codec: str
    versus_codec: str
    importance: str
    length: int
    distractors: int | None
    n: int
    fraction: float | None = None
    versus_fraction: float | None = None
    delta: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    ci90_low: float | None = None
    ci90_high: float | None = None
    p: float | None = None
    p_holm: float | None = None
    not_ranked: str | None = None
    reason: str | None = None
    subtask: str | None = None
    query_aware: bool = False
    decode: str | None = None
    protection: str | None = None


@dataclass(frozen=True, eq=False)
class Cell:
    """All arms of one cell on the same documents, in the order of measurement.

    strata: documents of each part; a figure is the mean of its parts', which are resampled apart.
    """

    header: Header
    key: CellKey
    arms: dict[ArmKey, list[Record]]
    strata: tuple[int, ...]

    @property
    def n(self) -> int:
        return sum(self.strata)

    @property
    def weights(self) -> Weights:
        return _weights(self.strata, self.header.seed)

    @property
    def query_aware(self) -> bool:
        return bool(self.header.configuration.get("query_aware", False))

    def statistic(self, metric: Metric, outcomes: Sequence[Outcome]) -> Statistic:
        """A metric of this cell's outcomes."""
        left = iter(outcomes)
        return Average([metric.statistic(list(islice(left, n))) for n in self.strata])

    def outcomes(self, arm: ArmKey) -> list[Outcome] | None:
        """One outcome per document, or None when the arm was infeasible for some."""
        found = [record.outcome for record in self.arms[arm] if record.outcome is not None]
        return found if len(found) == self.n else None

    def reason(self, arm: ArmKey) -> str | None:
        """Why the arm has no figure, or None."""
        reasons = [record.reason for record in self.arms[arm] if record.reason is not None]
        return f"{len(reasons)} of {self.n} documents: {reasons[0]}" if reasons else None

    def baseline(self, arm: ArmKey) -> ArmKey:
        """The raw arm that keeps everything: with the same settings, or the run's own."""
        same = arm._replace(policy=RAW, budget=None, decode=None)
        whole = (a for a in self.arms if (a.policy, a.decode) == (RAW, None))
        return same if same in self.arms else next(whole)

    def not_ranked(self, raw: ArmKey) -> str | None:
        """Why a cell of questions ranks nothing: too few cases, or a task that raw itself fails."""
        outcomes, metrics = self.outcomes(raw), METRICS[self.header.task]
        if outcomes is None or not {_EXACT_MATCH, _SCORE} & set(metrics):
            return None
        if min(self.strata) < FEWEST_CASES:
            return f"n = {min(self.strata)} is below {FEWEST_CASES}"
        if _EXACT_MATCH not in metrics:
            return None
        exact = float(self.statistic(_EXACT_MATCH, outcomes)(np.ones((1, self.n)))[0])
        if exact < LOWEST_RAW_EXACT_MATCH:
            return f"raw exact match {exact:.3f} is below {LOWEST_RAW_EXACT_MATCH}"
        return None


@lru_cache(maxsize=4)
def _weights(strata: tuple[int, ...], seed: int) -> Weights:
    return np.hstack([bootstrap_weights(n, seed + i) for i, n in enumerate(strata)])


def cells_of(records: Records) -> list[Cell]:
    """Records by cell; only documents that every arm of the cell has measured.

    After a length's subtasks comes their average, where there are several.

    Raises:
        BadInput: no document is complete.
    """
    grouped: dict[CellKey, dict[ArmKey, dict[str, Record]]] = {}
    for record in records.records:
        grouped.setdefault(record.cell, {}).setdefault(record.arm, {})[record.document] = record
    cells = []
    for key, by_arm in grouped.items():
        complete = [
            d for d in next(iter(by_arm.values())) if all(d in by_arm[arm] for arm in by_arm)
        ]
        if complete:
            ordered = {arm: [found[d] for d in complete] for arm, found in by_arm.items()}
            cells.append(Cell(records.header, key, ordered, (len(complete),)))
    if not cells:
        raise BadInput("no document has been measured under every arm yet")
    by_length = [list(same) for _, same in groupby(cells, lambda cell: cell.key.length)]
    return [cell for same in by_length for cell in [*same, *_average(same)]]


def _average(cells: Sequence[Cell]) -> Iterator[Cell]:
    """All subtasks of a length as one cell, in which each of them counts the same."""
    first = cells[0]
    if first.key.subtask is not None and len(cells) > 1:
        arms = {arm: [record for cell in cells for record in cell.arms[arm]] for arm in first.arms}
        key = first.key._replace(subtask=AVERAGE)
        yield Cell(first.header, key, arms, tuple(cell.n for cell in cells))


def rows_of(records: Records) -> list[Row]:
    """One row per cell, arm and metric; figures of infeasible arms are null, with the reason."""
    return [
        _row(cell, arm, metric)
        for cell in cells_of(records)
        for arm in cell.arms
        for metric in METRICS[cell.header.task]
    ]


def _row(cell: Cell, arm: ArmKey, metric: Metric) -> Row:
    header = cell.header
    estimate = _estimate(cell, arm, cell.baseline(arm), metric)
    low, high = (None, None) if estimate is None else estimate.ci
    return Row(
        task=header.task,
        model=header.model,
        policy=arm.policy,
        budget=arm.budget,
        metric=metric.name,
        value=None if estimate is None else estimate.value,
        baseline=None if estimate is None else estimate.baseline,
        delta=None if estimate is None else estimate.delta,
        ci_low=low,
        ci_high=high,
        n=cell.n,
        **_sizes(cell.outcomes(arm)),
        length=cell.key.length,
        distractors=cell.key.distractors,
        seed=header.seed,
        commit=header.provenance.commit,
        versions=header.provenance.versions,
        codec=arm.codec,
        importance=arm.importance,
        fixed_rate=arm.budget is None,
        reason=cell.reason(arm),
        subtask=cell.key.subtask,
        query_aware=cell.query_aware,
        phase=_phase(arm),
        decode=arm.decode,
        protection=arm.protection,
    )


def _phase(arm: ArmKey) -> Phase:
    prefill = POLICIES[arm.policy].family != ALL_NATIVE
    if arm.decode is None:
        return "prefill" if prefill else "none"
    return "both" if prefill else "decode"


def _estimate(cell: Cell, arm: ArmKey, baseline: ArmKey, metric: Metric) -> Estimate | None:
    value, reference = cell.outcomes(arm), cell.outcomes(baseline)
    if value is None or reference is None:
        return None
    return paired_bootstrap(
        cell.statistic(metric, value),
        cell.statistic(metric, reference),
        metric.change,
        cell.weights,
    )


def _sizes(outcomes: list[Outcome] | None) -> dict[str, Any]:
    """The row's byte fields: means per document, and fractions of the sums."""
    names = ("wire_bytes", "reference_bytes", "native_bytes", "resident_bytes")
    if outcomes is None:
        fields = (*names, "fraction", "fraction_native", "wire_only")
        return {name: None for name in fields if name != "native_bytes"}
    total = {name: sum(getattr(outcome, name) for outcome in outcomes) for name in names}
    native = total.pop("native_bytes")
    return {
        **{name: round(nbytes / len(outcomes)) for name, nbytes in total.items()},
        "fraction": total["wire_bytes"] / total["reference_bytes"],
        "fraction_native": total["wire_bytes"] / native,
        "wire_only": total["resident_bytes"] >= native,
    }


def compare(records: Records, policy: str, versus: Sequence[str]) -> list[Comparison]:
    """Paired differences of `policy` and each of `versus`, for every cell, budget and metric.

    policy, versus: names, each with `:codec` behind it if the arm's code is not that of the run.
    Two budgeted policies meet at equal budgets; a fixed-rate one, at its own bytes, meets every
    budget of the other.

    Raises:
        BadInput: a policy that was not measured, or no complete document.
    """
    cells = cells_of(records)
    check_measured(cells, [policy, *versus])
    found = [
        _comparison(cell, arm, other, metric)
        for metric in METRICS[records.header.task]
        for cell in cells
        for name in versus
        for arm, other in pairs(cell, policy, name)
    ]
    return _adjusted(found)


def check_measured(cells: Sequence[Cell], policies: Sequence[str]) -> None:
    """`BadInput` for a policy that no cell has, with those that there are."""
    arms = [arm for cell in cells for arm in cell.arms]
    own = next(arm.codec for arm in arms if arm.policy == RAW)
    measured = dict.fromkeys(
        arm.policy if arm.codec == own else f"{arm.policy}:{arm.codec}" for arm in arms
    )
    for policy in policies:
        if not any(_named(cell, policy) for cell in cells):
            raise BadInput(f"policy {policy!r} was not measured; measured: {', '.join(measured)}")


def _named(cell: Cell, name: str) -> list[ArmKey]:
    """The arms of `policy`, in the run's own code, or of `policy:codec`."""
    policy, _, codec = name.partition(":")
    codec = codec or next(arm.codec for arm in cell.arms if arm.policy == RAW)
    return [arm for arm in cell.arms if (arm.policy, arm.codec) == (policy, codec)]


def pairs(cell: Cell, policy: str, versus: str) -> list[tuple[ArmKey, ArmKey]]:
    """Arms of the two that differ in nothing else; a fixed-rate one meets every budget."""
    return [
        (arm, other)
        for arm in _named(cell, policy)
        for other in _named(cell, versus)
        if arm[3:] == other[3:]  # importance, decode phase and protection
        and (arm.budget == other.budget or None in (arm.budget, other.budget))
    ]


def _comparison(cell: Cell, arm: ArmKey, other: ArmKey, metric: Metric) -> Comparison:
    estimate = _estimate(cell, arm, other, metric)
    figures = {}
    if estimate is not None:
        figures = {
            "delta": estimate.delta,
            "ci_low": estimate.ci[0],
            "ci_high": estimate.ci[1],
            "ci90_low": estimate.ci90[0],
            "ci90_high": estimate.ci90[1],
            "p": estimate.p,
        }
    return Comparison(
        task=cell.header.task,
        model=cell.header.model,
        metric=metric.name,
        policy=arm.policy,
        budget=arm.budget,
        versus=other.policy,
        versus_budget=other.budget,
        codec=arm.codec,
        versus_codec=other.codec,
        importance=arm.importance,
        length=cell.key.length,
        distractors=cell.key.distractors,
        n=cell.n,
        fraction=_sizes(cell.outcomes(arm))["fraction"],
        versus_fraction=_sizes(cell.outcomes(other))["fraction"],
        not_ranked=cell.not_ranked(cell.baseline(arm)),
        reason=cell.reason(arm) or cell.reason(other),
        subtask=cell.key.subtask,
        query_aware=cell.query_aware,
        decode=arm.decode,
        protection=arm.protection,
        **figures,
    )


def _adjusted(comparisons: list[Comparison]) -> list[Comparison]:
    """The same with `p_holm`; one family per metric, which is one table."""
    adjusted: dict[int, float] = {}
    for metric in {comparison.metric for comparison in comparisons}:
        family = {
            i: comparison.p
            for i, comparison in enumerate(comparisons)
            if comparison.metric == metric and comparison.p is not None
        }
        adjusted |= dict(zip(family, holm(list(family.values())), strict=True))
    return [
        msgspec.structs.replace(comparison, p_holm=adjusted.get(i))
        for i, comparison in enumerate(comparisons)
    ]
