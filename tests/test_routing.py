"""Routed policies: every layer keeps its number of tokens by its own policy's scores, exactly."""

from dataclasses import replace
from functools import lru_cache
from math import ceil

import numpy as np
import pytest
from numpy.typing import NDArray
from strategies import NATIVE, cache, view_of

from kvprism.codec.stream import decode, encode
from kvprism.core import Budget, Capability, KVShape
from kvprism.errors import (
    BadInput,
    BudgetTooSmall,
    MissingSignal,
    ProfileMismatch,
    UnknownName,
    Unsupported,
)
from kvprism.evictions import EVICTIONS, Protection
from kvprism.planning import (
    DEFAULT_OPTIONS,
    PlanOptions,
    code_of,
    plan,
    plan_shape,
    smallest_nbytes,
)
from kvprism.plans import Plan
from kvprism.policies import signals_of
from kvprism.profiles import Profile
from kvprism.routes import Route, parse_layers
from kvprism.tensors import LayerView, RequestKV

TOKENS, HEADS = 160, 2
PER_HEAD = Capability(drop="per_head")
# TOVA shares a token between heads, the others choose by head: units of two sizes.
LINE = "0: tova@90, 1: snapkv@60, 2: ada-kv@70, 3: h2o@100"


@lru_cache
def prompt() -> RequestKV:
    return cache(layers=4, heads=HEADS, tokens=TOKENS, channels=32)


@lru_cache
def prompt_view() -> tuple[LayerView, ...]:
    return view_of(prompt(), window=32)


def profile_of(*lines: str, policy: str = "polykv") -> Profile:
    routes = []
    for line in lines:
        layers = parse_layers(line)
        mean = sum(layer.tokens or TOKENS for layer in layers) // len(layers)
        routes.append(Route(policy, mean, layers))
    return Profile("ab" * 32, routes=tuple(routes))


def planned(
    profile: Profile,
    budget: str | Budget = "80tok",
    by_head: bool = True,
    options: PlanOptions = DEFAULT_OPTIONS,
) -> Plan:
    capability = PER_HEAD if by_head else Capability()
    return plan(
        prompt_view(), "polykv", budget, options=options, profile=profile, capability=capability
    )


def kept(chosen: Plan, layer: int) -> NDArray[np.bool_]:
    """bool `[head, token]`, the same for keys and values."""
    tiers = chosen.layers[layer].tier_of
    assert (tiers["k"] == tiers["v"]).all()
    return tiers["k"] == NATIVE


@pytest.mark.parametrize("protection", [None, Protection(4, 36)])
@pytest.mark.parametrize("by_head", [False, True])
def test_every_layer_has_its_tokens_and_the_budget_is_exact(
    by_head: bool, protection: Protection | None
) -> None:
    options = PlanOptions(protection=protection)
    chosen = planned(profile_of(LINE), by_head=by_head, options=options)
    stream = encode(prompt(), chosen)
    limit = Budget.parse("80tok", chosen.shape).nbytes
    assert len(stream) == chosen.nbytes <= limit and chosen.policy == "polykv"
    # Framing takes its bytes from all layers alike, in proportion to what is not protected.
    overhead = chosen.nbytes - sum(int(kept(chosen, i).sum()) for i in range(4)) * 2 * 32 * 2
    missing = (overhead + 2 * HEADS * 32 * 2) / (2 * HEADS * 32 * 2)
    for layer, its in enumerate(parse_layers(LINE)):
        per_head = kept(chosen, layer).sum() / HEADS
        assert its.tokens is not None and its.tokens - missing <= per_head <= its.tokens
        if protection is not None:
            assert kept(chosen, layer)[:, :4].all() and kept(chosen, layer)[:, -36:].all()
    assert decode(stream, drop="per_head").next_position == TOKENS


def test_a_layer_keeps_what_its_own_policy_ranks_highest() -> None:
    chosen = planned(profile_of(LINE))
    for layer, its in enumerate(parse_layers(LINE)):
        row = EVICTIONS[its.policy]
        rows = kept(chosen, layer)
        assert rows[:, TOKENS - row.recent :].all()
        scores = row.scorer(prompt_view()[layer]).double().numpy()[:, : TOKENS - row.recent]
        if row.heads == "shared":
            scores = scores.mean(axis=0, keepdims=True).repeat(HEADS, 0)
        for score, held in zip(scores, rows[:, : TOKENS - row.recent], strict=True):
            assert score[held].min() >= score[~held].max()


def test_equal_routes_are_the_single_policy() -> None:
    for policy in ("tova", "snapkv", "streaming-llm"):
        routed = planned(profile_of(f"0-3: {policy}@80"))
        single = plan(prompt_view(), policy, "80tok", capability=PER_HEAD)
        for layer in range(4):
            assert (kept(routed, layer) == kept(single, layer)).all()


def test_full_layers_cost_what_they_are() -> None:
    chosen = planned(profile_of("0: full, 1-3: snapkv@60"), "85tok")
    assert kept(chosen, 0).all()
    counts = [int(kept(chosen, layer).sum()) for layer in (1, 2, 3)]
    assert max(counts) - min(counts) <= 1 and chosen.nbytes <= 85 * 4 * 2 * HEADS * 32 * 2
    with pytest.raises(BudgetTooSmall, match="polykv"):
        planned(profile_of("0-1: full, 2-3: snapkv@60"), "85tok")


