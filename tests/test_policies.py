"""Every row of the table: what it keeps, what it costs, and what it refuses."""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from strategies import (
    DROP,
    INT4,
    INT8,
    NATIVE,
    cache,
    conditioning_of,
    histogram,
    plan_of,
    same_cache,
    view_of,
)

from kvprism.codec.stream import decode, encode
from kvprism.core import (
    Budget,
    Capability,
    KVShape,
)
from kvprism.errors import (
    BadInput,
    BudgetTooSmall,
    MissingSignal,
    UnknownName,
    Unsupported,
)
from kvprism.evictions import EVICTIONS
from kvprism.layout import Split
from kvprism.planning import PlanOptions, layer_shares, plan, plan_shape, smallest_nbytes
from kvprism.plans import Plan
from kvprism.policies import POLICIES
from kvprism.profiles import LayerSetting, ProbeRecord, Profile
from kvprism.routes import Route, parse_layers
from kvprism.score import SCORERS, ranking
from kvprism.tensors import LayerKV, LayerView, RequestKV

TOKENS = 200
PLAIN = ["raw", "int8", "int4", "int4-sinks-recent"]
COMPARED = ["int4-affine", "int4-hadamard", "int4-grouped", "int4-kivi", "fp8"]
SPECTRUM = ["spectrum", "spectrum-layer", "spectrum-greedy", "spectrum-balanced", "spectrum-2tier"]
REMEDIES = ["spectrum-conditioned", "spectrum-adaptive"]
BASELINES = ["random-tiers", "random-drop", "sinks-recent", "pdtrim"]
VARIANTS = [f"polykv-{by}-{m}" for by in ("perplexity", "cosine")
            for m in ("uniform", "entropy", "perplexity")]  # fmt: skip
ROUTED = ["polykv", "polykv-best", *VARIANTS]
NAMES = [*PLAIN, *COMPARED, *SPECTRUM, *REMEDIES, *BASELINES, "full", *EVICTIONS, *ROUTED]
BUDGETED = [name for name, row in POLICIES.items() if row.budgeted]
DROPPING = ["spectrum-2tier", "random-drop", "sinks-recent", "pdtrim", *EVICTIONS, *ROUTED]
RANKING = [name for name in BUDGETED if POLICIES[name].order == "importance"]
WITH_SINKS = [name for name, row in POLICIES.items() if row.sinks]


@lru_cache
def prompt(dtype: str = "bfloat16", start: int = 0) -> RequestKV:
    """Made once: a test must not change it."""
    return cache(layers=3, heads=2, tokens=TOKENS, channels=64, dtype=dtype, start=start)


@lru_cache
def prompt_view() -> tuple[LayerView, ...]:
    return view_of(prompt())


ROUTES = tuple(
    Route(policy, tokens, parse_layers(layers))
    for policy in ROUTED
    for tokens, layers in (
        (60, "0: tova@40, 1-2: streaming-llm@70"),
        (100, "0: tova@80, 1-2: streaming-llm@110"),
    )
)


def profile_with(*settings: LayerSetting, drawn: RequestKV | None = None) -> Profile:
    """Conditioning for every layer but the first, and the probe's settings."""
    conditioning = (None, *conditioning_of(drawn or prompt())[1:])
    probe = ProbeRecord("no", "yes", settings, "as given")
    return Profile("ab" * 32, None, conditioning, probe, ROUTES)


PROFILE = profile_with("plain", "conditioned", "conditioned")


def planned(policy: str, budget: str | None = "0.5", view: Sequence[LayerView] = ()) -> Plan:
    given = budget if POLICIES[policy].budgeted else None
    return plan(view or prompt_view(), policy, given, profile=PROFILE)


def tiers_of(chosen: Plan, layer: int = 0) -> NDArray[np.uint8]:
    """The `[token]` tiers of a layer, which all its heads and components share."""
    rows = np.concatenate(list(chosen.layers[layer].tier_of.values()))
    assert (rows == rows[0]).all()
    return np.asarray(rows[0])


def indices(chosen: Plan, tier: int) -> list[int]:
    return np.flatnonzero(tiers_of(chosen) == tier).tolist()


def test_the_table_has_the_promised_rows() -> None:
    assert list(POLICIES) == NAMES


