"""The eviction solver: who is granted what, and that the budget is full and never exceeded."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import NATIVE

from kvprism.core import MENU, Budget, ComponentShape, KVShape, LayerShape
from kvprism.errors import BadInput, BudgetTooSmall, Unsupported
from kvprism.evict import (
    EvictionProblem,
    Heads,
    LayerProblem,
    grants,
    solve_eviction,
    solve_nominal_eviction,
)

HEADS: list[Heads] = ["shared", "even", "adaptive", "flat"]


def layer_of(layer_id: int, tokens: int, heads: int = 2, start: int = 0) -> LayerShape:
    components = (ComponentShape("k", heads, 8), ComponentShape("v", heads, 8))
    return LayerShape(layer_id, components, (start, start + tokens), "bfloat16")


def problem_of(
    tokens: Sequence[int], chosen: Heads = "shared", protected: int = 2, seed: int = 0, n_heads=2
) -> list[LayerProblem]:
    rng = np.random.default_rng(seed)
    layers = []
    for i, n in enumerate(tokens):
        keep = np.arange(n) >= n - protected
        scores = rng.random((n_heads, n))
        layers.append(LayerProblem(layer_of(i, n, n_heads), scores, keep, chosen))
    return layers


def whole(layers: list[LayerProblem], weights: Sequence[float] | None) -> EvictionProblem:
    return EvictionProblem("a policy", layers, grants(layers, weights), MENU)


def kept(layer: LayerProblem, n: int) -> np.ndarray:
    """bool `[head, token]`."""
    planned = layer.plan(n)
    assert (planned.tier_of["k"] == planned.tier_of["v"]).all()
    return planned.tier_of["k"] == NATIVE


@pytest.mark.parametrize("chosen", HEADS)
def test_protected_tokens_are_kept_and_as_many_more_as_were_granted(chosen: Heads) -> None:
    [layer] = problem_of([20], chosen, protected=3)
    for n in range(layer.n_units + 1):
        rows = kept(layer, n)
        assert rows[:, -3:].all()
        assert rows[:, :-3].sum() == n * (2 if chosen == "shared" else 1)
    assert kept(layer, layer.n_units).all()


def test_heads_that_share_keep_the_tokens_of_the_best_mean_score() -> None:
    [layer] = problem_of([20])
    best = np.argsort(-layer.scores[:, :18].mean(axis=0))[:5]
    rows = kept(layer, 5)
    assert (rows[0] == rows[1]).all() and set(np.flatnonzero(rows[0])) == {*best, 18, 19}


def test_even_heads_keep_their_own_best() -> None:
    [layer] = problem_of([20], "even")
    rows = kept(layer, 9)
    for head, n in enumerate([5, 4]):
        best = np.argsort(-layer.scores[head, :18])[:n]
        assert set(np.flatnonzero(rows[head])) == {*best, 18, 19}


def test_flat_is_the_top_k_over_all_heads() -> None:
    [layer] = problem_of([20], "flat")
    rows = kept(layer, 9)[:, :18]
    assert layer.scores[:, :18][rows].min() > layer.scores[:, :18][~rows].max()


@pytest.mark.parametrize("n", [0, 1, 7, 50, 71, 72])
def test_adaptive_heads_have_four_fifths_of_the_top_k_and_a_fifth_of_the_mean(n: int) -> None:
    """Ada-KV, algorithms 1 and 2."""
    [layer] = problem_of([20], "adaptive", n_heads=4)
    scores = layer.scores[:, :18] * np.array([[4.0], [1.0], [0.2], [0.1]])
    layer = LayerProblem(layer.shape, np.hstack([scores, layer.scores[:, 18:]]), layer.protected,
                         "adaptive")  # fmt: skip
    flat = sorted((-scores[h, t], h) for h in range(4) for t in range(18))[:n]
    top = [sum(1 for _, h in flat if h == head) for head in range(4)]
    exact = [0.8 * count + 0.2 * n / 4 for count in top]
    counts = layer.counts(n).tolist()
    assert sum(counts) == n
    assert all(abs(count - x) < 1 for count, x in zip(counts, exact, strict=True))
    rows = kept(layer, n)[:, :18]
    for head in range(4):
        assert rows[head].sum() == counts[head]
        if 0 < counts[head] < 18:
            assert scores[head][rows[head]].min() > scores[head][~rows[head]].max()


def test_equal_scores_go_to_the_earlier_token() -> None:
    layer = LayerProblem(layer_of(0, 6), np.zeros((2, 6)), np.zeros(6, bool))
    assert np.flatnonzero(kept(layer, 2)[0]).tolist() == [0, 1]


@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    weights=st.lists(st.floats(0.01, 100), min_size=4, max_size=4),
)
def test_units_go_to_the_layer_with_the_highest_claim(
    sizes: list[int], weights: list[float]
) -> None:
    layers, weights = problem_of(sizes, protected=0), weights[: len(sizes)]
    has = [0] * len(sizes)
    for layer in grants(layers, weights):
        claims = [
            w / (n + 1) if n < size else 0.0 for w, n, size in zip(weights, has, sizes, strict=True)
        ]
        assert claims[layer] == max(claims)
        has[layer] += 1
    assert has == sizes


def test_equal_weights_give_equal_numbers_and_a_full_layer_passes_on() -> None:
    layers = problem_of([30, 6, 30], protected=0)
    granted = grants(layers, [1.0] * 3)
    assert np.bincount(granted[:18]).tolist() == [6, 6, 6]
    assert np.bincount(granted[:40]).tolist() == [17, 6, 17]


def test_weights_are_shares_of_what_is_not_protected() -> None:
    layers = problem_of([100, 100], protected=10)
    assert np.bincount(grants(layers, [3.0, 1.0])[:40]).tolist() == [30, 10]


def test_without_weights_the_best_scores_of_all_layers_are_kept() -> None:
    layers = problem_of([20, 30, 25], "flat")
    problem = whole(layers, None)
    rows = [plan.tier_of["k"] == NATIVE for plan in problem.plan(40).layers]
    scores = [la.scores[:, :-2] for la in layers]
    inside = np.concatenate([s[r[:, :-2]] for s, r in zip(scores, rows, strict=True)])
    outside = np.concatenate([s[~r[:, :-2]] for s, r in zip(scores, rows, strict=True)])
    assert len(inside) == 40 and inside.min() > outside.max()


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, float("nan")], [1.0, float("inf")]])
def test_weights_that_share_nothing_are_refused(weights: list[float]) -> None:
    with pytest.raises(BadInput, match="2 layers need one positive, finite weight each"):
        grants(problem_of([5, 5]), weights)


@pytest.mark.parametrize("chosen", HEADS)
@pytest.mark.parametrize("weights", [[1.0, 2.0, 0.5], None])
def test_the_budget_is_full_and_never_exceeded(chosen: Heads, weights: list[float] | None) -> None:
    layers = problem_of([60, 40, 200], chosen)
    problem = whole(layers, weights)
    everything = len(problem.granted)
    sizes = [problem.plan(n).nbytes for n in range(everything + 1)]
    for budget in range(sizes[0], sizes[-1] + 700, 353):
        nbytes = solve_eviction(problem, Budget(budget)).nbytes
        assert nbytes <= budget
        at = [n for n, size in enumerate(sizes) if size == nbytes]
        assert everything in at or any(sizes[n + 1] > budget for n in at)


@pytest.mark.parametrize("chosen", HEADS)
def test_a_budget_for_everything_drops_nothing(chosen: Heads) -> None:
    problem = whole(problem_of([30, 20], chosen), [1.0, 1.0])
    everything = problem.plan(len(problem.granted))
    assert everything.histogram()["drop"] == 0
    for budget in (everything.nbytes, 10 * everything.nbytes):
        assert solve_eviction(problem, Budget(budget)).histogram() == everything.histogram()


def test_less_than_the_protected_tokens_is_refused_with_what_they_need() -> None:
    problem = whole(problem_of([30, 20]), [1.0, 1.0])
    needed = problem.plan(0).nbytes
    assert solve_eviction(problem, Budget(needed)).nbytes == needed
    with pytest.raises(BudgetTooSmall, match="'a policy'") as raised:
        solve_eviction(problem, Budget(needed - 1))
    assert (raised.value.needed, raised.value.given) == (needed, needed - 1)


@pytest.mark.parametrize("b, expected", [(0.25, 0.25), (0.5, 0.5), (1, 1)])
def test_nominal_budgets_are_shares_of_the_payload(b: float, expected: float) -> None:
    chosen = solve_nominal_eviction(whole(problem_of([40, 40]), [1.0, 3.0]), b)
    assert chosen.histogram()["native"] == expected * 2 * 2 * 80


def test_components_with_other_numbers_of_heads_share_or_are_refused() -> None:
    components = (ComponentShape("k", 2, 8), ComponentShape("v", 1, 8))
    shape = LayerShape(0, components, (0, 6), "bfloat16")
    scores, protected = np.random.rand(2, 6), np.zeros(6, bool)
    assert LayerProblem(shape, scores, protected).plan(3).tier_of["v"].shape == (1, 6)
    with pytest.raises(Unsupported, match="plan for a receiver with drop=uniform"):
        LayerProblem(shape, scores, protected, "even")


def test_a_plan_for_a_long_prompt_takes_few_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = problem_of([5000] * 4, "even")
    trials = []
    plan = EvictionProblem.plan
    monkeypatch.setattr(EvictionProblem, "plan", lambda p, n: (trials.append(n), plan(p, n))[1])
    problem = whole(layers, [1.0] * 4)
    budget = int(KVShape(tuple(la.shape for la in layers)).reference_nbytes * 0.3)
    chosen = solve_eviction(problem, Budget(budget))
    assert budget - 2 * layers[0].unit_nbytes - 256 * 8 < chosen.nbytes <= budget
    assert len(trials) < 30


def test_layers_that_do_not_change_between_trials_are_not_planned_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, plan = [], LayerProblem.plan
    monkeypatch.setattr(LayerProblem, "plan", lambda la, n: (made.append(n), plan(la, n))[1])
    problem = whole(problem_of([40] * 4), [1.0] * 4)
    before, after = problem.plan(8), problem.plan(9)
    assert made == [2, 2, 2, 2, 3]
    assert before.layers[1:] == after.layers[1:]
    assert problem.plan(9).nbytes == whole(problem_of([40] * 4), [1.0] * 4).plan(9).nbytes
