"""Which arms a table has, and one cache through the wire under each."""

from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from strategies import conditioning_of

from kvprism.errors import BadInput, BudgetTooSmall, ProfileMismatch, UnknownName
from kvprism.evaluate.arms import Arm, SavedProfile, arms_of, policy_budget, through_the_wire
from kvprism.evaluate.haystack import generated_ids
from kvprism.evaluate.measure import LoadedModel
from kvprism.integrations.hf import capture
from kvprism.planning import PlanOptions
from kvprism.policies import POLICIES, signals_of
from kvprism.profiles import ProbeRecord, Profile
from kvprism.routes import Route, parse_layers


def names(arms: tuple[Arm, ...]) -> list[tuple[str, Any]]:
    return [(arm.policy, arm.budget) for arm in arms]


def test_fixed_rate_policies_come_once_and_the_others_at_every_budget() -> None:
    arms = arms_of(["raw", "int4", "spectrum"], ["0.30", "52%"])
    assert names(arms) == [
        ("raw", None),
        ("int4", None),
        ("spectrum", 0.3),
        ("spectrum", 0.52),
    ]


def test_raw_comes_first_asked_for_or_not() -> None:
    assert names(arms_of(["int8"], []))[0] == ("raw", None)
    assert names(arms_of(["int8", "raw"], [])) == [("raw", None), ("int8", None)]


def test_two_spellings_of_one_budget_are_one_arm() -> None:
    assert len(arms_of(["spectrum"], ["0.3", "0.30", "30%", 0.3])) == 2


def test_sizes_stay_as_they_were_written() -> None:
    assert policy_budget("512MiB") == "512MiB"
    assert policy_budget("100tok") == "100tok"


def test_a_policy_may_name_its_code() -> None:
    arms = arms_of(["spectrum", "spectrum:hadamard"], ["0.3"], PlanOptions(importance="norm"))
    assert names(arms) == [("raw", None), ("spectrum", 0.3), ("spectrum", 0.3)]
    assert [arm.options.codec for arm in arms] == ["nested", "nested", "hadamard"]
    assert {arm.options.importance for arm in arms} == {"norm"}
    with pytest.raises(UnknownName, match="zip"):
        arms_of(["spectrum:zip"], ["0.3"])


def test_budgets_may_count_from_the_floor(captured: Any) -> None:
    arms = arms_of(["spectrum", "spectrum-layer", "snapkv"], ["floor", "floor+0.10"])
    assert [arm.budget for arm in arms[1:3]] == ["floor", "floor+0.10"]
    for low, high in zip(arms[1::2], arms[2::2], strict=True):
        smallest, larger = (through_the_wire(*captured, arm)[1] for arm in (low, high))
        with pytest.raises(BudgetTooSmall):
            through_the_wire(*captured, Arm(low.policy, f"{smallest.nbytes - 1}b"))
        assert 0.08 < larger.fraction - smallest.fraction <= 0.10


@pytest.mark.parametrize("budget", [None, 0.3])
def test_an_arm_has_a_budget_exactly_when_its_policy_takes_one(budget: float | None) -> None:
    policy = "spectrum" if budget is None else "int8"
    with pytest.raises(BadInput, match=policy):
        Arm(policy, budget)


def test_budgeted_policies_without_budgets_are_refused() -> None:
    with pytest.raises(BadInput, match="needs a budget"):
        arms_of(["spectrum"], [])


@pytest.mark.parametrize("budget", ["much", "-0.3", "0", "0.3x", "floor+", "floor+much"])
def test_what_is_no_budget_is_refused_before_anything_is_measured(budget: str) -> None:
    with pytest.raises(BadInput, match="budget"):
        arms_of(["spectrum"], [budget])


def test_unknown_policies_and_codecs_are_refused() -> None:
    with pytest.raises(UnknownName, match="polykw"):
        arms_of(["polykw"], ["0.3"])
    with pytest.raises(UnknownName, match="zip"):
        arms_of(["raw"], [], PlanOptions(codec="zip"))


@pytest.fixture(scope="module")
def captured(subject: LoadedModel) -> Any:
    ids = torch.from_numpy(generated_ids(subject.tokenizer, 300, np.random.default_rng(0))[:300])
    signals = signals_of(POLICIES)
    return capture(subject.model, ids, cache_dtype=torch.bfloat16, signals=signals)


@pytest.fixture(scope="module")
def saved(captured: Any, tmp_path_factory: pytest.TempPathFactory) -> SavedProfile:
    conditioning = conditioning_of(captured[0], offset=0.1)
    probe = ProbeRecord("no", "yes", ("conditioned",) * len(conditioning), "a test says so")
    path = tmp_path_factory.mktemp("profile") / "tiny.json"
    layers = parse_layers("0: h2o@80, 1-3: expected-attention@144")
    routed = [policy for policy in POLICIES if POLICIES[policy].routed]
    routes = tuple(Route(policy, 128, layers) for policy in routed)
    Profile("ab" * 32, None, conditioning, probe, routes).save(path)
    return SavedProfile.named(path)


def test_a_profile_that_changes_during_a_run_is_refused(saved: SavedProfile) -> None:
    stated = msgspec.json.decode(msgspec.json.encode(Arm("spectrum", 0.3, saved=saved)))
    assert stated["saved"] == {"path": saved.path, "hash": saved.profile.hash.hex()}
    with pytest.raises(ProfileMismatch, match=r"is now profile .*, it was 0000"):
        assert SavedProfile(saved.path, "00" * 32).profile


@pytest.mark.parametrize("policy", list(POLICIES))
def test_every_policy_comes_back_within_its_budget(
    captured: Any, policy: str, saved: SavedProfile
) -> None:
    kv, view = captured
    for arm in arms_of([policy], ["0.40"], saved=saved)[1:]:
        restored, plan = through_the_wire(kv, view, arm)
        assert restored.next_position == 300
        assert arm.fixed_rate or 0.38 < plan.fraction <= 0.40


@pytest.mark.parametrize("policy", ["random-tiers", "random-drop"])
def test_random_orders_differ_by_document_and_come_again(captured: Any, policy: str) -> None:
    def tiers(document: int) -> np.ndarray:
        arm = Arm(policy, 0.4).for_document(document)
        return through_the_wire(*captured, arm)[1].layers[0].tier_of["k"]

    assert (tiers(3) == tiers(3)).all()
    assert (tiers(3) != tiers(4)).any()


def test_an_infeasible_budget_says_what_would_do(captured: Any) -> None:
    with pytest.raises(BudgetTooSmall, match="at least"):
        through_the_wire(*captured, Arm("spectrum", 0.1))
