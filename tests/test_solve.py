"""Tier counts against the paper's formulas, exact plans against brute force."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import DROP, INT4, INT8, NATIVE, histogram

from kvprism.core import MENUS, Budget, ComponentShape, KVShape, LayerShape, apportion
from kvprism.errors import BadInput, BudgetTooSmall
from kvprism.layout import Split
from kvprism.plans import Plan, layer_nbytes, stream_nbytes
from kvprism.solve import (
    ALL_INT4,
    ALL_INT8,
    ALL_NATIVE,
    BALANCED,
    EVICT,
    GREEDY,
    INT4_WAITS,
    INT8_FIRST,
    TWO_TIER,
    Family,
    TokenProblem,
    smallest_layers,
    smallest_prompt,
    solve_layers,
    solve_nominal,
    solve_prompt,
)

BUDGETED = [GREEDY, BALANCED, TWO_TIER, EVICT]
COST = {NATIVE: Fraction(1), INT8: Fraction(1, 2), INT4: Fraction(1, 4), DROP: Fraction(0)}


def fractions(family: Family, b: Fraction) -> tuple[Fraction, Fraction, Fraction]:
    """(native, INT8, INT4) as the paper prints them."""
    if family is BALANCED:
        surplus = 4 * b - 1
        native, int8 = surplus / 5, 2 * surplus / 5
        int4 = 1 - native - int8
        return (2 * b - 1, 2 - 2 * b, Fraction(0)) if int4 < 0 else (native, int8, int4)
    if family is EVICT:
        return b, Fraction(0), Fraction(0)
    if b >= Fraction(1, 2):
        return 2 * b - 1, 2 - 2 * b, Fraction(0)
    return (
        (Fraction(0), 4 * b - 1, 2 - 4 * b)
        if family is GREEDY
        else (Fraction(0), 2 * b, Fraction(0))
    )


@pytest.mark.parametrize("family", BUDGETED, ids=lambda family: family.name)
@pytest.mark.parametrize("n", [1, 7, 100, 2048, 100_000])
def test_counts_follow_the_papers_fractions(family: Family, n: int) -> None:
    for percent in range(max(1, int(100 * family.floor)), 101):
        b = Fraction(percent, 100)
        native, int8, int4 = fractions(family, b)
        got = family.counts(float(b), n)
        whole = native + int8 + int4 == 1
        assert got.native == int(native * n)
        assert abs(got.int8 - int8 * n) < 1 and abs(got.int4 - int4 * n) < 2
        assert sum(got) == (n if whole else int((native + int8 + int4) * n))
        spent = sum(COST[tier] * count for tier, count in enumerate(got))
        assert b * n - 1 < spent <= b * n


@pytest.mark.parametrize(
    "family, b, expected",
    [
        (GREEDY, 0.25, (0, 0, 1000)),
        (GREEDY, 0.30, (0, 200, 800)),
        (GREEDY, 0.50, (0, 1000, 0)),
        (GREEDY, 0.75, (500, 500, 0)),
        (GREEDY, 1.00, (1000, 0, 0)),
        (BALANCED, 0.50, (200, 400, 400)),
        (BALANCED, 0.70, (400, 600, 0)),
        (TWO_TIER, 0.30, (0, 600, 0)),
        (TWO_TIER, 0.60, (200, 800, 0)),
        (EVICT, 0.30, (300, 0, 0)),
        (ALL_NATIVE, 1.0, (1000, 0, 0)),
        (ALL_INT8, 1.0, (0, 1000, 0)),
        (ALL_INT4, 1.0, (0, 0, 1000)),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_the_numbers_of_the_paper(family: Family, b: float, expected: tuple[int, ...]) -> None:
    assert tuple(family.counts(b, 1000)) == expected


def test_families_know_whether_they_drop() -> None:
    families = (*BUDGETED, INT8_FIRST, INT4_WAITS, ALL_NATIVE, ALL_INT8, ALL_INT4)
    drops = {f.name for f in families if f.drops}
    assert drops == {"two-tier", "native-or-drop", "two-tier first"}


@pytest.mark.parametrize("n", [1, 7, 1000])
def test_tokens_at_int4_wait_until_the_other_family_drops_none(n: int) -> None:
    steps = [0.25 + step / 4000 for step in range(3001)]
    both = [(INT8_FIRST.counts(b, n), INT4_WAITS.counts(b, n)) for b in steps]
    assert both[0] == (TWO_TIER.counts(0.25, n), GREEDY.counts(0.25, n))
    assert both[-1] == ((n, 0, 0), (n, 0, 0))
    assert all(sum(first) == n or waits == (0, 0, n) for first, waits in both)
    assert all(first == waits for b, (first, waits) in zip(steps, both, strict=True) if b > 0.5)
    for family in range(2):
        costs = [sum(COST[t] * c for t, c in enumerate(pair[family])) for pair in both]
        assert costs == sorted(costs)


def problem_of(
    family: Family,
    n: int,
    *,
    sinks: int = 0,
    codec: str = "nested",
    pinned: Any = None,
    split: Split | None = None,
    seed: int = 0,
) -> TokenProblem:
    order = np.random.default_rng(seed).permutation(n)
    protected = np.arange(min(sinks, n))
    order = order[~np.isin(order, protected)]
    return TokenProblem("p", family, order, protected, MENUS[codec], pinned or {}, split or Split())


def test_the_most_important_tokens_take_the_best_tiers() -> None:
    problem = problem_of(BALANCED, 20, sinks=4)
    tiers = problem.tiers(0.5)
    assert (tiers[:4] == NATIVE).all()
    assert (np.diff(tiers[problem.order].astype(int)) >= 0).all()
    assert histogram(tiers) == {NATIVE: 4 + 3, INT8: 6, INT4: 7}


def test_pinned_rows_are_native_where_they_would_be_quantised() -> None:
    rows = np.zeros((2, 4), bool)
    rows[1, :] = True
    problem = problem_of(TWO_TIER, 4, pinned={0: {"v": rows}})
    shape = KVShape.dense(layers=2, heads=2, channels=8, tokens=4)
    first, second = solve_nominal([problem], shape, 0.25).layers
    tiers = problem.tiers(0.25)
    assert histogram(tiers) == {INT8: 2, DROP: 2}
    assert (first.tier_of["k"] == tiers).all() and (second.tier_of["v"] == tiers).all()
    assert first.tier_of["v"][0].tolist() == tiers.tolist()
    assert first.tier_of["v"][1].tolist() == np.where(tiers == INT8, NATIVE, tiers).tolist()


SHAPE = KVShape.dense(layers=2, heads=2, channels=8, tokens=40)


@pytest.mark.parametrize("family", BUDGETED, ids=lambda family: family.name)
@pytest.mark.parametrize("b", [0.2, 0.3, 0.5, 0.7, 1.0])
def test_a_nominal_plan_spends_the_payload_that_it_is_given(family: Family, b: float) -> None:
    problem = problem_of(family, 40)
    if b < family.floor:
        with pytest.raises(BadInput, match=f"nominal budget {b} for {family.name}: expected 0.25"):
            solve_nominal([problem], SHAPE, b)
        return
    counts = solve_nominal([problem], SHAPE, b).histogram()
    rows = sum(counts.values())
    spent = counts["native"] + counts["int8"] / 2 + counts["int4"] / 4
    assert (b - 1 / 40) * rows < spent <= b * rows


@st.composite
def problems(draw: st.DrawFn) -> tuple[TokenProblem, KVShape]:
    n, codec = draw(st.integers(1, 24)), draw(st.sampled_from(list(MENUS)))
    # Groups of 32 channels, and offsets that a row of 4 channels cannot pay.
    channels = [4, 8, 64, 512] if codec in ("nested", "conditioned", "published") else [64, 512]
    components = tuple(
        ComponentShape(name, draw(st.integers(1, 3)), draw(st.sampled_from(channels)))
        for name in "kv"
    )
    dtype = draw(st.sampled_from(["bfloat16", "float32"]))
    layers = range(draw(st.integers(1, 3)))
    shape = KVShape(tuple(LayerShape(i, components, (0, n), dtype) for i in layers))
    pinned: dict[int, Any] = {}
    if draw(st.booleans()):
        rows = np.random.default_rng(n).random((components[0].heads, n)) < 0.2
        pinned = {0: {"k": rows}}
    problem = problem_of(
        draw(st.sampled_from([*BUDGETED, ALL_INT4])),
        n,
        sinks=draw(st.sampled_from([0, 4])),
        codec=codec,
        pinned=pinned,
        split=Split(draw(st.none() | st.integers(3, 9)), draw(st.none() | st.just(1))),
        seed=draw(st.integers(0, 9)),
    )
    return problem, shape


def members(problem: TokenProblem) -> list[float]:
    """A budget b for every different member of the family, in ascending order."""
    floor, n = problem.family.floor, len(problem.order)
    by_counts: dict[Any, float] = {}
    for step in range(40 * n + 1):
        b = floor + (1 - floor) * step / max(1, 40 * n)
        by_counts.setdefault(problem.family.counts(b, n), b)
    return list(by_counts.values())


def better(plan: Plan) -> int:
    counts = plan.histogram()
    return counts["native"] + counts["int8"]


@given(st.data())
def test_no_other_member_makes_better_use_of_the_budget(data: st.DataObject) -> None:
    problem, shape = data.draw(problems())
    plans = [solve_nominal([problem], shape, b) for b in members(problem)]
    costs = [plan.nbytes for plan in plans]
    assert smallest_prompt([problem], shape) == min(costs)
    budget = data.draw(st.sampled_from(costs)) + data.draw(st.integers(-300, 300))
    if budget < min(costs):
        with pytest.raises(BudgetTooSmall) as raised:
            solve_prompt([problem], shape, Budget(max(1, budget)))
        assert (raised.value.needed, raised.value.policy) == (min(costs), "p")
        return
    best = max((i for i, cost in enumerate(costs) if cost <= budget))
    assert solve_prompt([problem], shape, Budget(budget)).histogram() == plans[best].histogram()


@pytest.mark.parametrize("family", BUDGETED, ids=lambda family: family.name)
@pytest.mark.parametrize("n", [1, 7, 16])
def test_every_member_is_found_at_its_own_size(family: Family, n: int) -> None:
    shape = KVShape.dense(layers=1, heads=2, channels=512, tokens=n)
    problem = problem_of(family, n)
    for b in members(problem):
        member = solve_nominal([problem], shape, b)
        found = solve_prompt([problem], shape, Budget(member.nbytes))
        assert found.histogram() == member.histogram()


@given(st.data())
def test_the_minimum_is_feasible_and_a_byte_less_is_not(data: st.DataObject) -> None:
    problem, shape = data.draw(problems())
    needed = smallest_prompt([problem], shape)
    assert solve_prompt([problem], shape, Budget(needed)).nbytes == needed
    with pytest.raises(BudgetTooSmall, match=f"at least {needed} "):
        solve_prompt([problem], shape, Budget(needed - 1))


@given(st.data())
def test_more_budget_never_gives_fewer_tokens_of_eight_bits_or_more(data: st.DataObject) -> None:
    problem, shape = data.draw(problems())
    needed = smallest_prompt([problem], shape)
    steps = sorted(data.draw(st.lists(st.integers(0, 4000), min_size=2, max_size=8)))
    kept = [better(solve_prompt([problem], shape, Budget(needed + step))) for step in steps]
    assert kept == sorted(kept)


@pytest.mark.parametrize("family", BUDGETED, ids=lambda family: family.name)
@pytest.mark.parametrize("codec", MENUS)
def test_what_is_left_of_a_budget_is_less_than_a_token(family: Family, codec: str) -> None:
    shape = KVShape.dense(layers=4, heads=2, channels=64, tokens=700)
    problem = problem_of(family, 700, sinks=4, codec=codec)
    # A token to native in every layer, and in each layer at most: a new segment of each kind of two
    # components, begun with 256 bytes, an index in the map, and a wider map (1 bit a token).
    token = 4 * (2 * 2 * 64 * 2)
    new = 4 * (2 * 5 * (256 + 32) + 4 + 700 // 8)
    for fraction in np.linspace(0.34, 0.98, 18):
        budget = int(fraction * shape.reference_nbytes)
        left = budget - solve_prompt([problem], shape, Budget(budget)).nbytes
        assert 0 <= left < token + new


def test_no_budget_at_all_is_the_best_member() -> None:
    assert solve_prompt([problem_of(GREEDY, 40)], SHAPE, None).histogram()["native"] == 320
    assert solve_prompt([problem_of(ALL_INT4, 40)], SHAPE, None).histogram()["int4"] == 320


def test_a_fixed_rate_is_refused_a_budget_below_its_size() -> None:
    problem = problem_of(ALL_INT8, 40)
    nbytes = solve_prompt([problem], SHAPE, None).nbytes
    assert solve_prompt([problem], SHAPE, Budget(nbytes)).nbytes == nbytes
    with pytest.raises(BudgetTooSmall, match=f"at least {nbytes} "):
        solve_prompt([problem], SHAPE, Budget(nbytes - 1))


def two_ranges() -> tuple[list[TokenProblem], KVShape]:
    """Layers 0 and 2 hold tokens 25 to 39 only, as with a sliding window."""
    components = SHAPE.layers[0].components
    starts = (25, 0, 25, 0)
    layers = [LayerShape(i, components, (start, 40), "bfloat16") for i, start in enumerate(starts)]
    return [problem_of(GREEDY, 15, seed=1), problem_of(GREEDY, 40, sinks=4)], KVShape(tuple(layers))


def test_layers_of_other_tokens_have_their_own_map_at_one_b() -> None:
    problems, shape = two_ranges()
    plan = solve_nominal(problems, shape, 0.4)
    for layer, problem in zip(plan.layers, problems * 2, strict=True):
        assert all((rows == problem.tiers(0.4)).all() for rows in layer.tier_of.values())


def test_layers_of_other_tokens_share_one_exact_budget() -> None:
    problems, shape = two_ranges()
    needed = smallest_prompt(problems, shape)
    costs = [solve_nominal(problems, shape, 0.25 + 0.75 * i / 320).nbytes for i in range(321)]
    assert needed == min(costs)
    steps = sorted(set(costs))[::4]
    for budget in (*steps, *(nbytes - 1 for nbytes in steps[1:]), max(costs) + 1):
        best = max(i for i, nbytes in enumerate(costs) if nbytes <= budget)
        assert solve_prompt(problems, shape, Budget(budget)).nbytes == costs[best]
    with pytest.raises(BudgetTooSmall, match=f"at least {needed} "):
        solve_prompt(problems, shape, Budget(needed - 1))


def test_every_token_range_needs_its_problem() -> None:
    problems, shape = two_ranges()
    for some in (problems[:1], problems * 3):
        message = rf"\[\(25, 40\), \(0, 40\)\] need one problem each, .* got {len(some)}"
        with pytest.raises(BadInput, match=message):
            solve_prompt(some, shape, Budget(10**6))
        with pytest.raises(BadInput, match=message):
            solve_nominal(some, shape, 0.5)


@st.composite
def layered(draw: st.DrawFn) -> tuple[list[TokenProblem], KVShape, list[float]]:
    problem, shape = draw(problems())
    n = len(shape.layers)
    shares = draw(st.lists(st.sampled_from([1.0, 2.0, 0.5, 7.0]), min_size=n, max_size=n))
    return [problem] * n, shape, shares


@given(st.data())
def test_every_layer_stays_within_its_share(data: st.DataObject) -> None:
    many, shape, shares = data.draw(layered())
    needed = smallest_layers(many, shape, shares)
    budget = needed + data.draw(st.integers(0, 3000))
    plan = solve_layers(many, shape, Budget(budget), shares)
    assert plan.nbytes <= budget
    sizes, sequence = [], 0
    for layer in plan.layers:
        nbytes, count = layer_nbytes(layer, plan.menu, plan.split, sequence)
        sizes.append(nbytes)
        sequence += count
    framing = stream_nbytes(plan.layers, plan.menu, plan.split) - sum(sizes)
    # The frames around the layers are counted with the longest END, at most 16 bytes more.
    for size, most in zip(sizes, apportion(budget - framing, shares), strict=True):
        assert size <= most


@given(st.data())
def test_the_minimum_of_all_layers_is_feasible_and_a_byte_less_is_not(data: st.DataObject) -> None:
    many, shape, shares = data.draw(layered())
    needed = smallest_layers(many, shape, shares)
    solve_layers(many, shape, Budget(needed), shares)
    for less in (1, 2, needed // 2, needed - 1):
        with pytest.raises(BudgetTooSmall) as raised:
            solve_layers(many, shape, Budget(needed - less), shares)
        assert raised.value.needed == needed


def test_layers_of_many_manifests_are_counted_with_their_numbers() -> None:
    shape = KVShape.dense(layers=3, heads=3, channels=8, tokens=24)
    many = [problem_of(GREEDY, 24, split=Split(1, 1))] * 3
    needed = smallest_layers(many, shape, [1.0] * 3)
    plan = solve_layers(many, shape, Budget(needed), [1.0] * 3)
    assert plan.nbytes <= needed, "from manifest 128 on, each number takes a byte more"


def test_a_larger_share_gives_a_layer_more() -> None:
    problem = problem_of(GREEDY, 40)
    plan = solve_layers([problem] * 2, SHAPE, Budget(6000), [1, 2])
    first, second = (int((layer.tier_of["k"] == INT4).sum()) for layer in plan.layers)
    assert first > second


def test_a_wrong_number_of_shares_is_refused() -> None:
    problem = problem_of(GREEDY, 40)
    for shares in ([1.0], [1.0] * 3, []):
        with pytest.raises(BadInput, match=f"2 layers need one share each, got {len(shares)}"):
            solve_layers([problem] * 2, SHAPE, Budget(9999), shares)


def test_a_long_prompt_of_a_large_model_is_solved_in_a_few_evaluations() -> None:
    shape = KVShape.dense(layers=1, heads=8, channels=128, tokens=65_536)
    problem = problem_of(GREEDY, 65_536, sinks=4)
    evaluations = 0
    layers = TokenProblem.layer

    def counted(*args: Any) -> Any:
        nonlocal evaluations
        evaluations += 1
        return layers(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TokenProblem, "layer", counted)
        plan = solve_prompt([problem], shape, Budget(int(0.3 * shape.reference_nbytes)))
    assert 0.2999 < plan.fraction <= 0.3
    assert evaluations < 60
