"""What a policy wins back: a ratio of sums over budgets, paired by document."""

import numpy as np
import pytest
from msgspec.structs import replace
from synthetic import Synthetic

from kvprism.errors import BadInput
from kvprism.evaluate.records import CellKey, Records, collect
from kvprism.evaluate.recovery import Recovery, recoveries

CELLS = tuple(CellKey(1024, None, name) for name in ("needle", "copying"))
BUDGETS = (0.3, 0.52)


@pytest.fixture(scope="module")
def suite() -> Records:
    return collect(Synthetic(task="ruler", cells=CELLS, n_documents=60))


def one(found: list[Recovery], metric: str, subtask: str) -> Recovery:
    [recovery] = [r for r in found if (r.metric, r.subtask) == (metric, subtask)]
    return recovery


def by_document(records: Records, subtask: str, policy: str, budget: float | None) -> np.ndarray:
    """NLL per target; every document has as many."""
    return np.array(
        [
            record.outcome.nll / record.outcome.targets
            for record in records.records
            if record.cell.subtask == subtask
            and record.arm[:2] == (policy, budget)
            and record.outcome is not None
        ]
    )


def test_it_is_the_ratio_of_sums_over_budgets_and_its_interval_the_bootstraps(
    suite: Records,
) -> None:
    found = one(recoveries(suite, "spectrum", ["sinks-recent"]), "answer_nll", "needle")
    ours, theirs = (
        [by_document(suite, "needle", policy, b) for b in BUDGETS]
        for policy in ("spectrum", "sinks-recent")
    )
    full = by_document(suite, "needle", "raw", None)
    won, lost = sum(ours) - sum(theirs), len(BUDGETS) * full - sum(theirs)
    assert found.value == pytest.approx(won.sum() / lost.sum())
    assert found.differences == pytest.approx(
        {str(b): (a - t).mean() for b, a, t in zip(BUDGETS, ours, theirs, strict=True)}
    )
    draws = np.random.default_rng(1).integers(len(full), size=(4000, len(full)))
    again = won[draws].sum(axis=1) / lost[draws].sum(axis=1)
    spread = np.ptp(np.quantile(again, [0.025, 0.975]))
    assert found.ci_low is not None and found.ci_high is not None and found.p is not None
    assert found.ci_high - found.ci_low == pytest.approx(spread, rel=0.1)
    assert found.ci_low < found.value < found.ci_high and found.p < 0.01
    assert (found.budgets, found.n) == (("0.3", "0.52"), 60)


def test_each_budget_may_have_a_policy_of_its_own(suite: Records) -> None:
    mix = "sinks-recent@0.3+random-tiers@0.52"
    mixed = one(recoveries(suite, "spectrum", [mix]), "answer_nll", "needle")
    ours, theirs = (
        [by_document(suite, "needle", policy, b) for policy, b in zip(names, BUDGETS, strict=True)]
        for names in (("spectrum", "spectrum"), ("sinks-recent", "random-tiers"))
    )
    full = by_document(suite, "needle", "raw", None)
    won, lost = sum(ours) - sum(theirs), len(BUDGETS) * full - sum(theirs)
    assert mixed.value == pytest.approx(won.sum() / lost.sum())
    assert mixed.versus == mix


def test_a_policy_wins_nothing_back_of_its_own_and_a_worse_one_loses_more(suite: Records) -> None:
    same = one(recoveries(suite, "sinks-recent", ["sinks-recent"]), "answer_nll", "average")
    assert (same.value, same.ci_low, same.ci_high) == (0, 0, 0) and same.p == 1
    worse = one(recoveries(suite, "sinks-recent", ["spectrum"]), "answer_nll", "average")
    assert worse.ci_high is not None and worse.ci_high < 0
    assert worse.n == 120


def test_where_raw_is_not_ahead_there_is_nothing_to_win_back(suite: Records) -> None:
    raw = {r.document: r.outcome for r in suite.records if r.arm.policy == "raw"}
    level = [replace(record, outcome=raw[record.document]) for record in suite.records]
    found = recoveries(Records(suite.header, level), "spectrum", ["random-tiers"])
    assert {(r.value, r.reason) for r in found} == {(None, "the full cache is not ahead of it")}


def test_an_infeasible_budget_gives_a_reason_and_no_figure() -> None:
    task = Synthetic(task="ruler", cells=CELLS[:1], n_documents=10, infeasible={3})
    found = recoveries(collect(task), "spectrum", ["random-tiers"])
    assert all(r.value is None and r.reason and "1 of 10 documents" in r.reason for r in found)


def test_policies_without_common_budgets_are_refused(suite: Records) -> None:
    with pytest.raises(BadInput, match="same budgets"):
        recoveries(suite, "spectrum", ["raw"])
    with pytest.raises(BadInput, match="'snapkv' was not measured"):
        recoveries(suite, "spectrum", ["snapkv"])