@pytest.mark.parametrize("policy", NAMES)
@pytest.mark.parametrize("codec", ["nested", "published"])
def test_every_policy_is_exact_within_its_budget_and_decodes(policy: str, codec: str) -> None:
    kv = prompt()
    budget = "0.55" if POLICIES[policy].budgeted else None
    row = POLICIES[policy]
    if codec == "published" and (row.remedy != "none" or row.code is not None):
        pytest.skip("refused: see test_policies_conditioned.py and test_policies_compared.py")
    chosen = plan(view_of(kv), policy, budget, options=PlanOptions(codec=codec), profile=PROFILE)
    stream = encode(kv, chosen, profile=PROFILE)
    assert len(stream) == chosen.nbytes and chosen.policy == policy
    if budget is not None:
        assert 0.53 < chosen.fraction <= 0.55
    got = decode(stream, profile=PROFILE)
    assert got.next_position == TOKENS
    assert got.layers[0].positions.tolist() == np.flatnonzero(tiers_of(chosen) != DROP).tolist()


@pytest.mark.parametrize(
    "policy, expected",
    [
        ("raw", {NATIVE: TOKENS}),
        ("full", {NATIVE: TOKENS}),
        ("int8", {INT8: TOKENS}),
        ("int4", {INT4: TOKENS}),
        ("int4-sinks-recent", {NATIVE: 132, INT4: 68}),
    ],
)
def test_fixed_rates_have_the_tiers_of_their_name(policy: str, expected: dict[int, int]) -> None:
    assert histogram(tiers_of(planned(policy))) == expected


def test_int4_sinks_recent_keeps_both_ends_native() -> None:
    chosen = planned("int4-sinks-recent")
    assert indices(chosen, NATIVE) == [0, 1, 2, 3, *range(TOKENS - 128, TOKENS)]
    short = plan(view_of(cache(tokens=100)), "int4-sinks-recent")
    assert short.histogram()["native"] == 100 * 8


@pytest.mark.parametrize("policy", WITH_SINKS)
def test_sinks_are_native(policy: str) -> None:
    chosen = planned(policy)
    for layer in range(3):
        assert (tiers_of(chosen, layer)[:4] == NATIVE).all()


@pytest.mark.parametrize("policy", WITH_SINKS)
def test_a_later_part_of_the_prompt_has_no_sinks(policy: str) -> None:
    whole, part = prompt().shape(), prompt(start=1000).shape()
    assert smallest_nbytes(part, policy) < smallest_nbytes(whole, policy)


def test_a_part_that_begins_among_the_sinks_keeps_those_that_it_has() -> None:
    kept = indices(planned("sinks-recent", "0.3", view_of(prompt(start=2))), NATIVE)
    assert kept == [0, 1, *range(TOKENS - len(kept) + 2, TOKENS)]


@pytest.mark.parametrize("policy", ["spectrum", "spectrum-greedy", "spectrum-balanced"])
def test_spectrum_gives_the_better_tiers_to_the_more_important_tokens(policy: str) -> None:
    view = prompt_view()
    tiers = tiers_of(planned(policy, "0.4", view)).astype(int)
    ranked = np.argsort(-ranking(view).numpy(), kind="stable")
    ranked = ranked[ranked >= POLICIES[policy].sinks]
    assert (np.diff(tiers[ranked]) >= 0).all()
    assert len(set(tiers[ranked].tolist())) > 1


def test_importance_is_what_the_options_say() -> None:
    view = prompt_view()
    for kind in SCORERS:
        chosen = plan(view, "spectrum-greedy", 0.4, options=PlanOptions(importance=kind))
        ranked = np.argsort(-ranking(view, kind).numpy(), kind="stable")
        n = len(indices(chosen, INT8))
        assert indices(chosen, INT8) == sorted(ranked[:n].tolist())
    undecayed = plan(view, "spectrum", 0.4, options=PlanOptions(decay=0.0))
    assert indices(undecayed, INT8) != indices(planned("spectrum", "0.4", view), INT8)


def test_two_tiers_drop_the_least_important_below_half() -> None:
    view = prompt_view()
    chosen = planned("spectrum-2tier", "0.3", view)
    assert set(tiers_of(chosen).tolist()) == {NATIVE, INT8, DROP}
    ranks = ranking(view).numpy()
    assert ranks[indices(chosen, DROP)].max() <= ranks[indices(chosen, INT8)].min()
    assert not indices(planned("spectrum-2tier", "0.7", view), DROP)


def test_random_tiers_have_the_counts_of_spectrum() -> None:
    view = prompt_view()
    for budget in ("0.3", "0.4", "0.52", "0.8"):
        spectrum, tossed = planned("spectrum", budget, view), planned("random-tiers", budget, view)
        assert spectrum.histogram() == tossed.histogram()
        assert not np.array_equal(tiers_of(spectrum), tiers_of(tossed))


