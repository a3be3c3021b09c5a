"""From records to rows and comparisons: conventions of deltas, pairs, families and gaps."""

import math

import pytest
from msgspec.structs import replace
from synthetic import ARMS, KL, Synthetic

from kvprism.errors import BadInput
from kvprism.evaluate.arms import arms_of
from kvprism.evaluate.records import CellKey, Record, Records, collect
from kvprism.evaluate.rows import Row
from kvprism.evaluate.stats import holm
from kvprism.evaluate.summary import Comparison, compare, rows_of

NEEDLE_CELLS = (CellKey(1024, 0), CellKey(2048, 3))
RULER_CELLS = tuple(CellKey(1024, None, name) for name in ("needle", "copying"))


@pytest.fixture(scope="module")
def records() -> Records:
    return collect(Synthetic())


@pytest.fixture(scope="module")
def rows(records: Records) -> list[Row]:
    return rows_of(records)


def one(rows: list[Row], policy: str, metric: str, budget: float | None = None) -> Row:
    [row] = [r for r in rows if (r.policy, r.metric, r.budget) == (policy, metric, budget)]
    return row


def test_one_row_per_arm_and_metric(rows: list[Row]) -> None:
    metrics = ["perplexity", "kl_mean", "kl_p99", "top1_flips_per_1000"]
    assert [(r.policy, r.budget, r.metric) for r in rows] == [
        (arm.policy, arm.budget, metric) for arm in ARMS for metric in metrics
    ]


def test_needle_cells_have_rows_of_their_own() -> None:
    rows = rows_of(collect(Synthetic(task="needle", cells=NEEDLE_CELLS, n_documents=10)))
    assert {CellKey(r.length, r.distractors) for r in rows} == set(NEEDLE_CELLS)
    assert {r.metric for r in rows} == {"exact_match", "digit_nll", "kl_mean"}
    assert len(rows) == 2 * len(ARMS) * 3


@pytest.fixture(scope="module")
def suite() -> Records:
    """The second subtask is the harder one: of its NLL every arm has twice as much."""
    found = collect(Synthetic(task="ruler", cells=RULER_CELLS, raw_exact=0.5))
    return Records(found.header, [harder(record) for record in found.records])


def harder(record: Record) -> Record:
    if record.cell.subtask != "copying" or record.outcome is None:
        return record
    outcome = replace(record.outcome, nll=2 * record.outcome.nll)
    return replace(record, outcome=outcome)


def test_subtasks_have_rows_of_their_own_and_an_average(suite: Records) -> None:
    rows = rows_of(suite)
    metrics = ["exact_match", "answers_right", "answer_nll", "kl_mean", "top1_flips_per_1000"]
    assert [(r.subtask, r.policy, r.budget, r.metric) for r in rows] == [
        (subtask, arm.policy, arm.budget, metric)
        for subtask in ("needle", "copying", "average")
        for arm in ARMS
        for metric in metrics
    ]
    assert [row.n for row in rows if row.metric == "kl_mean"] == [
        *[40] * (2 * len(ARMS)),
        *[80] * len(ARMS),
    ]


def test_the_average_counts_every_subtask_the_same(suite: Records) -> None:
    cut = Records(suite.header, [r for r in suite.records if not thinned(r)])
    first, second, average = (
        r for r in rows_of(cut) if (r.policy, r.metric) == ("int4", "answer_nll")
    )
    assert (first.n, second.n, average.n) == (40, 10, 50)
    assert first.value and second.value and average.value
    assert average.value == pytest.approx((first.value + second.value) / 2)
    assert first.ci_low and first.ci_high and average.ci_low and average.ci_high


def thinned(record: Record) -> bool:
    return record.cell.subtask == "copying" and int(record.document.rsplit("/")[-1]) >= 10


def test_the_average_resamples_each_subtask_apart(suite: Records) -> None:
    """Its variance is that of a mean of independent figures."""
    first, second, average = (
        r for r in rows_of(suite) if (r.policy, r.metric) == ("int4", "kl_mean")
    )
    widths = [row.ci_high - row.ci_low for row in (first, second, average)]  # type: ignore[operator]
    assert widths[2] == pytest.approx(math.hypot(*widths[:2]) / 2, rel=0.05)


def test_one_subtask_has_no_average() -> None:
    rows = rows_of(collect(Synthetic(task="ruler", cells=RULER_CELLS[:1], n_documents=3)))
    assert {row.subtask for row in rows} == {"needle"}


def test_a_partly_right_answer_counts_in_part(suite: Records) -> None:
    rows = {(r.subtask, r.policy, r.metric): r for r in rows_of(suite)}
    exact, right = (rows["needle", "int4", m].value for m in ("exact_match", "answers_right"))
    assert exact is not None and right is not None
    assert right == pytest.approx(exact + (1 - exact) * 3 / 4)
    assert rows["needle", "sinks-recent", "answers_right"].value == 1 / 4


