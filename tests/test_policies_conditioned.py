"""The policies that need a profile: what they make of it, and what they refuse."""

from dataclasses import replace

import numpy as np
import pytest
from strategies import DROP, INT4, INT8, NATIVE, cache, view_of
from test_policies import PROFILE, TOKENS, planned, profile_with, prompt, prompt_view, tiers_of

from kvprism.codec.stream import decode, encode
from kvprism.core import CONDITIONED_CODEC, CONDITIONED_MENU, MENU, NESTED_CODEC, Capability
from kvprism.errors import BadInput, BudgetTooSmall, ProfileMismatch, Unsupported
from kvprism.planning import PlanOptions, plan, plan_shape, smallest_nbytes
from kvprism.plans import Plan
from kvprism.profiles import LayerSetting, ProbeRecord, Profile


def same_tiers(one: Plan, other: Plan) -> bool:
    return all((tiers_of(one, i) == tiers_of(other, i)).all() for i in range(3))


def test_conditioned_spectrum_is_spectrum_in_the_conditioned_code() -> None:
    chosen, plain = planned("spectrum-conditioned", "0.4"), planned("spectrum", "0.4")
    assert chosen.menu == CONDITIONED_MENU and plain.menu == MENU
    assert same_tiers(chosen, plain)
    # The longer name of the codec stands twice in the offer.
    assert chosen.nbytes - plain.nbytes == 2 * (len(CONDITIONED_CODEC) - len(NESTED_CODEC))
    by_codec = plan(
        prompt_view(), "spectrum", 0.4, options=PlanOptions(codec="conditioned"), profile=PROFILE
    )
    assert by_codec.menu == CONDITIONED_MENU and same_tiers(by_codec, plain)


@pytest.mark.parametrize(
    "settings, like",
    [
        (("plain",) * 3, "spectrum"),
        (("plain", "conditioned", "plain"), "spectrum-conditioned"),
        (("no-int4",) * 3, "spectrum-2tier"),
    ],
)
@pytest.mark.parametrize("budget", ["0.3", "0.45", "0.6"])
def test_adaptive_does_what_the_probe_says(
    settings: tuple[LayerSetting, ...], like: str, budget: str
) -> None:
    profile = profile_with(*settings)
    chosen = plan(prompt_view(), "spectrum-adaptive", budget, profile=profile)
    expected = planned(like, budget)
    assert chosen.menu == expected.menu and same_tiers(chosen, expected)
    assert chosen.nbytes == expected.nbytes


def test_a_layer_without_int4_follows_two_tiers() -> None:
    profile = profile_with("plain", "no-int4", "conditioned")
    view, kv = prompt_view(), prompt()
    for budget in (0.3, 0.4, 0.6):
        chosen = plan(view, "spectrum-adaptive", budget, profile=profile)
        assert budget - 0.02 < chosen.fraction <= budget
        stream = encode(kv, chosen, profile=profile)
        assert len(stream) == chosen.nbytes
        got = decode(stream, profile=profile)
        assert [len(got.layers[i].positions) for i in (0, 2)] == [TOKENS, TOKENS]
        assert len(got.layers[1].positions) == TOKENS - len(indices_in(chosen, 1, DROP))
        assert not indices_in(chosen, 1, INT4)
    nominal = plan(view, "spectrum-adaptive", 0.3, nominal=True, profile=profile)
    three, two = (plan(view, name, 0.3, nominal=True) for name in ("spectrum", "spectrum-2tier"))
    assert (tiers_of(nominal, 0) == tiers_of(three, 0)).all()
    assert (tiers_of(nominal, 1) == tiers_of(two, 1)).all()
    assert (tiers_of(nominal, 2) == tiers_of(three, 2)).all()
    with pytest.raises(Unsupported, match="layer 1 drops tokens"):
        plan(view, "spectrum-adaptive", 0.3, profile=profile, capability=Capability(drop="none"))


def test_a_layer_without_int4_is_served_before_the_others_leave_int4() -> None:
    profile = profile_with("plain", "no-int4", "conditioned")
    plans = [
        plan(prompt_view(), "spectrum-adaptive", budget / 100, profile=profile)
        for budget in range(35, 60)
    ]
    dropped = [len(indices_in(chosen, 1, DROP)) for chosen in plans]
    better = [[len(indices_in(chosen, layer, INT8)) for layer in (0, 2)] for chosen in plans]
    assert dropped[0] and dropped == sorted(dropped, reverse=True) and not dropped[-1]
    assert all(counts == [0, 0] for counts, its in zip(better, dropped, strict=True) if its > 1)
    assert any(all(counts) for counts in better)


