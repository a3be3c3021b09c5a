"""The eviction rows: who chooses what, what is protected, and what they need; bytes and memory."""

from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from strategies import NATIVE, cache, same_bits, view_of

from kvprism.codec.stream import decode, encode
from kvprism.core import Budget, Capability
from kvprism.errors import BadInput, BudgetTooSmall, CodecError, MissingSignal, UnknownName
from kvprism.evictions import EVICTIONS, Protection
from kvprism.planning import PlanOptions, plan, plan_shape, smallest_nbytes
from kvprism.plans import Plan
from kvprism.policies import POLICIES, signals_of
from kvprism.tensors import LayerKV, LayerView, RequestKV

TOKENS, LAYERS, HEADS = 160, 3, 2
PER_HEAD = Capability(drop="per_head")
# What each of them needs of a capture beyond the cache, and who decides by head in its paper.
WITHOUT_QUERIES = ["streaming-llm", "h2o", "d2o", "keydiff", "knorm", "expected-attention"]
SHARED = ["streaming-llm", "tova"]
MERGING = ["cam", "d2o"]
UNEVEN_LAYERS = ["pyramidkv", "cake", "lava", "layer-defensivekv"]
UNEVEN_HEADS = ["ada-kv", "lava", "defensivekv", "layer-defensivekv"]


@lru_cache
def prompt() -> RequestKV:
    return cache(layers=LAYERS, heads=HEADS, tokens=TOKENS, channels=32)


@lru_cache
def prompt_view() -> tuple[LayerView, ...]:
    """Layers and heads that attend more and more sharply, and whose queries agree more and more."""
    views = []
    for i, view in enumerate(view_of(prompt(), window=32)):
        assert view.queries is not None
        queries = torch.lerp(view.queries, view.queries[:, :1], i / LAYERS)
        sharper = torch.tensor([1.0, 1.0, 2.0, 2.0])[:, None, None] * (1 + i)
        views.append(replace(view, queries=queries * sharper))
    return tuple(views)


def planned(policy: str, budget: str | Budget = "0.45", by_head: bool = True) -> Plan:
    capability = PER_HEAD if by_head else Capability()
    return plan(prompt_view(), policy, budget, capability=capability)


def kept(chosen: Plan, layer: int) -> NDArray[np.bool_]:
    """bool `[head, token]`, the same for keys and values."""
    tiers = chosen.layers[layer].tier_of
    assert (tiers["k"] == tiers["v"]).all()
    return tiers["k"] == NATIVE


def scores(policy: str, layer: int) -> NDArray[np.float64]:
    return EVICTIONS[policy].scorer(prompt_view()[layer]).double().numpy()


@pytest.mark.parametrize("policy", EVICTIONS)
@pytest.mark.parametrize("by_head", [False, True])
def test_the_budget_is_exact_and_protected_tokens_are_kept(policy: str, by_head: bool) -> None:
    chosen = planned(policy, by_head=by_head)
    stream = encode(prompt(), chosen)
    assert len(stream) == chosen.nbytes
    # One unit, and the padding of two planes in each layer, may be left over.
    left = 0.45 * chosen.shape.reference_nbytes - chosen.nbytes
    assert 0 <= left < 2 * HEADS * 32 * 2 + 2 * LAYERS * 256
    row = EVICTIONS[policy]
    for layer in range(LAYERS):
        rows = kept(chosen, layer)
        assert rows[:, : row.sinks].all() and rows[:, TOKENS - row.recent :].all()
        assert set(np.unique(chosen.layers[layer].tier_of["k"])) == {NATIVE, 3}


@pytest.mark.parametrize("policy", EVICTIONS)
def test_the_best_scores_are_kept(policy: str) -> None:
    """Within a head where heads choose, else by the mean over heads."""
    row, by_head, shared = EVICTIONS[policy], planned(policy), planned(policy, by_head=False)
    free = slice(row.sinks, TOKENS - row.recent)
    for layer in range(LAYERS):
        score = scores(policy, layer)[:, free]
        rows = kept(shared, layer)[:, free]
        assert (rows == rows[0]).all()
        mean = score.astype(np.float32).mean(axis=0)
        assert mean[rows[0]].min(initial=np.inf) >= mean[~rows[0]].max(initial=-np.inf)
        if row.heads == "shared":
            continue
        for head, kept_row in enumerate(kept(by_head, layer)[:, free]):
            inside, outside = score[head][kept_row], score[head][~kept_row]
            assert inside.min(initial=np.inf) >= outside.max(initial=-np.inf)


