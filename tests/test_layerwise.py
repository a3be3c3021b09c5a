"""Plans made layer by layer are the plans that `plan` makes of the whole prompt."""

import numpy as np
import pytest
import torch
from strategies import cache

from kvprism.core import Capability
from kvprism.errors import BadInput, BudgetTooSmall, Unsupported
from kvprism.layerwise import LayerPlanner, leaves_early
from kvprism.layout import Split
from kvprism.planning import PlanOptions, plan
from kvprism.plans import Plan
from kvprism.policies import POLICIES
from kvprism.tensors import LayerView, RequestKV

EARLY = [name for name in POLICIES if leaves_early(name) and name != "spectrum-conditioned"]


def views(kv: RequestKV) -> list[LayerView]:
    drawn = torch.Generator().manual_seed(0)
    return [LayerView(la, queries=torch.randn(4, 8, 64, generator=drawn)) for la in kv.layers]


def unplannable() -> RequestKV:
    """A key and a value that no quantised tier can hold."""
    kv = cache(layers=3, heads=2, tokens=160, channels=64)
    kv.layers[1].components["k"][1, 17] = float("inf")
    kv.layers[0].components["v"][0, 3] = float("nan")
    return kv


@pytest.mark.parametrize("split", [None, Split(tokens=48, heads=1)])
@pytest.mark.parametrize("policy", EARLY)
def test_layer_by_layer_is_the_whole_prompts_plan(policy: str, split: Split | None) -> None:
    view = views(unplannable())
    budget = "0.6" if POLICIES[policy].budgeted else None
    options = PlanOptions(split=split)
    expected = plan(view, policy, budget, options=options)
    planner = LayerPlanner(expected.shape, policy, budget, options=options)
    layers = tuple(planner.plan(layer) for layer in view)
    assert Plan(layers, planner.menu, planner.split).nbytes == expected.nbytes
    for mine, whole in zip(layers, expected.layers, strict=True):
        for name, tiers in whole.tier_of.items():
            assert np.array_equal(mine.tier_of[name], tiers)


def test_policies_that_look_at_all_layers_are_refused() -> None:
    shape = unplannable().shape()
    for policy in ("spectrum", "snapkv", "spectrum-adaptive", "random-tiers"):
        assert not leaves_early(policy)
        with pytest.raises(Unsupported, match="such as spectrum-layer"):
            LayerPlanner(shape, policy, "0.5")


def test_what_cannot_be_planned_is_refused_as_early_as_it_is_known() -> None:
    kv = unplannable()
    with pytest.raises(BadInput, match="needs a budget"):
        LayerPlanner(kv.shape(), "spectrum-layer")
    kv.layers[0].components["k"][:, 40:80] = float("inf")
    planner = LayerPlanner(kv.shape(), "spectrum-layer", "0.30")
    with pytest.raises(BudgetTooSmall):
        planner.plan(views(kv)[0])
    planner.plan(views(kv)[1])
    dropping = LayerPlanner(kv.shape(), "pdtrim", "0.5", capability=Capability(drop="none"))
    with pytest.raises(Unsupported, match="drop=none"):
        dropping.plan(views(kv)[0])


@pytest.mark.parametrize("policy", ["spectrum", "snapkv", "polykv", "spectrum-adaptive"])
def test_policies_that_need_the_whole_prompt_do_not_leave_early(policy: str) -> None:
    assert not leaves_early(policy)