def indices_in(chosen: Plan, layer: int, tier: int) -> list[int]:
    return np.flatnonzero(tiers_of(chosen, layer) == tier).tolist()


def test_a_dry_run_knows_the_profile_or_takes_spectrum() -> None:
    shape = prompt().shape()
    without = {
        name: plan_shape(shape, name, "0.4").nbytes for name in ("spectrum", "spectrum-adaptive")
    }
    assert without["spectrum"] == without["spectrum-adaptive"]
    assert plan_shape(shape, "spectrum-conditioned", "0.4").menu == CONDITIONED_MENU
    strict = profile_with(*["no-int4"] * 3)  # type: ignore[list-item]
    with pytest.raises(BudgetTooSmall):
        plan_shape(shape, "spectrum-adaptive", "0.2")
    assert plan_shape(shape, "spectrum-adaptive", "0.2", profile=strict).fraction <= 0.2
    needed = smallest_nbytes(shape, "spectrum-adaptive", profile=strict)
    assert needed == smallest_nbytes(shape, "spectrum-2tier")


@pytest.mark.parametrize(
    "policy, profile, why",
    [
        ("spectrum-conditioned", None, "none was given"),
        ("spectrum-conditioned", Profile("ab" * 32), "this profile has none; calibrate"),
        ("spectrum-adaptive", None, "settings for 3 layers, got none; make a profile with kvprism"),
        ("spectrum-adaptive", replace(PROFILE, probe=None), "for 3 layers, got none"),
        (
            "spectrum-adaptive",
            Profile("ab" * 32, probe=ProbeRecord("yes", "yes", ("plain",) * 2, "")),
            "for 3 layers, got for 2 layers",
        ),
        (
            "spectrum-adaptive",
            profile_with("plain", "conditioned", "plain", drawn=cache(layers=3, channels=32)),
            "layer 1 has k 2 x 64, v 2 x 64, this profile conditions k 2 x 32",
        ),
    ],
)
def test_a_profile_that_lacks_what_the_policy_needs_is_refused(
    policy: str, profile: Profile | None, why: str
) -> None:
    with pytest.raises(ProfileMismatch, match=why):
        plan(prompt_view(), policy, 0.4, profile=profile)


@pytest.mark.parametrize("policy", ["spectrum-conditioned", "spectrum-adaptive"])
def test_the_papers_code_is_not_conditioned(policy: str) -> None:
    published = PlanOptions(codec="published")
    with pytest.raises(BadInput, match="nested and conditioned, got 'published'; leave the codec"):
        plan(prompt_view(), policy, 0.4, options=published, profile=PROFILE)


def test_a_receiver_without_the_conditioned_code_is_not_planned_for() -> None:
    capability = Capability(codecs=("kvp.native/1", "kvp.drop/1", "kvp.nested/1"))
    with pytest.raises(Unsupported, match=r"kvp.conditioned/1.*or another policy than 'spectrum-c"):
        plan(prompt_view(), "spectrum-conditioned", 0.4, capability=capability, profile=PROFILE)


def test_keys_that_cannot_be_conditioned_are_pinned() -> None:
    kv = cache(layers=3, heads=2, tokens=TOKENS, channels=64, dtype="float32")
    kv.layers[1].components["k"][1, 20] = 1e7  # beyond kvp.nested/1, but not once it is scaled
    kv.layers[2].components["k"][0, 30] = 1e30
    assert PROFILE.conditioning is not None
    wide = [c and replace(c, scale=c.scale * 2**10) for c in PROFILE.conditioning]
    profile = replace(PROFILE, conditioning=tuple(wide))
    chosen = plan(view_of(kv), "spectrum-conditioned", 0.4, profile=profile)
    at = {
        (i, name): np.argwhere(layer.tier_of[name] == NATIVE).tolist()
        for i, layer in enumerate(chosen.layers)
        for name in "kv"
    }
    sinks = [[head, token] for head in (0, 1) for token in range(4)]
    assert at.pop((2, "k")) == sorted([*sinks, [0, 30]])
    assert all(found == sinks for found in at.values())
    assert len(encode(kv, chosen, profile=profile)) == chosen.nbytes