@pytest.mark.parametrize("policy", EVICTIONS)
def test_layers_and_heads_share_as_the_papers_say(policy: str) -> None:
    counts = np.array([kept(planned(policy), layer).sum(axis=1) for layer in range(LAYERS)])
    spread = np.ptp(counts.sum(axis=1))
    assert (spread > 2 * HEADS) == (policy in UNEVEN_LAYERS), counts
    assert (np.ptp(counts, axis=1).max() > 1) == (policy in UNEVEN_HEADS), counts
    same = [(kept(planned(policy), layer) == kept(planned(policy), layer)[0]).all()
            for layer in range(LAYERS)]  # fmt: skip
    assert all(same) if policy in SHARED else not any(same)


def test_the_pyramid_narrows() -> None:
    counts = [int(kept(planned("pyramidkv"), layer).sum()) for layer in range(LAYERS)]
    assert counts == sorted(counts, reverse=True) and counts[0] - counts[-1] > TOKENS // 4


def test_layer_defensivekv_keeps_the_best_of_all_layers() -> None:
    chosen, free = planned("layer-defensivekv"), slice(0, TOKENS - 32)
    inside, outside = [], []
    for layer in range(LAYERS):
        score, rows = scores("layer-defensivekv", layer)[:, free], kept(chosen, layer)[:, free]
        inside.append(score[rows])
        outside.append(score[~rows])
    assert np.concatenate(inside).min() >= np.concatenate(outside).max()


def test_streaming_llm_is_sinks_and_recent_tokens() -> None:
    for layer in range(LAYERS):
        at = np.flatnonzero(kept(planned("streaming-llm"), layer)[0]).tolist()
        assert at == [0, 1, 2, 3, *range(TOKENS - len(at) + 4, TOKENS)]


@pytest.mark.parametrize("policy", EVICTIONS)
@pytest.mark.parametrize("by_head", [False, True])
def test_bytes_are_freed_on_the_wire_and_in_memory(policy: str, by_head: bool) -> None:
    kv, chosen = prompt(), planned(policy, "0.40", by_head)
    got = decode(encode(kv, chosen), drop="per_head" if by_head else "uniform")
    assert got.next_position == TOKENS and got.resident_nbytes < kv.resident_nbytes
    if not by_head:
        assert got.resident_nbytes < 0.40 * kv.resident_nbytes
    for layer, whole, number in zip(got.layers, kv.layers, range(LAYERS), strict=True):
        rewrite = chosen.layers[number].rewrite
        assert (rewrite is not None) == (policy in MERGING)
        whole = whole if rewrite is None else rewrite(whole)
        rows = kept(chosen, number)
        assert layer.positions.tolist() == np.flatnonzero(rows.any(axis=0)).tolist()
        held = torch.from_numpy(rows[:, layer.positions])
        assert held.all() if layer.held is None else torch.equal(layer.held, held)
        for name, x in layer.components.items():
            assert same_bits(x[held], whole.components[name][:, layer.positions][held])


@pytest.mark.parametrize("policy", [name for name in EVICTIONS if name not in SHARED])
def test_a_plan_by_head_is_refused_where_one_set_of_tokens_is_held(policy: str) -> None:
    with pytest.raises(CodecError, match=r"one set of tokens per layer.*drop='per_head' holds"):
        decode(encode(prompt(), planned(policy)))