@pytest.mark.parametrize("policy", ["random-tiers", "random-drop"])
def test_random_orders_follow_from_the_seed(policy: str) -> None:
    view = prompt_view()
    found = [
        tiers_of(plan(view, policy, 0.4, options=PlanOptions(seed=seed))).tolist()
        for seed in (0, 0, 1)
    ]
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("policy", NAMES)
def test_a_plan_is_the_same_every_time(policy: str) -> None:
    kv = prompt()
    first, second = (planned(policy, view=view_of(kv)) for _ in range(2))
    assert encode(kv, first, profile=PROFILE) == encode(kv, second, profile=PROFILE)


def test_sinks_recent_keeps_a_head_and_a_tail() -> None:
    chosen = planned("sinks-recent", "0.3")
    kept = indices(chosen, NATIVE)
    n = len(kept)
    assert kept == [0, 1, 2, 3, *range(TOKENS - n + 4, TOKENS)]
    assert len(indices(chosen, DROP)) == TOKENS - n > 100


def test_pdtrim_keeps_equal_first_and_last_parts() -> None:
    kept = indices(planned("pdtrim", "0.3"), NATIVE)
    first, last = sum(i < TOKENS // 2 for i in kept), sum(i >= TOKENS // 2 for i in kept)
    assert kept == [*range(first), *range(TOKENS - last, TOKENS)]
    assert abs(first - last) <= 1


def test_spectrum_layer_ranks_by_each_layers_own_attention() -> None:
    view = prompt_view()
    chosen = planned("spectrum-layer", "0.4", view)
    for i, layer in enumerate(view):
        ranked = np.argsort(-ranking([layer]).numpy(), kind="stable")
        ranked = ranked[ranked >= 4]
        assert (np.diff(tiers_of(chosen, i)[ranked].astype(int)) >= 0).all()
    assert not np.array_equal(tiers_of(chosen, 0), tiers_of(chosen, 1))


@pytest.mark.parametrize("budget", [0.3, 0.4, 0.52, 0.8])
def test_spectrum_layer_stays_within_the_budget(budget: float) -> None:
    assert budget - 0.02 < planned("spectrum-layer", str(budget)).fraction <= budget


def test_spectrum_layer_spends_what_the_profile_says() -> None:
    view = prompt_view()
    profile = Profile("ab" * 32, (1.0, 1.0, 2.0))
    chosen = plan(view, "spectrum-layer", 0.45, profile=profile)
    eight = [int((tiers_of(chosen, i) == INT8).sum()) for i in range(3)]
    assert eight[2] > eight[0] + 50 and abs(eight[0] - eight[1]) <= 1
    assert chosen.fraction <= 0.45
    assert layer_shares(chosen.shape, profile) == (1.0, 1.0, 2.0)
    assert layer_shares(chosen.shape, Profile("ab" * 32)) == (102400.0,) * 3


def test_a_profile_of_another_number_of_layers_is_refused() -> None:
    with pytest.raises(BadInput, match="3 layers need one share each, got 2"):
        plan(prompt_view(), "spectrum-layer", 0.4, profile=Profile("ab" * 32, (1.0, 2.0)))


@pytest.mark.parametrize("policy", NAMES)
def test_the_smallest_budget_does_and_a_byte_less_says_so(policy: str) -> None:
    kv = prompt()
    needed = smallest_nbytes(kv.shape(), policy, profile=PROFILE)
    assert plan(view_of(kv), policy, Budget(needed), profile=PROFILE).nbytes <= needed
    with pytest.raises(BudgetTooSmall, match=f"policy {policy!r}: .*at least {needed} ") as raised:
        plan(view_of(kv), policy, Budget(needed - 1), profile=PROFILE)
    assert (raised.value.needed, raised.value.given) == (needed, needed - 1)


@pytest.mark.parametrize("policy", NAMES)
def test_a_dry_run_has_the_size_of_the_real_plan(policy: str) -> None:
    kv = prompt()
    for budget in ("0.31", "0.52"):
        real = planned(policy, budget, view_of(kv))
        dry = plan_shape(kv.shape(), policy, budget, profile=PROFILE)
        assert dry.histogram() == real.histogram() and dry.nbytes == real.nbytes


@pytest.mark.parametrize("policy", BUDGETED)
def test_a_budgeted_policy_without_a_budget_is_refused(policy: str) -> None:
    message = f"policy '{policy}' needs a budget, such as 0.30"
    with pytest.raises(BadInput, match=message):
        plan(prompt_view(), policy, profile=PROFILE)
    with pytest.raises(BadInput, match=message):
        plan_shape(prompt().shape(), policy, None)


def fresh_prompt() -> RequestKV:
    return cache(layers=3, heads=2, tokens=TOKENS, channels=64)


def broken(value: float) -> RequestKV:
    kv = fresh_prompt()
    kv.layers[1].components["k"][1, 50, 3] = value
    return kv


@pytest.mark.parametrize("policy", NAMES)
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_rows_that_no_code_holds_are_native(policy: str, value: float) -> None:
    kv = broken(value)
    chosen = planned(policy, "0.5", view_of(kv))
    clean = planned(policy, "0.5", prompt_view()).layers[1].tier_of["k"][1, 50]
    tier = chosen.layers[1].tier_of["k"][1, 50]
    assert tier == NATIVE or (tier == DROP and policy in DROPPING)
    assert chosen.layers[1].tier_of["v"][1, 50] in (clean, tier, INT8, INT4)
    stream = encode(kv, chosen, profile=PROFILE)
    assert len(stream) == chosen.nbytes
    got = decode(stream, profile=PROFILE).layers[1]
    if tier == NATIVE:
        row = got.positions.tolist().index(50)
        expected = kv.layers[1].components["k"][1, 50]
        assert torch.equal(got.components["k"][1, row].isfinite(), expected.isfinite())


def test_pinned_rows_are_paid_for() -> None:
    kv = fresh_prompt()
    kv.layers[0].components["v"][:, 10:90] = math.nan
    for policy in ("int4", "spectrum"):
        budget = None if policy == "int4" else "0.5"
        chosen = planned(policy, budget, view_of(kv))
        assert chosen.histogram()["native"] >= 160
        assert len(encode(kv, chosen)) == chosen.nbytes
    needed = smallest_nbytes(kv.shape(), "spectrum")
    with pytest.raises(BudgetTooSmall) as raised:
        plan(view_of(kv), "spectrum", Budget(needed))
    # What three planes of one block save is padded to 256 bytes each.
    assert raised.value.needed > needed + 160 * (128 - 34) - 3 * 256


def test_a_float32_cache_shows_twice_the_reference() -> None:
    kv = prompt("float32")
    chosen = planned("raw", view=view_of(kv))
    assert 2.0 < chosen.fraction < 2.03 and 1.0 < chosen.fraction_native < 1.02
    assert same_cache(decode(encode(kv, chosen)), kv)


@pytest.mark.parametrize("policy", ["raw", "int8", "spectrum"])
def test_quantised_rows_that_are_not_smaller_than_native_are_refused(policy: str) -> None:
    view = view_of(cache(channels=2))
    with pytest.raises(BadInput, match=r"'int8' takes 4 bytes .* native takes 4"):
        planned(policy, "4", view)


@pytest.mark.parametrize("policy", NAMES)
@pytest.mark.parametrize("drop", ["none", "uniform", "per_head"])
def test_tokens_are_dropped_only_where_the_receiver_can_hold_it(policy: str, drop: str) -> None:
    capability = Capability(drop=drop)  # type: ignore[arg-type]
    budget = "0.4" if POLICIES[policy].budgeted else None
    if policy in DROPPING and drop == "none":
        with pytest.raises(Unsupported, match="drop=none; choose a policy that"):
            plan(prompt_view(), policy, budget, capability=capability, profile=PROFILE)
    else:
        plan(prompt_view(), policy, budget, capability=capability, profile=PROFILE)


def test_two_tiers_that_drop_nothing_suit_every_receiver() -> None:
    plan(prompt_view(), "spectrum-2tier", 0.7, capability=Capability(drop="none"))


def test_dropping_in_blocks_is_refused() -> None:
    capability = Capability(block=16)
    with pytest.raises(Unsupported, match="blocks of 16 and only blocks of 1 are built"):
        plan(prompt_view(), "sinks-recent", 0.4, capability=capability)
    plan(prompt_view(), "spectrum", 0.4, capability=capability)


def test_codes_that_the_receiver_does_not_read_are_refused() -> None:
    capability = Capability(codecs=("kvp.native/1", "kvp.drop/1", "kvp.nested/1"))
    plan(prompt_view(), "spectrum", 0.4, capability=capability)
    published = PlanOptions(codec="published")
    with pytest.raises(Unsupported, match=r"does not read .*kvp.absmax/1.*choose another codec"):
        plan(prompt_view(), "spectrum", 0.4, capability=capability, options=published)


@pytest.mark.parametrize("policy", NAMES)
def test_only_rankings_by_attention_need_queries(policy: str) -> None:
    view = view_of(prompt(), window=None)
    if policy in RANKING:
        with pytest.raises(MissingSignal, match="needs the queries"):
            planned(policy, view=view)
        for kind in ("position", "norm"):
            plan(view, policy, 0.5, options=PlanOptions(importance=kind), profile=PROFILE)
    elif not POLICIES[policy].evicts:  # test_evictions.py has what they need
        planned(policy, view=view)


def windowed() -> RequestKV:
    """As the prompt, but layer 1 holds its last 150 tokens only, as with a sliding window."""
    kv = prompt()
    rows = {name: x[:, -150:] for name, x in kv.layers[1].components.items()}
    short = LayerKV(1, rows, kv.layers[1].positions[-150:])
    return RequestKV((kv.layers[0], short, kv.layers[2]), TOKENS)


@pytest.mark.parametrize("policy", NAMES)
def test_a_layer_of_fewer_tokens_keeps_its_range_and_the_budget_is_exact(policy: str) -> None:
    kv = windowed()
    budget = "0.4" if POLICIES[policy].budgeted else None
    chosen = plan(view_of(kv), policy, budget, profile=PROFILE)
    assert chosen.shape == kv.shape()
    assert len(encode(kv, chosen, profile=PROFILE)) == chosen.nbytes
    assert budget is None or 0.37 < chosen.fraction <= 0.4
    if policy not in RANKING:
        assert plan_shape(kv.shape(), policy, budget, profile=PROFILE).nbytes == chosen.nbytes
    if POLICIES[policy].tempo == "whole_prompt" and not POLICIES[policy].evicts:
        assert (tiers_of(chosen, 0) == tiers_of(chosen, 2)).all()


def test_layers_of_other_tokens_do_not_move_each_others_ranks() -> None:
    kv = windowed()
    view = view_of(kv)
    chosen = plan(view, "spectrum", 0.4, nominal=True)
    without = plan([view[0], view[2]], "spectrum", 0.4, nominal=True)
    assert (tiers_of(chosen, 0) == tiers_of(without, 0)).all()
    alone = plan([view[1]], "spectrum", 0.4, nominal=True)
    assert (tiers_of(chosen, 1) == tiers_of(alone, 0)).all()
    # The sinks of the prompt have left the window: nothing in this layer is a sink.
    assert histogram(tiers_of(chosen, 1)) == {INT8: 90, INT4: 60}


def test_unknown_names_are_refused_before_anything_is_done() -> None:
    with pytest.raises(UnknownName, match="unknown policy 'spectre'; known: raw, int8"):
        plan(prompt_view(), "spectre", 0.5)
    with pytest.raises(UnknownName, match="unknown importance 'luck'; known: attention"):
        PlanOptions(importance="luck")
    with pytest.raises(
        UnknownName, match="unknown codec 'zip'; known: nested, conditioned, published"
    ):
        PlanOptions(codec="zip")


def test_impossible_options_are_refused() -> None:
    with pytest.raises(BadInput, match="seed must not be negative, got -1"):
        PlanOptions(seed=-1)
    with pytest.raises(BadInput, match="decay must be finite"):
        PlanOptions(decay=math.nan)


def test_nothing_to_plan_is_refused() -> None:
    with pytest.raises(BadInput, match="layers must be named once"):
        plan((), "raw")


def test_a_cache_that_misses_tokens_cannot_be_planned() -> None:
    kv = prompt()
    restored = decode(encode(kv, planned("sinks-recent", "0.3", view_of(kv))))
    with pytest.raises(BadInput, match="tokens are missing"):
        plan(view_of(restored), "raw")


def test_streams_are_cut_as_the_options_say() -> None:
    view = prompt_view()
    assert planned("raw", view=view).split == Split()
    cut = plan(view, "spectrum", 0.6, options=PlanOptions(split=Split(tokens=64, heads=1)))
    assert cut.split == Split(tokens=64, heads=1) and 0.55 < cut.fraction <= 0.6
    long = KVShape.dense(layers=1, heads=8, channels=128, tokens=70_000)
    assert plan_shape(long, "raw", None).split == Split(tokens=8192)


def test_a_plan_by_hand_is_as_good_as_a_policys() -> None:
    kv = prompt()
    assert planned("int8").nbytes == plan_of(kv, INT8).nbytes