def test_a_known_question_is_said_in_rows_and_comparisons() -> None:
    for known in (False, True):
        task = Synthetic(task="ruler", cells=RULER_CELLS, n_documents=3, query_aware=known)
        found = collect(task)
        assert {row.query_aware for row in rows_of(found)} == {known}
        comparisons = compare(found, "spectrum", ["int4"])
        assert {c.query_aware for c in comparisons} == {known}
        assert {c.subtask for c in comparisons} == {"needle", "copying", "average"}


def test_the_average_ranks_by_its_smallest_part_and_its_own_exact_match(suite: Records) -> None:
    for n, raw_exact, why in [(120, 1.0, None), (60, 1.0, "n = 60"), (120, 0.8, "raw exact")]:
        task = Synthetic(
            task="ruler", cells=RULER_CELLS, n_documents=n, raw_exact=raw_exact, arms=ARMS[:2]
        )
        for comparison in compare(collect(task), "int4", ["raw"]):
            assert (comparison.not_ranked or "").startswith(why or "")
            assert (comparison.not_ranked is None) == (why is None)


def test_raw_is_its_own_baseline(rows: list[Row]) -> None:
    for row in rows:
        if row.policy == "raw":
            assert (row.delta, row.ci_low, row.ci_high) == (0.0, 0.0, 0.0)


def test_arms_in_other_codes_have_the_runs_raw_arm_as_their_baseline(rows: list[Row]) -> None:
    mixed = rows_of(collect(Synthetic(arms=arms_of(["spectrum:hadamard"], ["0.3"]))))
    got, same = one(mixed, "spectrum", "kl_mean", 0.3), one(rows, "spectrum", "kl_mean", 0.3)
    assert got.codec == "hadamard" and same.codec == "nested"
    assert (got.baseline, got.delta, got.ci_low) == (same.baseline, same.delta, same.ci_low)


def test_perplexity_deltas_are_relative_and_the_others_are_not(rows: list[Row]) -> None:
    perplexity, kl = one(rows, "int4", "perplexity"), one(rows, "int4", "kl_mean")
    assert perplexity.value and perplexity.baseline and kl.value
    assert perplexity.delta == pytest.approx(perplexity.value / perplexity.baseline - 1)
    assert kl.delta == kl.value
    assert kl.baseline == 0


def test_figures_are_pooled_over_documents(records: Records, rows: list[Row]) -> None:
    found = [
        r.outcome for r in records.records if r.arm[:2] == ("int4", None) and r.outcome is not None
    ]
    nll, targets = sum(o.nll for o in found), sum(o.targets for o in found)
    assert one(rows, "int4", "perplexity").value == pytest.approx(math.exp(nll / targets))
    kl = [value for o in found for value in o.kl]
    assert one(rows, "int4", "kl_mean").value == pytest.approx(sum(kl) / len(kl))
    assert one(rows, "int4", "kl_p99").value == sorted(kl)[math.ceil(0.99 * len(kl)) - 1]
    flips = one(rows, "int4", "top1_flips_per_1000").value
    assert flips == pytest.approx(1000 * sum(o.flips for o in found) / len(kl))


def test_bytes_are_those_of_the_outcomes(rows: list[Row]) -> None:
    row = one(rows, "sinks-recent", "kl_mean", 0.52)
    assert (row.wire_bytes, row.reference_bytes, row.resident_bytes) == (520, 1000, 520)
    assert row.fraction == row.fraction_native == 0.52


def test_rows_say_which_arms_free_memory_and_which_ignore_budgets(rows: list[Row]) -> None:
    assert not one(rows, "sinks-recent", "kl_mean", 0.3).wire_only
    assert one(rows, "spectrum", "kl_mean", 0.3).wire_only
    assert one(rows, "int4", "kl_mean").fixed_rate
    assert not one(rows, "spectrum", "kl_mean", 0.3).fixed_rate


def test_an_infeasible_budget_has_no_value_but_a_reason() -> None:
    rows = rows_of(collect(Synthetic(infeasible={4, 7})))
    row = one(rows, "spectrum", "kl_mean", 0.3)
    gaps = (row.value, row.delta, row.ci_low, row.ci_high, row.wire_bytes, row.fraction)
    assert gaps == (None,) * 6
    assert row.reason is not None
    assert row.reason.startswith("2 of 40 documents: budget too small for policy 'spectrum'")
    assert one(rows, "spectrum", "kl_mean", 0.52).reason is None


def test_documents_without_every_arm_do_not_count(records: Records) -> None:
    cut = Records(records.header, records.records[: 10 * len(ARMS) + 3])
    assert {row.n for row in rows_of(cut)} == {10}
    with pytest.raises(BadInput, match="no document"):
        rows_of(Records(records.header, []))


