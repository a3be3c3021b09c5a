"""Algorithm 1, marginal losses and controls: sums are exact, choices are those of slow searches."""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvprism.allocate import (
    budgets,
    hull,
    largest_remainder,
    least_tokens,
    marginal,
    neighbours,
    placements,
    preferred,
    route,
)
from kvprism.errors import BadInput

signals = st.lists(st.floats(0, 1e6), min_size=1, max_size=40)


@given(st.integers(0, 10**6), signals)
def test_rounding_sums_exactly_and_stays_within_one(total: int, weights: list[float]) -> None:
    exact = [total * (w + 1) / sum(v + 1 for v in weights) for w in weights]
    whole = largest_remainder(total, exact)
    assert sum(whole) == total
    assert all(abs(n - share) < 1 + 1e-6 for n, share in zip(whole, exact, strict=True))


@given(st.integers(40, 2000), signals)
def test_budgets_are_algorithm_1(tokens: int, sensitivities: list[float]) -> None:
    """b_min + (B - L b_min) (s_l + eps) / sum_j (s_j + eps), rounded to the sum B."""
    n, b_min, eps = len(sensitivities), 40, 0.01
    shares = budgets(tokens, sensitivities, b_min, eps)
    assert sum(shares) == tokens * n and min(shares) >= b_min
    total = sum(s + eps for s in sensitivities)
    for got, s in zip(shares, sensitivities, strict=True):
        assert abs(got - (b_min + (tokens * n - n * b_min) * (s + eps) / total)) < 1 + 1e-6


def test_equal_signals_share_equally_and_negative_ones_count_as_none() -> None:
    assert budgets(100, [0, 0, 0], 40) == [100] * 3
    assert budgets(100, [2.5] * 4, 40) == [100] * 4
    assert budgets(100, [-3.0, 1.0], 40) == budgets(100, [0.0, 1.0], 40)


def test_budgets_that_cannot_be_are_refused() -> None:
    with pytest.raises(BadInput, match="39 tokens a layer on average are fewer than the 40"):
        budgets(39, [1.0], 40)
    with pytest.raises(BadInput, match="finite"):
        budgets(50, [math.nan], 40)
    assert least_tokens(512, 37) == 128 and least_tokens(64, 37) == 37


def test_the_preferred_policy_is_the_best_by_its_signal() -> None:
    layers = [{"a": 0.9, "b": 0.8}, {"a": 0.1, "b": 0.2}, {"a": 0.5, "b": 0.5}]
    assert preferred(layers, highest=True) == ["a", "b", "a"]
    assert preferred(layers, highest=False) == ["b", "a", "a"]


def test_the_hull_is_convex_and_below_every_point() -> None:
    curve = {("a", 64): 3.0, ("b", 64): 2.0, ("a", 128): 1.9, ("b", 256): 0.5, ("a", 512): 0.6}
    points = hull(curve)
    assert [(p.tokens, p.policy, p.loss) for p in points] == [(64, "b", 2.0), (256, "b", 0.5)]
    assert hull({("a", 10): -1.0})[0].loss == 0.0


@given(st.integers(0, 2**32 - 1))
def test_the_allocator_is_optimal_at_its_steps(seed: int) -> None:
    """Of three layers, against all combinations that cost as much or less as what it gave out."""
    rng = np.random.default_rng(seed)
    curves = [
        {
            (p, t): float(loss)
            for (p, t), loss in zip(product("ab", (40, 80, 160)), row, strict=True)
        }
        for row in rng.random((3, 6))
    ]
    policies, shares = marginal(100, curves)
    assert sum(shares) == 300
    hulls = [{p.tokens: p for p in hull(curve)} for curve in curves]
    for spent in range(120, 481, 40):
        _, given = marginal(spent // 3, curves) if spent % 3 == 0 else ([], [])
        if not given or any(t not in h for t, h in zip(given, hulls, strict=True)):
            continue
        ours = sum(h[t].loss for t, h in zip(given, hulls, strict=True))
        best = min(
            sum(point.loss for point in combination)
            for combination in product(*(h.values() for h in hulls))
            if sum(point.tokens for point in combination) <= spent
        )
        assert ours <= best + 1e-12
    for policy, tokens, found in zip(policies, shares, hulls, strict=True):
        below = max(t for t in found if t <= tokens)
        assert found[below].policy == policy


def test_an_allocation_gives_tokens_where_they_gain_most() -> None:
    flat = {("a", 50): 0.10, ("a", 100): 0.09, ("a", 200): 0.08}
    steep = {("a", 50): 2.00, ("b", 100): 1.00, ("b", 150): 0.00}
    assert marginal(100, [flat, steep]) == (["a", "b"], [50, 150])
    assert marginal(300, [flat, steep]) == (["a", "b"], [325, 275])
    with pytest.raises(BadInput, match=r"40 tokens a layer .* fewer than the smallest measured"):
        marginal(40, [flat, steep])


def test_neighbours_change_one_layer_and_keep_the_sum() -> None:
    found = neighbours(["a", "b", "c"], [100, 60, 140], 0, ["a", "b", "c"], 40)
    assert [policies for policies, _ in found[:2]] == [["b", "b", "c"], ["c", "b", "c"]]
    assert all(sum(shares) == 300 and min(shares) >= 40 for _, shares in found)
    assert [shares[0] for _, shares in found] == [100, 100, 75, 125]
    assert found[3][1] == [125, 56, 119]
    # Nobody has a token above the least to give, and the layer itself has none to lose.
    assert neighbours(["a", "a"], [40, 40], 0, ["a"], 40) == []


def test_placements_keep_counts_and_shares() -> None:
    found = route("polykv", ["a", "a", "b", "c"], [40, 50, 60, 70])
    every = placements(found, 100)
    assert len(every) == 11 and found not in every  # 4! / 2! orders, less the route's own
    assert len({str(each) for each in every}) == 11
    for each in every:
        assert sorted(layer.policy for layer in each.layers) == ["a", "a", "b", "c"]
        assert [layer.tokens for layer in each.layers] == [40, 50, 60, 70]
    some = placements(found, 5, seed=3)
    assert len({str(each) for each in some}) == 5 and some == placements(found, 5, seed=3)
    assert placements(route("polykv", ["a"] * 3, [50] * 3), 100) == []
