"""Merging policies against slow transcriptions of their formulas, and where the rewrite acts."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peers import TOKEN, exchanged
from score import slow
from strategies import DROP, NATIVE, cache, plan_of, same_bits, same_cache, view_of

from kvprism.codec.stream import decode, encode
from kvprism.core import Capability
from kvprism.errors import MissingSignal
from kvprism.merge import MERGE_BUDGET, cam, d2o, merge_chances
from kvprism.pipeline import Receiver
from kvprism.planning import plan, plan_shape
from kvprism.plans import LayerPlan
from kvprism.tensors import LayerKV, LayerView, RequestKV

TOKENS, HEADS = 90, 2
PER_HEAD = Capability(drop="per_head")


def layer(seed: int = 0, dtype: str = "float32", window: int | None = 8) -> LayerView:
    kv = cache(layers=1, heads=HEADS, tokens=TOKENS, channels=8, dtype=dtype, seed=seed)
    [view] = view_of(kv, window=window)
    return view


def some(view: LayerView, share: float = 0.4, by_head: bool = True, seed: int = 1) -> LayerPlan:
    """A plan that keeps the last 8 tokens and others at random."""
    rng = np.random.default_rng(seed)
    kept = rng.random((HEADS if by_head else 1, TOKENS)) < share
    kept[:, -8:] = True
    kv = RequestKV((view.kv,), TOKENS)
    return plan_of(kv, np.where(kept, np.uint8(NATIVE), np.uint8(DROP))).layers[0]


def kept_of(planned: LayerPlan) -> NDArray[np.bool_]:
    kept: NDArray[np.bool_] = planned.tier_of["k"] == NATIVE
    return kept


def slow_cam(view: LayerView, kept: NDArray[np.bool_]) -> NDArray[np.float64]:
    weights = slow.attention(view)
    values = view.kv.components["v"].double().numpy()
    seed = (TOKENS - 1) * 2**16 + view.kv.layer_id
    drawn = torch.rand(HEADS, TOKENS, generator=torch.Generator().manual_seed(seed))
    merged = values.copy()
    for head in range(HEADS):
        group = slow.group_of(view, head)
        attention = [
            sum(weights[q, w, j] for q in group for w in range(weights.shape[1]))
            / (len(group) * weights.shape[1])
            for j in range(TOKENS)
        ]
        highest = max(attention[-32:])
        for i in range(TOKENS):
            after = [j for j in range(i + 1, TOKENS) if kept[head, j]][:MERGE_BUDGET]
            chance = min(1.0, attention[i] / highest)
            assert abs(float(drawn[head, i]) - chance) > 1e-5  # else rounding would decide
            if not kept[head, i] and float(drawn[head, i]) < chance:
                for j in after:
                    merged[head, j] += values[head, i] / len(after)
    return merged


def slow_d2o(view: LayerView, kept: NDArray[np.bool_]) -> dict[str, NDArray[np.float64]]:
    x = {name: y.double().numpy() for name, y in view.kv.components.items()}
    out = {name: y.copy() for name, y in x.items()}
    for head in range(HEADS):
        keys = x["k"][head]
        best: dict[int, tuple[float, int]] = {}
        for i in np.flatnonzero(~kept[head]):
            best[int(i)] = max(
                (float(keys[i] @ keys[j] / math.sqrt(keys[i] @ keys[i] * (keys[j] @ keys[j]))), j)
                for j in np.flatnonzero(kept[head])
            )
        threshold = sum(u for u, _ in best.values()) / len(best)
        for j in np.flatnonzero(kept[head]):
            near = [(i, u) for i, (u, to) in best.items() if to == j and u >= threshold]
            joining = [(i, math.exp(u)) for i, u in near]
            for name in ("k", "v"):
                total = math.e + sum(w for _, w in joining)
                out[name][head, j] = math.e * x[name][head, j] / total
                for i, weight in joining:
                    out[name][head, j] += weight * x[name][head, i] / total
    return out


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_cam_adds_dropped_values_to_the_kept_ones_after_them(by_head: bool, seed: int) -> None:
    view = layer(seed)
    planned = some(view, by_head=by_head)
    kept, got = kept_of(planned), cam(view, planned)
    expected = slow_cam(view, kept)
    assert not np.allclose(expected[kept], view.kv.components["v"].double().numpy()[kept])
    # Sums are float64 on both sides; the result is rounded to float32 once.
    np.testing.assert_allclose(got.components["v"].numpy()[kept], expected[kept], rtol=2**-22,
                               atol=1e-12)  # fmt: skip
    assert same_bits(got.components["k"], view.kv.components["k"])


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_d2o_merges_what_is_similar_enough(monkeypatch, by_head: bool, seed: int) -> None:
    monkeypatch.setattr("kvprism.merge.CHUNK", 16)  # several chunks of the dropped tokens
    view = layer(seed)
    planned = some(view, by_head=by_head)
    kept, got = kept_of(planned), d2o(view, planned)
    for name, expected in slow_d2o(view, kept).items():
        own = view.kv.components[name].double().numpy()
        changed = ~np.isclose(expected, own).all(axis=-1) & kept
        assert 0 < changed.sum() < kept.sum()
        np.testing.assert_allclose(got.components[name].numpy()[kept], expected[kept],
                                   rtol=2**-22, atol=1e-12)  # fmt: skip


@pytest.mark.parametrize("rewrite", [cam, d2o])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_only_kept_rows_change_and_positions_are_true(rewrite, dtype: str) -> None:
    view = layer(dtype=dtype)
    planned = some(view)
    before = {name: x.clone() for name, x in view.kv.components.items()}
    got, kept = rewrite(view, planned), torch.from_numpy(kept_of(planned))
    assert torch.equal(got.positions, view.kv.positions) and got.shape() == view.kv.shape()
    for name, x in got.components.items():
        assert same_bits(x[~kept], before[name][~kept])
        assert same_bits(view.kv.components[name], before[name])  # the capture is left as it was
    again = rewrite(view, planned)
    assert all(same_bits(x, again.components[name]) for name, x in got.components.items())


@pytest.mark.parametrize("rewrite", [cam, d2o])
def test_when_nothing_is_dropped_or_all_nothing_changes(rewrite) -> None:
    view = layer()
    kv = RequestKV((view.kv,), TOKENS)
    for tier in (NATIVE, DROP):
        got = rewrite(view, plan_of(kv, np.full((1, TOKENS), tier, np.uint8)).layers[0])
        assert all(same_bits(x, view.kv.components[name]) for name, x in got.components.items())


@pytest.mark.parametrize("rewrite", [cam, d2o])
def test_rows_that_are_not_finite_are_not_merged_and_do_not_overflow(rewrite) -> None:
    view = layer(dtype="float16")
    planned = some(view)
    values = view.kv.components["v"]
    values[:, 3:20] = torch.inf
    values[:, 30:] = 60000.0  # a few of them together leave float16's range
    got, kept = rewrite(view, planned), torch.from_numpy(kept_of(planned))
    broken = ~values.isfinite().all(dim=-1)
    after = got.components["v"]
    assert after[kept & ~broken].isfinite().all()
    assert same_bits(after[kept & broken], values[kept & broken])


@pytest.mark.parametrize("rewrite", [cam, d2o])
def test_padding_of_heads_is_neither_kept_nor_merged(rewrite) -> None:
    view = layer(window=1)
    planned = some(view)
    held = torch.rand(HEADS, TOKENS, generator=torch.Generator().manual_seed(3)) < 0.7
    held[:, -8:] = True
    rows = {name: torch.where(held[..., None], x, 1e6) for name, x in view.kv.components.items()}
    padded = replace(view, kv=LayerKV(0, rows, view.kv.positions, held))
    got = rewrite(padded, planned)
    for name, x in got.components.items():
        assert x[held].abs().max() < 1e3
        assert (x[~held] == 1e6).all(), name


def test_chances_grow_with_attention_up_to_one() -> None:
    chances = merge_chances(layer())
    assert chances.shape == (HEADS, TOKENS)
    assert (chances >= 0).all() and (chances <= 1).all() and (chances == 1).any()


def test_cam_needs_the_window() -> None:
    view = layer()
    with pytest.raises(MissingSignal, match=r"layer 0: .*capture with window >= 1"):
        cam(layer(window=None), some(view))


def prompt() -> tuple[RequestKV, tuple[LayerView, ...]]:
    kv = cache(layers=2, heads=HEADS, tokens=TOKENS, channels=16)
    return kv, view_of(kv, window=32)


def expected_after(policy: str, views: tuple[LayerView, ...], chosen) -> list[LayerKV]:
    rewrite = {"cam": cam, "d2o": d2o}[policy]
    return [rewrite(view, la) for view, la in zip(views, chosen.layers, strict=True)]


@pytest.mark.parametrize("policy", ["cam", "d2o"])
@pytest.mark.parametrize("capability", [Capability(), PER_HEAD])
def test_a_stream_holds_the_rewritten_rows_whoever_encodes_it(policy, capability) -> None:
    kv, views = prompt()
    chosen = plan(views, policy, 0.55, capability=capability)
    stream = encode(kv, chosen)
    with Receiver(TOKEN, capability=PER_HEAD) as receiver:
        sent, received = exchanged(receiver, kv, chosen)
    assert sent.wire_nbytes == chosen.nbytes
    assert same_cache(received.kv, decode(stream, drop="per_head"))
    assert len(stream) == chosen.nbytes <= 0.55 * chosen.shape.reference_nbytes
    got = decode(stream, drop="per_head")
    for after, merged, before, planned in zip(
        got.layers, expected_after(policy, views, chosen), kv.layers, chosen.layers, strict=True
    ):
        kept = torch.from_numpy(kept_of(planned))
        assert kept[:, -32:].all()
        assert after.positions.tolist() == kept.any(dim=0).nonzero().flatten().tolist()
        rows = kept[:, after.positions]
        same = {
            name: same_bits(x[rows], before.components[name][:, after.positions][rows])
            for name, x in after.components.items()
        }
        assert same == {"k": policy == "cam", "v": False}
        for name, x in after.components.items():
            assert same_bits(x[rows], merged.components[name][:, after.positions][rows])


@pytest.mark.parametrize("policy", ["cam", "d2o"])
def test_a_rewrite_is_of_the_tensors_that_are_encoded(policy: str) -> None:
    """A plan may be kept and used for the same request in other tensors, such as a copy."""
    views = prompt()[1]
    chosen = plan(views, policy, 0.55)
    other = cache(layers=2, heads=HEADS, tokens=TOKENS, channels=16, seed=9)
    got = decode(encode(other, chosen))
    moved = tuple(replace(v, kv=la) for v, la in zip(views, other.layers, strict=True))
    for after, merged in zip(got.layers, expected_after(policy, moved, chosen), strict=True):
        for name, x in after.components.items():
            assert same_bits(x, merged.components[name][:, after.positions])


@pytest.mark.parametrize("policy", ["cam", "d2o"])
def test_a_dry_run_has_no_rewrite(policy: str) -> None:
    dry = plan_shape(prompt()[0].shape(), policy, "0.55")
    assert all(layer.rewrite is None for layer in dry.layers)
