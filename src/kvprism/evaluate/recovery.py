"""How much of what one policy loses against the full cache another wins back, over all budgets.

The other one may be a policy for each budget, as calibration chose them: `cake@512tok+tova@128tok`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from kvprism.errors import BadInput
from kvprism.evaluate.measure import Outcome
from kvprism.evaluate.records import ArmKey, Records
from kvprism.evaluate.stats import Floats, Statistic, Weights, paired_bootstrap
from kvprism.evaluate.summary import METRICS, Cell, Metric, cells_of, check_measured, pairs

# Means over documents, of which raw has the best: a share of the way there can be stated.
RECOVERED = ("exact_match", "answers_right", "score", "answer_nll")


class Recovery(msgspec.Struct, frozen=True, kw_only=True):
    """What `policy` wins back of what `versus` loses, over the budgets at which both were measured.

    value: sum of (policy - versus) / sum of (raw - versus), both over budgets; ci_*: 95 %, paired
    by document; p: two-sided, that it is 0; differences: budget -> policy - versus. reason: why
    there is no figure.
    """

    task: str
    model: str
    metric: str
    policy: str
    versus: str
    length: int
    distractors: int | None
    subtask: str | None
    query_aware: bool
    n: int
    budgets: tuple[str, ...]
    value: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    p: float | None = None
    differences: dict[str, float] = {}
    reason: str | None = None
    protection: str | None = None


@dataclass(frozen=True, eq=False)
class Recovered:
    """The statistic; ours, theirs: one figure a budget, in the same order; full: the raw cache's.

    Where the full cache is not ahead in a resample, nothing can be won back, and it counts as 0.
    """

    ours: Sequence[Statistic]
    theirs: Sequence[Statistic]
    full: Statistic

    @property
    def n_documents(self) -> int:
        return self.full.n_documents

    def __call__(self, weights: Weights) -> Floats:
        theirs = [figure(weights) for figure in self.theirs]
        won = sum(a(weights) - b for a, b in zip(self.ours, theirs, strict=True))
        lost = sum(self.full(weights) - b for b in theirs)
        return np.divide(won, lost, out=np.zeros(len(weights)), where=np.asarray(lost) != 0)


@dataclass(frozen=True, eq=False)
class _Nothing:
    n_documents: int

    def __call__(self, weights: Weights) -> Floats:
        return np.zeros(len(weights))


def recoveries(records: Records, policy: str, versus: Sequence[str]) -> list[Recovery]:
    """One for every metric of `RECOVERED`, cell and one of `versus`; names as in `compare`.

    Raises:
        BadInput: a policy that was not measured or has no budgets, or no complete document.
    """
    cells = cells_of(records)
    check_measured(cells, [policy, *(name for each in versus for name, _ in _parts(each))])
    found = [
        _recovery(cell, metric, name, group)
        for metric in METRICS[records.header.task]
        if metric.name in RECOVERED
        for cell in cells
        for name in versus
        for group in _groups(cell, policy, name)
    ]
    if not found:
        raise BadInput(
            f"{policy!r} and {list(versus)} were not measured at the same budgets in a task with "
            f"one of {list(RECOVERED)}"
        )
    return found


def _parts(versus: str) -> list[tuple[str, str | None]]:
    """Policies, each with the budget that it is for, or None for all."""
    named = [part.partition("@") for part in versus.split("+")]
    return [(policy, budget or None) for policy, _, budget in named]


def _groups(cell: Cell, policy: str, versus: str) -> Iterator[list[tuple[ArmKey, ArmKey]]]:
    """Pairs at equal budgets, those of one setting together."""
    grouped: dict[tuple[object, ...], list[tuple[ArmKey, ArmKey]]] = {}
    for name, budget in _parts(versus):
        for arm, other in pairs(cell, policy, name):
            both = arm.budget is not None and other.budget is not None
            if both and budget in (None, str(arm.budget)):
                grouped.setdefault(arm[2:], []).append((arm, other))
    yield from grouped.values()


def _recovery(
    cell: Cell, metric: Metric, versus: str, pairs: Sequence[tuple[ArmKey, ArmKey]]
) -> Recovery:
    found = Recovery(
        task=cell.header.task,
        model=cell.header.model,
        metric=metric.name,
        policy=pairs[0][0].policy,
        versus=versus,
        length=cell.key.length,
        distractors=cell.key.distractors,
        subtask=cell.key.subtask,
        query_aware=cell.query_aware,
        n=cell.n,
        budgets=tuple(str(arm.budget) for arm, _ in pairs),
        protection=pairs[0][0].protection,
    )
    full = cell.outcomes(cell.baseline(pairs[0][0]))
    ours, theirs = ([cell.outcomes(pair[side]) for pair in pairs] for side in (0, 1))
    reasons = [cell.reason(arm) for pair in pairs for arm in pair]
    if full is None or any(each is None for each in (*ours, *theirs)):
        return msgspec.structs.replace(found, reason=next(filter(None, reasons), None))
    return _estimated(found, cell, metric, full, ours, theirs)  # type: ignore[arg-type]


def _estimated(
    found: Recovery,
    cell: Cell,
    metric: Metric,
    full: Sequence[Outcome],
    ours: Sequence[Sequence[Outcome]],
    theirs: Sequence[Sequence[Outcome]],
) -> Recovery:
    statistic = Recovered(
        [cell.statistic(metric, each) for each in ours],
        [cell.statistic(metric, each) for each in theirs],
        cell.statistic(metric, full),
    )
    once = np.ones((1, cell.n))
    deltas = [
        float(a(once)[0] - b(once)[0])
        for a, b in zip(statistic.ours, statistic.theirs, strict=True)
    ]
    found = msgspec.structs.replace(
        found, differences=dict(zip(found.budgets, deltas, strict=True))
    )
    lost = sum(float(statistic.full(once)[0] - b(once)[0]) for b in statistic.theirs)
    if lost == 0 or (lost < 0) != (metric.name == "answer_nll"):
        return msgspec.structs.replace(found, reason="the full cache is not ahead of it")
    estimate = paired_bootstrap(statistic, _Nothing(cell.n), "difference", cell.weights)
    return msgspec.structs.replace(
        found, value=estimate.value, ci_low=estimate.ci[0], ci_high=estimate.ci[1], p=estimate.p
    )
