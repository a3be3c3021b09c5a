"""A layer's decode phase as a value: what it takes, what it refuses, and what it keeps."""

import pytest
import torch
from strategies import cache, same_bits, view_of

from kvprism.errors import BadInput, ProfileMismatch, UnknownName, Unsupported
from kvprism.evictions import EVICTIONS
from kvprism.merge import cam
from kvprism.plans import LayerPlan
from kvprism.retention import FULL_KV, Retention, decode_policies, phase_of, retained
from kvprism.routes import Route, parse_layers
from kvprism.tensors import LayerKV, LayerView

TOKENS, HEADS = 60, 2


def layer() -> LayerView:
    return view_of(cache(layers=1, heads=HEADS, tokens=TOKENS, channels=8), window=8)[0]


def test_a_retention_is_read_from_a_name_and_a_number_of_tokens() -> None:
    assert (
        Retention.parse("h2o", "256tok") == Retention.parse("h2o", " 256 ") == Retention("h2o", 256)
    )
    assert str(Retention("h2o", 256)) == "h2o@256tok"
    assert Retention.parse("full", None) == FULL_KV and str(FULL_KV) == "full"


@pytest.mark.parametrize("budget", ["30%", "0.3", "512MiB", "-5tok", "", "many"])
def test_a_budget_that_is_not_in_tokens_is_refused(budget: str) -> None:
    with pytest.raises(BadInput, match="tokens per layer, such as 256tok"):
        Retention.parse("h2o", budget)


def test_a_policy_and_its_budget_come_together() -> None:
    with pytest.raises(BadInput, match="'h2o' needs a budget such as 256tok, got None"):
        Retention("h2o")
    with pytest.raises(BadInput, match="'full' takes no budget such as 256tok, got 9"):
        Retention("full", 9)


def test_below_the_protected_tokens_the_least_budget_is_named() -> None:
    for name in decode_policies()[1:]:
        least = EVICTIONS[name].sinks + EVICTIONS[name].recent
        Retention(name, least)
        with pytest.raises(BadInput, match=f"{name!r} protects {least} tokens.*got {least - 1}"):
            Retention(name, least - 1)


def test_what_cannot_evict_during_decode_says_what_can() -> None:
    assert {"full", "h2o", "tova", "streaming-llm", "snapkv", "cam"} <= set(decode_policies())
    for name in set(EVICTIONS) - set(decode_policies()):
        with pytest.raises(Unsupported, match=rf"{name!r} does not evict.*\['full', .*'h2o'"):
            Retention(name, 100)
    for name in ("h20", "raw", "spectrum"):
        with pytest.raises(UnknownName, match=f"unknown decode-phase policy '{name}'; known: full"):
            Retention(name, 100)


def test_within_its_budget_a_layer_is_left_alone() -> None:
    assert retained(Retention("h2o", TOKENS), layer()) is None
    assert retained(FULL_KV, layer()) is None


def test_heads_are_padded_to_each_other_with_zeros() -> None:
    view = layer()
    after, kept = retained(Retention("h2o", 40), view) or pytest.fail("nothing was evicted")
    assert kept.sum(dim=1).tolist() == [40, 40] and after.held is not None
    assert torch.equal(after.positions, kept.any(dim=0).nonzero().flatten())
    for name, x in after.components.items():
        assert (x[~after.held] == 0).all()
        assert same_bits(x[after.held], view.kv.components[name][kept])


def test_a_row_that_a_head_does_not_hold_is_never_kept() -> None:
    view = layer()
    held = torch.rand(HEADS, TOKENS, generator=torch.Generator().manual_seed(1)) < 0.8
    held[:, -8:] = True
    rows = {name: x * held[..., None] for name, x in view.kv.components.items()}
    ragged = LayerView(LayerKV(0, rows, view.kv.positions, held), view.queries,
                       view.softmax_scale, None, view.mass)  # fmt: skip
    for name in decode_policies()[1:]:
        _, kept = retained(Retention(name, 36), ragged) or pytest.fail("nothing was evicted")
        assert not (kept & ~held).any() and kept.any()


def test_a_merging_policy_merges_what_it_evicts() -> None:
    view = layer()
    after, kept = retained(Retention("cam", 40), view) or pytest.fail("nothing was evicted")
    tiers = (~kept).to(torch.uint8).numpy() * 3
    merged = cam(view, LayerPlan(view.kv.shape(), {"k": tiers, "v": tiers}))
    present = kept.any(dim=0)
    values = merged.components["v"][:, present]
    assert not same_bits(merged.components["v"][kept], view.kv.components["v"][kept])
    assert same_bits(after.components["v"][kept[:, present]], values[kept[:, present]])


def test_a_route_is_a_decode_phase_of_its_own_or_the_prompts() -> None:
    prompt, own = parse_layers("0: tova@60, 1: keydiff@140"), parse_layers("0: full, 1: h2o@50")
    routes = [
        Route("polykv", 100, prompt),
        Route("polykv", 50, parse_layers("0-1: tova@50"), decode=own),
    ]
    assert phase_of(routes, "polykv", 100) == (Retention("tova", 60), Retention("keydiff", 140))
    assert phase_of(routes, "polykv", 50) == (FULL_KV, Retention("h2o", 50))
    with pytest.raises(ProfileMismatch, match="'polykv-best' follows a route, and there is none"):
        phase_of(routes, "polykv-best", 100)
    with pytest.raises(BadInput, match="at 99tok: the profile's routes are for 50tok, 100tok"):
        phase_of(routes, "polykv", 99)
    for line, refused in (("0-1: lavender@9", UnknownName), ("0-1: d2o@99", Unsupported),
                          ("0-1: h2o@9", BadInput)):  # fmt: skip
        tokens = int(line.partition("@")[2])
        route = Route("polykv", tokens, parse_layers(line))
        with pytest.raises(refused, match=r"decode-phase policy|does not evict"):
            phase_of([route], "polykv", tokens)
