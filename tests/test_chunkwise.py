"""A provisional map chunk by chunk, then upgrades: exact bytes, who gets them, what is refused."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import cache, same_cache, view_of

from kvprism.chunkwise import ChunkPlanner, leaves_in_chunks
from kvprism.codec.stream import decode, encode
from kvprism.core import NATIVE_CODEC, NESTED_CODEC, UPGRADE_CODEC, Budget, Capability
from kvprism.errors import BudgetTooSmall, MissingSignal, ShapeMismatch, Unsupported
from kvprism.layout import Split, ranges
from kvprism.planning import PlanOptions, plan
from kvprism.plans import Plan
from kvprism.score import ranking
from kvprism.staged import StagedPlan
from kvprism.tensors import RequestKV

SHAPE: dict[str, Any] = {"layers": 2, "tokens": 120, "channels": 64}
NATIVE, INT8, INT4 = range(3)


def planned(
    kv: RequestKV, policy: str, budget: Any, chunk: int, window: int | None = 8, **settings: Any
) -> StagedPlan:
    planner = ChunkPlanner(kv.shape(), policy, budget, chunk=chunk, **settings)
    for low, high in ranges(*kv.layers[0].shape().token_range, chunk):
        for layer in kv.layers:
            planner.base(layer.part(low, high))
    return planner.plan(view_of(kv, window=window))


@given(st.data())
def test_every_byte_is_planned_and_within_the_budget(data: st.DataObject) -> None:
    kv = cache(**SHAPE, start=data.draw(st.sampled_from([0, 50])))
    policy = data.draw(st.sampled_from(["spectrum", "spectrum-balanced", "random-tiers", "int8"]))
    chunk = data.draw(st.integers(16, 140))
    options = PlanOptions(
        importance=data.draw(st.sampled_from(["attention", "position", "norm"])),
        split=data.draw(st.sampled_from([None, Split(tokens=50, heads=1)])),
    )
    needed = floor_of(kv, policy, chunk, options)
    more = data.draw(st.integers(0, kv.shape().reference_nbytes))
    budget = None if policy == "int8" else Budget(needed + more)
    chosen = planned(kv, policy, budget, chunk, options=options)
    stream = encode(kv, chosen)
    assert chosen.nbytes == len(stream) >= chosen.base_nbytes
    assert budget is None or len(stream) <= budget.nbytes
    final = Plan(chosen.layers, chosen.menu, chosen.split)
    assert same_cache(decode(stream), decode(encode(kv, final)))


def floor_of(kv: RequestKV, policy: str, chunk: int, options: PlanOptions) -> int:
    """What the error of a budget of one byte says is needed."""
    if policy == "int8":
        return 1
    with pytest.raises(BudgetTooSmall) as error:
        ChunkPlanner(kv.shape(), policy, Budget(1), chunk=chunk, options=options)
    return error.value.needed


def test_the_smallest_budget_is_the_provisional_map_alone() -> None:
    kv = cache(**SHAPE)
    needed = floor_of(kv, "spectrum", 32, PlanOptions())
    chosen = planned(kv, "spectrum", Budget(needed), 32)
    assert chosen.nbytes == needed and not chosen.upgrades
    assert chosen.nbytes == planned(kv, "spectrum", "floor", 32).nbytes
    with pytest.raises(BudgetTooSmall, match=f"at least {needed}"):
        planned(kv, "spectrum", Budget(needed - 1), 32)


def test_the_tokens_that_rank_first_are_upgraded_and_no_more_would_fit() -> None:
    kv = cache(**SHAPE)
    chosen = planned(kv, "spectrum", 0.45, 40)
    row = chosen.layers[0].tier_of["k"][0]
    assert (row[:4] == NATIVE).all()
    order = [int(i) for i in ranking(view_of(kv)).argsort(descending=True, stable=True) if i > 3]
    n = int((row == INT8).sum())
    assert 0 < n < 116 and set(order[:n]) == set(np.flatnonzero(row == INT8))
    for more in range(n + 1, 117):
        tiers = row.copy()
        tiers[order[:more]] = INT8
        assert with_tiers(chosen, tiers).nbytes > 0.45 * kv.shape().reference_nbytes


def with_tiers(chosen: StagedPlan, row: Any) -> StagedPlan:
    layers = tuple(
        type(la)(la.shape, {n: np.broadcast_to(row, t.shape) for n, t in la.tier_of.items()})
        for la in chosen.layers
    )
    return StagedPlan(
        layers, chosen.menu, chosen.split, provisional=chosen.provisional, cuts=chosen.cuts
    )


def test_natives_beyond_the_provisional_ones_are_sent_again_and_billed() -> None:
    kv = cache(**SHAPE)
    chosen = planned(kv, "spectrum", 0.9, 60)
    natives = chosen.histogram()["native"]
    assert natives > planned(kv, "spectrum", "floor", 60).histogram()["native"]
    assert natives < plan(view_of(kv), "spectrum", 0.9).histogram()["native"]


def spoiled(kv: RequestKV, n: int) -> RequestKV:
    for layer in kv.layers:
        layer.components["k"][:, 10 : 10 + n] = torch.inf
    return kv


def test_rows_that_no_code_can_hold_are_native_from_the_beginning() -> None:
    kv = spoiled(cache(**SHAPE), 1)
    chosen = planned(kv, "spectrum", 0.5, 32)
    assert all((la.tier_of["k"][:, 10] == NATIVE).all() for la in chosen.provisional)
    assert not any((la.tier_of["v"][:, 10] == NATIVE).any() for la in chosen.provisional)
    assert chosen.nbytes == len(encode(kv, chosen)) <= 0.5 * kv.shape().reference_nbytes
    got = decode(encode(kv, chosen))
    assert all(torch.isinf(la.components["k"][:, 10]).all() for la in got.layers)


def test_layers_with_a_window_begin_within_a_chunk() -> None:
    long, short = cache(layers=1, tokens=120, channels=64), cache(tokens=47, start=73, channels=64)
    kv = RequestKV((long.layers[0], short.layers[1]), 120)
    planner = ChunkPlanner(kv.shape(), "spectrum", 0.5, chunk=32)
    for low, high in ranges(0, 120, 32):
        for layer in kv.layers:
            start = max(low, int(layer.positions[0]))
            if start < high:
                planner.base(layer.part(start, high))
    chosen = planner.plan(view_of(kv))
    stream = encode(kv, chosen)
    assert chosen.nbytes == len(stream) <= 0.5 * kv.shape().reference_nbytes
    assert chosen.cuts == (0, 32, 64, 96, 120)
    final = Plan(chosen.layers, chosen.menu, chosen.split)
    assert same_cache(decode(stream), decode(encode(kv, final)))


def test_too_many_of_them_end_the_request_before_the_budget_is_passed() -> None:
    kv = spoiled(cache(**SHAPE), 20)
    needed = floor_of(kv, "spectrum", 40, PlanOptions())
    with pytest.raises(BudgetTooSmall):
        planned(kv, "spectrum", Budget(needed + 100), 40)
    planner = ChunkPlanner(kv.shape(), "spectrum", Budget(needed + 100), must_fit=False)
    for layer in kv.layers:
        planner.base(layer)
    assert planner.missed and not planner.plan(view_of(kv)).upgrades


REFUSED = ["snapkv", "polykv", "spectrum-2tier", "spectrum-layer", "spectrum-adaptive", "pdtrim"]


@pytest.mark.parametrize("policy", REFUSED)
def test_policies_that_may_drop_or_plan_by_layer_are_refused(policy: str) -> None:
    assert not leaves_in_chunks(policy)
    with pytest.raises(Unsupported, match="send without chunks"):
        ChunkPlanner(cache().shape(), policy, 0.5)


def test_a_code_or_receiver_without_upgrades_is_refused() -> None:
    shape = cache(**SHAPE).shape()
    with pytest.raises(Unsupported, match="4 bits to 8"):
        ChunkPlanner(shape, "spectrum", 0.5, options=PlanOptions(codec="published"))
    old = Capability(codecs=(NATIVE_CODEC, NESTED_CODEC, "kvp.drop/1"))
    with pytest.raises(Unsupported, match=UPGRADE_CODEC):
        ChunkPlanner(shape, "spectrum", 0.5, capability=old)
    assert UPGRADE_CODEC not in {t.codec for t in ChunkPlanner(shape, "raw", capability=old).menu}


def test_what_is_no_part_of_the_shape_is_refused() -> None:
    kv = cache(**SHAPE)
    planner = ChunkPlanner(kv.shape(), "spectrum", 0.5)
    with pytest.raises(ShapeMismatch, match="no part"):
        planner.base(cache(**SHAPE, start=50).layers[0])


def test_attention_needs_the_queries_of_the_last_chunk() -> None:
    kv = cache(**SHAPE)
    with pytest.raises(MissingSignal):
        planned(kv, "spectrum", 0.5, 60, window=None)
    planned(kv, "spectrum", 0.5, 60, window=None, options=PlanOptions(importance="norm"))