def test_a_budget_finds_the_route_that_was_made_for_it() -> None:
    profile = profile_of("0-3: tova@60", "0-3: streaming-llm@100")
    for budget, its in (("60tok", "tova"), ("70tok", "tova"), ("100tok", "streaming-llm")):
        single = plan(prompt_view(), its, budget, capability=PER_HEAD)
        for layer in range(4):
            assert (kept(planned(profile, budget), layer) == kept(single, layer)).all()
    bytes_of_100 = Budget.parse("100tok", prompt().shape())
    assert planned(profile, bytes_of_100).layers[0].tier_of["k"].shape == (HEADS, TOKENS)
    with pytest.raises(BadInput, match=r"at 145 tokens a layer: .* for 60tok, 100tok, .*calibrate"):
        planned(profile, "145tok")
    least = smallest_nbytes(prompt().shape(), "polykv", profile=profile)
    assert least == ceil(60 / 2**0.5 * 4 * 2 * HEADS * 32 * 2)
    assert planned(profile, Budget(least)).nbytes <= least
    with pytest.raises(BudgetTooSmall, match=f"'polykv': {least - 1} bytes .* at least {least} "):
        planned(profile, Budget(least - 1))


def test_a_prompt_shorter_than_the_budget_is_not_compressed() -> None:
    chosen = planned(profile_of("0-3: snapkv@200"), "200tok")
    assert all(kept(chosen, layer).all() for layer in range(4)) and chosen.fraction > 1


def test_a_layer_that_holds_fewer_tokens_passes_on_the_rest() -> None:
    chosen = planned(profile_of("0: tova@300, 1-3: tova@60"), "120tok")
    counts = [int(kept(chosen, layer)[0].sum()) for layer in range(4)]
    assert counts[0] == TOKENS and max(counts[1:]) - min(counts[1:]) <= 1 and counts[1] > 90


def test_what_does_not_fit_the_model_is_refused() -> None:
    shape, options = prompt().shape(), PlanOptions()
    with pytest.raises(ProfileMismatch, match=r"route for 4 layers, got no profile.*calibrate"):
        plan(prompt_view(), "polykv", "80tok")
    with pytest.raises(ProfileMismatch, match="a profile without one"):
        code_of(shape, "polykv-best", options, profile_of(LINE))
    with pytest.raises(ProfileMismatch, match=r"4 layers, the profile's is for 2.*this model"):
        code_of(shape, "polykv", options, profile_of("0-1: tova@80"))
    with pytest.raises(UnknownName, match="unknown eviction policy 'tovah'"):
        code_of(shape, "polykv", options, profile_of("0-3: tovah@80"))
    with pytest.raises(BadInput, match=r"'floor\+0.04' counts from a floor"):
        planned(profile_of(LINE), "floor+0.04")
    with pytest.raises(BudgetTooSmall):
        planned(profile_of("0-3: streaming-llm@20"), "20tok")  # 36 are protected
    with pytest.raises(Unsupported, match="drop=none"):
        plan(prompt_view(), "polykv", "80tok", profile=profile_of(LINE),
             capability=Capability(drop="none"))  # fmt: skip


def test_a_capture_is_asked_for_the_union_of_what_the_layers_need() -> None:
    assert signals_of(["polykv"], profile_of(LINE)) == {"mass"}
    assert signals_of(["polykv"], profile_of("0: full, 1-3: tova@80")) == frozenset()
    both = profile_of("0-1: h2o@80, 2-3: expected-attention@80")
    assert signals_of(["polykv"], both) == {"mass", "future_queries"}
    assert signals_of(["polykv-best"], both) == frozenset()
    assert signals_of(["polykv"]) == {"mass", "future_queries", "output_norms"}
    bare = [replace(view, mass=None) for view in prompt_view()]
    with pytest.raises(MissingSignal, match="layer 3: h2o"):
        plan(bare, "polykv", "80tok", profile=profile_of(LINE))


def test_a_dry_run_differs_by_no_more_than_padding() -> None:
    shape, profile = prompt().shape(), profile_of(LINE)
    dry = plan_shape(shape, "polykv", "80tok", profile=profile)
    real = planned(profile, by_head=False)
    assert abs(dry.nbytes - real.nbytes) <= 2 * 4 * 256 + HEADS * 2 * 64
    without = plan_shape(shape, "polykv", "80tok")
    assert abs(without.nbytes - real.nbytes) <= 2 * 4 * 256 + HEADS * 2 * 64
    assert 0 < smallest_nbytes(shape, "polykv", profile=profile) < dry.nbytes
    assert smallest_nbytes(shape, "polykv") > 0


def test_nominal_budgets_count_payload() -> None:
    chosen = plan(prompt_view(), "polykv", 0.5, nominal=True, profile=profile_of(LINE))
    held = sum(int(kept(chosen, layer).sum()) for layer in range(4))
    assert 0 <= 0.5 * 4 * HEADS * TOKENS - held < HEADS


def test_windowed_layers_count_at_most_what_they_hold() -> None:
    """A token budget of layers with windows still finds the route that it was made for."""
    long = KVShape.dense(layers=3, heads=HEADS, channels=32, tokens=TOKENS)
    short = KVShape.dense(layers=4, heads=HEADS, channels=32, tokens=70).layers[3]
    shape = KVShape((*long.layers, short))
    profile = profile_of("0-3: tova@80")
    assert plan_shape(shape, "polykv", "80tok", profile=profile).shape == shape
