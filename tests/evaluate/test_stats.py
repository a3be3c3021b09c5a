"""The bootstrap, checked against figures that can be had another way."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvprism.errors import BadInput
from kvprism.evaluate.stats import (
    Average,
    Quantile,
    Ratio,
    bootstrap_weights,
    equivalent,
    holm,
    paired_bootstrap,
)

ONES = np.ones(40)


def test_a_resample_draws_as_many_documents_as_there_are() -> None:
    weights = bootstrap_weights(40, seed=3)
    assert weights.shape == (10_000, 40)
    assert (weights.sum(axis=1) == 40).all()
    assert abs(weights.mean() - 1) < 1e-9


def test_the_same_seed_draws_the_same_resamples() -> None:
    assert (bootstrap_weights(7, 1, 50) == bootstrap_weights(7, 1, 50)).all()
    assert (bootstrap_weights(7, 1, 50) != bootstrap_weights(7, 2, 50)).any()


def test_a_ratio_pools_before_it_divides() -> None:
    ratio = Ratio(np.array([1.0, 9.0]), np.array([1.0, 3.0]))
    assert ratio(np.array([[1, 1], [2, 0], [0, 2]])).tolist() == [2.5, 1.0, 3.0]


def test_an_average_gives_each_sample_its_own_documents() -> None:
    parts = [Ratio(np.array(values), np.ones(len(values))) for values in ([1.0, 3.0], [10.0])]
    average = Average(parts)
    assert average.n_documents == 3
    assert average(np.array([[1, 1, 1], [2, 0, 1], [0, 2, 1]])).tolist() == [6.0, 5.5, 6.5]


def test_perplexity_is_the_exponential_of_nll_per_token() -> None:
    perplexity = Ratio(np.array([20.0, 40.0]), np.array([10.0, 10.0]), exponential=True)
    assert perplexity(np.array([[1, 1]])) == pytest.approx(np.exp(3.0))


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    q=st.sampled_from([0.5, 0.9, 0.99]),
    seed=st.integers(0, 1000),
)
def test_a_weighted_quantile_is_the_quantile_of_the_repeated_values(
    sizes: list[int], q: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    values = [rng.integers(0, 8, size).astype(float) for size in sizes]  # ties are likely
    weights = bootstrap_weights(len(sizes), seed, 20)
    found = Quantile(values, q)(weights)
    for row, got in zip(weights, found, strict=True):
        repeated = np.concatenate([np.tile(v, int(w)) for v, w in zip(values, row, strict=True)])
        assert got == np.quantile(repeated, q, method="inverted_cdf")


def test_a_quantile_over_many_blocks_is_the_same() -> None:
    values = [np.random.default_rng(i).random(2000) for i in range(3)]
    weights = bootstrap_weights(3, 0)
    found = Quantile(values, 0.5)(weights)
    same = Quantile(values, 0.5)(weights[:5])
    assert (found[:5] == same).all()


def test_what_a_document_does_to_both_arms_cancels() -> None:
    hard = np.random.default_rng(0).normal(0, 10, 40)
    weights = bootstrap_weights(40, 0)
    estimate = paired_bootstrap(Ratio(hard + 0.5, ONES), Ratio(hard, ONES), "difference", weights)
    assert estimate.delta == pytest.approx(0.5)
    assert estimate.ci == pytest.approx((0.5, 0.5))
    assert estimate.p < 0.001


def test_perplexity_changes_are_relative() -> None:
    worse, base = (Ratio(x * ONES, ONES, exponential=True) for x in (np.log(22.0), np.log(20.0)))
    estimate = paired_bootstrap(worse, base, "relative", bootstrap_weights(40, 0, 100))
    assert (estimate.value, estimate.baseline) == pytest.approx((22.0, 20.0))
    assert estimate.delta == pytest.approx(0.1)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    trials, covered = 400, 0
    weights = bootstrap_weights(40, 0, 1000)
    for _ in range(trials):
        deltas = rng.normal(1.0, 2.0, 40)
        estimate = paired_bootstrap(
            Ratio(deltas, ONES), Ratio(0 * ONES, ONES), "difference", weights
        )
        covered += estimate.ci[0] <= 1.0 <= estimate.ci[1]
    # A percentile interval at n = 40 covers about 94 %; three binomial standard errors are 3.6 %.
    assert 0.904 <= covered / trials <= 0.976


def test_the_90_percent_interval_lies_within_the_95_percent_one() -> None:
    values = np.random.default_rng(0).normal(size=40)
    estimate = paired_bootstrap(
        Ratio(values, ONES), Ratio(0 * ONES, ONES), "difference", bootstrap_weights(40, 0)
    )
    assert estimate.ci[0] < estimate.ci90[0] < estimate.delta < estimate.ci90[1] < estimate.ci[1]


def test_no_difference_has_a_p_value_of_one() -> None:
    same = Ratio(ONES, ONES)
    estimate = paired_bootstrap(same, same, "difference", bootstrap_weights(40, 0))
    assert (estimate.delta, estimate.ci, estimate.p) == (0.0, (0.0, 0.0), 1.0)


def test_no_p_value_is_zero() -> None:
    estimate = paired_bootstrap(
        Ratio(ONES, ONES), Ratio(0 * ONES, ONES), "difference", bootstrap_weights(40, 0, 99)
    )
    assert estimate.p == 2 / 100


def test_arms_over_other_documents_are_not_paired() -> None:
    with pytest.raises(BadInput, match="40 against 39"):
        paired_bootstrap(
            Ratio(ONES, ONES),
            Ratio(ONES[1:], ONES[1:]),
            "difference",
            bootstrap_weights(40, 0, 10),
        )


@pytest.mark.filterwarnings("ignore:overflow")
def test_a_figure_that_is_not_finite_is_refused() -> None:
    endless = Ratio(1e4 * ONES, ONES, exponential=True)
    with pytest.raises(BadInput, match="not finite"):
        paired_bootstrap(endless, endless, "relative", bootstrap_weights(40, 0, 10))


def test_holm_multiplies_by_the_tests_that_remain() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=20))
def test_holm_never_lowers_a_p_value_and_keeps_their_order(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    assert all(p <= a <= 1 for p, a in zip(p_values, adjusted, strict=True))
    ranked = [adjusted[i] for i in np.argsort(p_values, kind="stable")]
    assert ranked == sorted(ranked)


def test_equal_means_the_whole_interval_is_inside_the_margin() -> None:
    assert equivalent((-0.01, 0.015), 0.02)
    assert not equivalent((-0.03, 0.01), 0.02)
    assert not equivalent((0.0, 0.02), 0.02)