@pytest.mark.parametrize("policy", EVICTIONS)
@pytest.mark.parametrize("by_head", [False, True])
def test_plans_are_deterministic(policy: str, by_head: bool) -> None:
    first, second = (encode(prompt(), planned(policy, by_head=by_head)) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("policy", EVICTIONS)
def test_a_context_within_the_budget_is_not_compressed(policy: str) -> None:
    for kv in (prompt(), cache(layers=2, tokens=3), cache(layers=2, tokens=1)):
        chosen = plan(view_of(kv), policy, Budget(2 * kv.resident_nbytes + 10_000))
        assert chosen.histogram()["drop"] == 0


@pytest.mark.parametrize("policy", EVICTIONS)
def test_below_the_protected_tokens_the_minimum_is_named(policy: str) -> None:
    needed = smallest_nbytes(prompt().shape(), policy)
    for by_head in (False, True):
        assert planned(policy, Budget(needed), by_head).nbytes <= needed
        with pytest.raises(BudgetTooSmall, match=f"policy {policy!r}: .*at least {needed} "):
            planned(policy, Budget(needed - 1), by_head)


@pytest.mark.parametrize("policy", EVICTIONS)
@pytest.mark.parametrize("by_head", [False, True])
def test_under_one_protection_all_policies_keep_the_same_ends(policy: str, by_head: bool) -> None:
    capability = PER_HEAD if by_head else Capability()
    options = PlanOptions(protection=Protection(5, 40))
    chosen = plan(prompt_view(), policy, "0.45", options=options, capability=capability)
    assert len(encode(prompt(), chosen)) == chosen.nbytes <= 0.45 * chosen.shape.reference_nbytes
    for layer in range(LAYERS):
        assert kept(chosen, layer)[:, :5].all() and kept(chosen, layer)[:, -40:].all()
    needed = smallest_nbytes(prompt().shape(), policy, options)
    assert needed > smallest_nbytes(prompt().shape(), policy)
    dry = plan_shape(prompt().shape(), policy, Budget(needed), options)
    assert dry.nbytes <= needed and dry.histogram()["native"] >= LAYERS * HEADS * 2 * 45
    with pytest.raises(BudgetTooSmall, match=f"policy {policy!r}: .*at least {needed} "):
        plan(prompt_view(), policy, Budget(needed - 1), options=options, capability=capability)


def test_without_protection_the_last_tokens_may_go() -> None:
    options = PlanOptions(protection=Protection(0, 0))
    bare = plan(prompt_view(), "knorm", "0.2", options=options, capability=PER_HEAD)
    best = scores("knorm", 0)[0].argsort()[::-1][: kept(bare, 0)[0].sum()]
    assert set(np.flatnonzero(kept(bare, 0)[0])) == set(best)


@pytest.mark.parametrize("text", ["36", "4,32", "4+", "-1+32", "4+32+1", ""])
def test_protected_tokens_are_two_numbers(text: str) -> None:
    with pytest.raises(BadInput, match="such as 4\\+32"):
        Protection.parse(text)


def test_no_fewer_than_no_tokens_are_protected() -> None:
    with pytest.raises(BadInput, match="must not be negative"):
        Protection(-1, 32)


@pytest.mark.parametrize("policy", EVICTIONS)
def test_what_was_not_captured_is_missed_with_a_way_out(policy: str) -> None:
    bare = view_of(prompt(), window=None)
    needs = EVICTIONS[policy].signals or policy not in WITHOUT_QUERIES
    if needs:
        with pytest.raises(MissingSignal, match=r"layer 0: .* needs .*captured; .*choose "):
            plan(bare, policy, 0.45)
    else:
        plan(bare, policy, 0.45)


def test_a_capture_is_asked_for_what_its_policies_need() -> None:
    assert signals_of(["spectrum", "snapkv", "full"]) == frozenset()
    assert signals_of(["h2o", "snapkv"]) == {"mass"}
    assert signals_of(EVICTIONS) == {"mass", "future_queries", "output_norms"}
    with pytest.raises(UnknownName, match="unknown policy 'h20'"):
        signals_of(["h20"])


@pytest.mark.parametrize("policy", EVICTIONS)
def test_a_layer_with_a_window_takes_part_with_what_it_holds(policy: str) -> None:
    """As with a sliding window: layer 1 holds the last 40 tokens, and has no sink among them."""
    kv, view = prompt(), list(prompt_view())
    short = LayerKV(1, {n: x[:, -40:] for n, x in kv.layers[1].components.items()},
                    kv.layers[1].positions[-40:])  # fmt: skip
    own = {name: getattr(view[1], name)[:, -40:] for name in ("mass", "output_norms")}
    view[1] = replace(view[1], kv=short, **own)
    windowed = RequestKV((kv.layers[0], short, kv.layers[2]), TOKENS)
    for capability in (Capability(), PER_HEAD):
        chosen = plan(view, policy, 0.6, capability=capability)
        assert chosen.shape == windowed.shape() and 0.57 < chosen.fraction <= 0.6
        assert len(encode(windowed, chosen)) == chosen.nbytes
        assert kept(chosen, 1)[:, 40 - EVICTIONS[policy].recent :].all()


@pytest.mark.parametrize("policy", EVICTIONS)
def test_a_dry_run_differs_by_no_more_than_padding(policy: str) -> None:
    dry = plan_shape(prompt().shape(), policy, "0.45")
    real = planned(policy, by_head=False)
    assert abs(dry.nbytes - real.nbytes) <= 2 * LAYERS * 256 + HEADS * 2 * 64
    assert abs(dry.histogram()["native"] - real.histogram()["native"]) <= 2 * 2 * HEADS


def test_rows_say_in_one_line_what_they_are() -> None:
    for name, row in EVICTIONS.items():
        policy = POLICIES[name]
        assert policy.summary == row.summary and "\n" not in row.summary
        assert (policy.sinks, policy.recent) == (row.sinks, row.recent)
        assert policy.budgeted and policy.tempo == "whole_prompt"
