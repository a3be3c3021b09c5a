"""Policies that are about one code: what others send, for comparison."""

import numpy as np
import pytest
from strategies import cache, view_of

from kvprism.codec.stream import decode, encode
from kvprism.core import MENUS, ONE_WIDTH_MENUS
from kvprism.errors import BadInput, UnknownName
from kvprism.planning import PlanOptions, plan, plan_shape
from kvprism.policies import POLICIES

COMPARED = [name for name, row in POLICIES.items() if row.code is not None]
TOKENS = 300


@pytest.mark.parametrize("policy", COMPARED)
def test_a_policy_about_a_code_takes_it_and_no_other(policy: str) -> None:
    kv = cache(layers=2, heads=2, tokens=TOKENS, channels=64)
    chosen = plan(view_of(kv), policy)
    assert chosen.menu == (MENUS | ONE_WIDTH_MENUS)[POLICIES[policy].code]
    assert chosen.nbytes == len(encode(kv, chosen)) == plan_shape(chosen.shape, policy, None).nbytes
    assert len(decode(encode(kv, chosen)).layers[0].positions) == TOKENS
    with pytest.raises(BadInput, match="leave the codec out"):
        plan(view_of(kv), policy, options=PlanOptions(codec="published"))


def test_kivi_keeps_its_recent_window_native() -> None:
    kv = cache(layers=1, heads=2, tokens=TOKENS, channels=64)
    tiers = plan(view_of(kv), "int4-kivi").layers[0].tier_of["k"]
    assert (tiers[:, -128:] == 0).all() and (tiers[:, :-128] == 2).all()


@pytest.mark.parametrize("codec", ["affine", "hadamard", "grouped"])
def test_tiers_of_any_code_follow_the_budget(codec: str) -> None:
    kv = cache(layers=2, heads=2, tokens=TOKENS, channels=64)
    options = PlanOptions(codec=codec)
    chosen = plan(view_of(kv), "spectrum", "0.40", options=options)
    assert len(encode(kv, chosen)) == chosen.nbytes
    assert 0.37 < chosen.fraction <= 0.40
    assert set(np.unique(chosen.layers[0].tier_of["k"])) == {0, 1, 2}


def test_codes_of_one_width_have_no_tiers_to_choose_from() -> None:
    with pytest.raises(UnknownName, match="codec"):
        PlanOptions(codec="kivi")