def found(comparisons: list[Comparison], metric: str) -> list[tuple[object, ...]]:
    return [(c.versus, c.budget, c.versus_budget) for c in comparisons if c.metric == metric]


def test_budgeted_policies_meet_at_equal_budgets_and_fixed_ones_at_all(records: Records) -> None:
    assert found(compare(records, "spectrum", ["random-tiers", "int4"]), "kl_mean") == [
        ("random-tiers", 0.3, 0.3),
        ("random-tiers", 0.52, 0.52),
        ("int4", 0.3, None),
        ("int4", 0.52, None),
    ]
    assert found(compare(records, "int4", ["spectrum", "raw"]), "kl_mean") == [
        ("spectrum", None, 0.3),
        ("spectrum", None, 0.52),
        ("raw", None, None),
    ]


def test_a_comparison_is_the_paired_difference(records: Records, rows: list[Row]) -> None:
    comparison = next(
        c for c in compare(records, "spectrum", ["random-tiers"]) if c.metric == "kl_mean"
    )
    a, b = (one(rows, policy, "kl_mean", 0.3) for policy in ("spectrum", "random-tiers"))
    assert a.value and b.value and a.ci_high and b.ci_low and comparison.ci_high is not None
    assert comparison.delta == pytest.approx(a.value - b.value)
    # The separate intervals overlap, because documents differ; the paired one excludes zero.
    assert a.ci_high > b.ci_low
    assert comparison.ci_high < 0
    assert comparison.fraction == comparison.versus_fraction == 0.3


def test_perplexities_are_compared_as_a_ratio(records: Records, rows: list[Row]) -> None:
    comparison = next(
        c for c in compare(records, "sinks-recent", ["int4"]) if c.metric == "perplexity"
    )
    a, b = one(rows, "sinks-recent", "perplexity", 0.3), one(rows, "int4", "perplexity")
    assert a.value and b.value
    assert comparison.delta == pytest.approx(a.value / b.value - 1)


def test_holm_is_over_one_metric_of_the_table(records: Records) -> None:
    comparisons = compare(records, "spectrum", ["random-tiers", "int4", "sinks-recent", "raw"])
    for metric in ("perplexity", "kl_mean", "kl_p99", "top1_flips_per_1000"):
        family = [c for c in comparisons if c.metric == metric]
        assert len(family) == 8
        p_values = [c.p for c in family if c.p is not None]
        assert [c.p_holm for c in family] == holm(p_values)


def test_an_infeasible_arm_has_no_comparison_but_a_reason() -> None:
    comparisons = compare(collect(Synthetic(infeasible={0})), "spectrum", ["int4"])
    at_30 = [c for c in comparisons if c.budget == 0.3]
    assert {(c.delta, c.p_holm) for c in at_30} == {(None, None)}
    assert all(c.reason and "1 of 40" in c.reason for c in at_30)
    assert all(c.delta is not None for c in comparisons if c.budget == 0.52)


@pytest.mark.parametrize(
    "n_documents, raw_exact, why",
    [(120, 1.0, None), (99, 1.0, "n = 99 is below 100"), (120, 0.5, "raw exact match 0.")],
)
def test_cells_that_cannot_rank_say_so(n_documents: int, raw_exact: float, why: str | None) -> None:
    task = Synthetic(
        task="needle", cells=NEEDLE_CELLS[:1], n_documents=n_documents, raw_exact=raw_exact
    )
    for comparison in compare(collect(task), "spectrum", ["sinks-recent"]):
        assert (comparison.not_ranked or "").startswith(why or "")
        assert (comparison.not_ranked is None) == (why is None)


def test_a_policy_that_was_not_measured_is_refused(records: Records) -> None:
    with pytest.raises(BadInput, match=f"'pdtrim' was not measured; measured: {', '.join(KL)}"):
        compare(records, "spectrum", ["pdtrim"])


def test_arms_of_another_code_are_named_with_it() -> None:
    found = collect(Synthetic())
    moved = [
        replace(r, arm=r.arm._replace(codec="hadamard")) if r.arm.policy == "random-tiers" else r
        for r in found.records
    ]
    mixed = Records(found.header, moved)
    plain, named = (
        [c for c in compare(records, "spectrum", [versus]) if c.metric == "kl_mean"]
        for records, versus in ((found, "random-tiers"), (mixed, "random-tiers:hadamard"))
    )
    assert [c.delta for c in plain] == [c.delta for c in named]
    assert {(c.codec, c.versus_codec) for c in named} == {("nested", "hadamard")}
    with pytest.raises(BadInput, match="'random-tiers' was not measured"):
        compare(mixed, "spectrum", ["random-tiers"])
