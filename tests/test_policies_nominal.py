"""Nominal budgets: the paper's fractions of payload, blind to scales, maps and headers."""

import numpy as np
import pytest
from strategies import INT4, INT8, histogram
from test_policies import BUDGETED, PROFILE, prompt_view, tiers_of

from kvprism.core import Budget
from kvprism.errors import BadInput, BudgetTooSmall
from kvprism.evictions import EVICTIONS
from kvprism.planning import plan
from kvprism.policies import POLICIES


@pytest.mark.parametrize("policy", [name for name in BUDGETED if not POLICIES[name].evicts])
def test_nominal_budgets_count_the_payload_alone(policy: str) -> None:
    view = prompt_view()
    sinks = POLICIES[policy].sinks
    for budget in ("0.30", "30%", 0.5):
        chosen = plan(view, policy, budget, nominal=True, profile=PROFILE)
        b = 0.3 if budget != 0.5 else 0.5
        tiers = tiers_of(chosen)[sinks:]
        spent = np.array([1, 0.5, 0.25, 0])[tiers].mean()
        assert b - 1 / len(tiers) < spent <= b
        assert chosen.fraction > b, "scales and frames are not counted"


def test_nominal_spectrum_is_twenty_percent_eight_bits_at_thirty() -> None:
    chosen = plan(prompt_view(), "spectrum-greedy", "0.30", nominal=True)
    assert histogram(tiers_of(chosen)) == {INT8: 40, INT4: 160}
    layers = plan(prompt_view(), "spectrum-layer", "0.30", nominal=True)
    assert not np.array_equal(tiers_of(layers, 0), tiers_of(layers, 1))
    assert layers.histogram()["int8"] == 39 * 12  # of 196: the sinks stay outside


@pytest.mark.parametrize("budget", ["512MiB", "100tok", "much", None, Budget(99)])
def test_a_nominal_budget_is_a_fraction(budget: str | Budget | None) -> None:
    with pytest.raises(BadInput, match="budget"):
        plan(prompt_view(), "spectrum", budget, nominal=True)


@pytest.mark.parametrize("budget", ["0.2", "1.1", "nan"])
def test_a_nominal_budget_that_the_family_does_not_reach_is_refused(budget: str) -> None:
    with pytest.raises(BadInput, match=r"expected 0.25 to 1"):
        plan(prompt_view(), "spectrum", budget, nominal=True)


@pytest.mark.parametrize("policy", EVICTIONS)
def test_nominal_evictions_count_protected_tokens_too(policy: str) -> None:
    chosen = plan(prompt_view(), policy, "0.30", nominal=True)
    rows = sum(layer.tier_of["k"].size for layer in chosen.layers)
    kept = chosen.histogram()["native"] / (2 * rows)  # in keys and in values
    assert 0.3 - 2 / rows < kept <= 0.3 < 1
    with pytest.raises(BadInput, match="expected 0 to 1"):
        plan(prompt_view(), policy, 1.1, nominal=True)


def test_a_nominal_eviction_below_its_protected_tokens_is_refused() -> None:
    with pytest.raises(BudgetTooSmall, match=r"'snapkv': 15360 bytes .* at least 49152"):
        plan(prompt_view(), "snapkv", 0.05, nominal=True)
