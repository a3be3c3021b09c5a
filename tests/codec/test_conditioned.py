"""`kvp.conditioned/1` through whole streams: its bytes, its errors, and who is refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    DROP,
    INT4,
    INT8,
    NATIVE,
    cache,
    caches,
    conditioning_of,
    plan_of,
    plans,
    same_bits,
    same_cache,
)

from codec.pieces import pieces_of, planes_of
from codec.test_stream import TIERS, golden_cache
from kvprism.codec.condition import restore
from kvprism.codec.reference import Conditioned, nested_scale, quantisable
from kvprism.codec.stream import Assembler, decode, encode, offered_shape
from kvprism.core import CONDITIONED_MENU, MENU
from kvprism.errors import CodecError, LimitExceeded, ProfileMismatch
from kvprism.layout import Split
from kvprism.plans import Plan, offer_of
from kvprism.profiles import Profile
from kvprism.tensors import KeyConditioning, LayerKV, RequestKV
from kvprism.wire.messages import Offer
from kvprism.wire.stream import Segments, parse

FINGERPRINT = "ab" * 32
GOLDEN = Path(__file__).parent / "golden" / "conditioned-1.0.kvp"


def profile_of(kv: RequestKV, **settings: float) -> Profile:
    return Profile(FINGERPRINT, conditioning=conditioning_of(kv, **settings))


def conditioned(plan: Plan) -> Plan:
    return Plan(plan.layers, CONDITIONED_MENU, plan.split)


def golden() -> tuple[RequestKV, Plan, Profile]:
    """From numbers that float32 holds exactly: no generator that could change."""
    kv = golden_cache("bfloat16")
    fitted = KeyConditioning(
        offset=torch.arange(16).view(2, 8).float() / 4 - 2,
        scale=2.0 ** torch.tensor([[0, 1, 2, -1], [-2, 0, 3, 1]]),
        inverse_frequencies=torch.tensor([1.0, 0.125, 0.015625, 0.001953125]),
        rotate=True,
    )
    profile = Profile(FINGERPRINT, conditioning=(fitted, None))
    return kv, plan_of(kv, TIERS, CONDITIONED_MENU, Split(tokens=4)), profile


def test_not_a_byte_of_the_golden_stream_changes() -> None:
    kv, plan, profile = golden()
    assert encode(kv, plan, fingerprint=bytes(range(32)), profile=profile) == GOLDEN.read_bytes()


def test_the_golden_stream_decodes_to_what_was_encoded() -> None:
    kv, _, profile = golden()
    got = decode(GOLDEN.read_bytes(), profile=profile)
    for layer, original in zip(got.layers, kv.layers, strict=True):
        assert layer.positions.tolist() == [0, 1, 2, 4, 5]
        assert same_bits(layer.components["k"][0, 0], original.components["k"][0, 0])
    assert keys_are_near(got, kv, plan_of(kv, TIERS, CONDITIONED_MENU), profile)


def slowly_conditioned(x: torch.Tensor, position: int, fitted: KeyConditioning) -> torch.Tensor:
    """docs/format.md in complex float64: `[head, channel]` keys of one token."""
    half = x.shape[-1] // 2
    pairs = torch.complex(x[:, :half].double(), x[:, half:].double())
    offset = torch.complex(fitted.offset[:, :half].double(), fitted.offset[:, half:].double())
    angles = position * fitted.inverse_frequencies.double()
    pairs = (pairs * torch.polar(torch.ones(half).double(), -angles) - offset) / fitted.scale
    x = torch.cat([pairs.real, pairs.imag], dim=-1)
    if fitted.rotate:
        hadamard = torch.ones(1, 1, dtype=torch.float64)
        while len(hadamard) < x.shape[-1]:
            hadamard = torch.kron(torch.tensor([[1, 1], [1, -1]]), hadamard)
        x = x @ hadamard * x.shape[-1] ** -0.5
    return x


def keys_are_near(got: RequestKV, kv: RequestKV, plan: Plan, profile: Profile) -> bool:
    """Every key lies within what its tier's step, conditioned back, allows."""
    assert profile.conditioning is not None
    layers = zip(got.layers, kv.layers, plan.layers, profile.conditioning, strict=True)
    for layer, original, planned, fitted in layers:
        if fitted is None:
            continue
        kept = original.positions[:, None] == layer.positions
        for at, token in kept.nonzero().flip(-1).tolist():
            x = original.components["k"][:, token]
            error = (layer.components["k"][:, at].double() - x.double()).abs().amax(dim=-1)
            tiers = torch.from_numpy(planned.tier_of["k"][:, token].copy())
            position = int(original.positions[token])
            if not bool((error <= largest_error(x, tiers, position, fitted)).all()):
                return False
    return True


def largest_error(
    x: torch.Tensor, tiers: torch.Tensor, position: int, fitted: KeyConditioning
) -> torch.Tensor:
    """float64 `[head]`: half a step a channel, gathered on the way back as `Conditioned` says."""
    row = slowly_conditioned(x, position, fitted)
    absmax = row.abs().amax(dim=-1)
    # A dozen float32 roundings on the way there.
    noise = 2.0**-18 * (absmax + (x.double().abs().amax(dim=-1) + 50) / fitted.scale.amin(dim=-1))
    step = nested_scale((absmax + noise).float()).double()
    worst = step * torch.where(tiers == INT8, 0.5, 8.0) + noise
    gathered = x.shape[-1] ** 0.5 if fitted.rotate else 1.0
    back = 2**0.5 * gathered * worst * fitted.scale.amax(dim=-1)
    rounding = torch.finfo(x.dtype).eps * (x.double().abs().amax(dim=-1) + back)
    return torch.where(tiers == NATIVE, 0.0, back + rounding + 2.0**-24)


@given(st.data())
def test_keys_come_back_within_their_tier_and_all_else_as_in_nested(data: st.DataObject) -> None:
    kv = data.draw(caches())
    kv = kv if kv.layers[0].dtype != torch.float16 else cache(dtype="float16", start=1000)
    plan = conditioned(data.draw(plans(kv)))
    rotate = kv.layers[0].components["k"].shape[-1] in (4, 8, 16) and data.draw(st.booleans())
    drawn = conditioning_of(kv, seed=data.draw(st.integers(0, 99)), rotate=rotate)
    without = data.draw(st.integers(0, len(drawn) - 1))
    layers = tuple(None if i == without else fitted for i, fitted in enumerate(drawn))
    profile = Profile(FINGERPRINT, conditioning=layers)
    stream = encode(kv, plan, profile=profile)
    assert plan.nbytes == len(stream)
    got = decode(stream, profile=profile)
    assert keys_are_near(got, kv, plan, profile)
    nested = decode(encode(kv, Plan(plan.layers, MENU, plan.split)))
    for i, (layer, same, planned) in enumerate(
        zip(got.layers, nested.layers, plan.layers, strict=True)
    ):
        assert same_bits(layer.components["v"], same.components["v"])
        assert torch.equal(layer.positions, same.positions)
        kept = planned.tier_of["k"][:, (planned.tier_of["k"] != DROP).all(axis=0)]
        equal = torch.from_numpy(kept == NATIVE) | (i == without)
        assert same_bits(layer.components["k"][equal], same.components["k"][equal])


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("split", [Split(tokens=3), Split(heads=1), Split(tokens=5, heads=3)])
def test_a_stream_may_be_cut_anywhere_and_means_the_same(split: Split, rotate: bool) -> None:
    kv = cache(heads=4, tokens=17, start=100)
    tiers = np.random.default_rng(2).integers(0, 3, (4, 17))
    profile = profile_of(kv, rotate=rotate)
    whole = plan_of(kv, tiers, CONDITIONED_MENU)
    cut = plan_of(kv, tiers, CONDITIONED_MENU, split)
    one, other = (
        decode(encode(kv, plan, profile=profile), profile=profile) for plan in (whole, cut)
    )
    assert same_cache(one, other)
    if split.tokens is None:
        assert planes_of(pieces_of(kv, cut, profile)) == planes_of(pieces_of(kv, whole, profile))


def test_one_heads_planes_are_the_same_bytes_by_token_ranges() -> None:
    kv = cache(heads=1, tokens=50, start=7)
    profile = profile_of(kv, rotate=True)
    tiers = np.random.default_rng(3).integers(0, 3, (1, 50))
    whole, cut = (plan_of(kv, tiers, CONDITIONED_MENU, split) for split in (Split(), Split(7)))
    assert planes_of(pieces_of(kv, cut, profile)) == planes_of(pieces_of(kv, whole, profile))


@pytest.mark.parametrize("channel", [0, 3])
def test_a_bias_before_rope_costs_conditioned_int4_nothing(channel: int) -> None:
    """A key bias of 100 swallows the scale of its row; without it the row is as before."""
    before_rope = cache(layers=1, tokens=64, dtype="float32")
    layer = before_rope.layers[0]
    plain, values = layer.components["k"], layer.components["v"]
    [neutral] = conditioning_of(before_rope, offset=0.0, scale=1.0)
    offset = torch.zeros(2, 8)
    offset[:, channel] = 100.0
    fitted = replace(neutral, offset=offset)
    biased = restore(plain, layer.positions, fitted)
    kv = RequestKV((LayerKV(0, {"k": biased, "v": values}, layer.positions),), 64)
    profile = Profile(FINGERPRINT, conditioning=(fitted,))
    stream = encode(kv, plan_of(kv, INT4, CONDITIONED_MENU), profile=profile)
    clean = error_of(decode(encode(before_rope, plan_of(before_rope, INT4))), plain)
    # Turning keeps lengths, so that nothing but float32 at 100 is added: 4e-6 a value.
    assert error_of(decode(stream, profile=profile), biased) == pytest.approx(clean, rel=1e-3)
    assert error_of(decode(encode(kv, plan_of(kv, INT4))), biased) > plain.norm()


def error_of(got: RequestKV, keys: torch.Tensor) -> float:
    return float((got.layers[0].components["k"] - keys).norm())


def test_the_conditioned_code_states_its_profile_and_needs_it_back() -> None:
    kv = cache()
    profile, other = profile_of(kv), profile_of(kv, seed=1)
    stream = encode(kv, plan_of(kv, INT4, CONDITIONED_MENU), profile=profile)
    offer = next(parse(stream))
    assert isinstance(offer, Offer) and offer.profile == profile.hash
    assert offered_shape(offer) == kv.shape()
    with pytest.raises(ProfileMismatch, match="none was given; give both sides the same profile"):
        decode(stream)
    with pytest.raises(ProfileMismatch, match=f"made with profile {profile.hash.hex()[:16]}"):
        decode(stream, profile=other)
    with pytest.raises(LimitExceeded):
        decode(stream, profile=profile, max_nbytes=100)
    assert decode(encode(kv, plan_of(kv, INT4)), profile=other).next_position == 16


@pytest.mark.parametrize(
    "wrong, why",
    [
        (None, "none was given"),
        (Profile(FINGERPRINT), "key conditioning of 2 layers, this profile has none; calibrate"),
        (profile_of(cache(layers=3)), "of 2 layers, this profile has that of 3 layers"),
        (profile_of(cache(heads=4)), "has k 2 x 8, v 2 x 8, this profile conditions k 4 x 8; make"),
        (profile_of(cache(channels=16)), "this profile conditions k 2 x 16"),
    ],
)
def test_a_plan_that_the_profile_does_not_serve_is_refused(wrong: Profile | None, why: str) -> None:
    kv = cache()
    with pytest.raises(ProfileMismatch, match=why):
        encode(kv, plan_of(kv, INT4, CONDITIONED_MENU), profile=wrong)


def with_key(kv: RequestKV, value: float) -> RequestKV:
    kv.layers[1].components["k"][1, 10, 3] = value
    return kv


def fits(kv: RequestKV, fitted: KeyConditioning, menu: tuple = CONDITIONED_MENU) -> np.ndarray:
    layer = kv.layers[1]
    return quantisable(layer.components["k"], menu, Conditioned(fitted, layer.positions))


def test_rows_are_judged_by_what_is_quantised_and_what_is_restored() -> None:
    plain = cache(dtype="float32", start=100)
    [_, fitted] = conditioning_of(plain)
    large = with_key(cache(dtype="float32", start=100), 1e7)
    assert not quantisable(large.layers[1].components["k"], MENU).all()
    assert fits(large, replace(fitted, scale=fitted.scale * 2**10)).all()
    # 119 * 65504 is the largest value that a scale in float16 can reach.
    assert not fits(plain, replace(fitted, scale=torch.full((2, 4), 2.0**-23))).any()
    assert not fits(plain, replace(fitted, offset=torch.full((2, 8), 3e38))).any()
    for value in (torch.nan, torch.inf, 3e38):
        bad = ~fits(with_key(cache(dtype="float32"), value), fitted)
        assert np.argwhere(bad).tolist() == [[1, 10]]


def test_a_restored_value_beyond_float16_is_never_sent() -> None:
    kv = with_key(cache(dtype="float16", start=100), 60000.0)
    profile = profile_of(kv)
    assert profile.conditioning is not None and profile.conditioning[1] is not None
    ok = fits(kv, profile.conditioning[1])
    assert np.argwhere(~ok).tolist() == [[1, 10]]
    with pytest.raises(CodecError, match=r"layer 1 component 'k': head 1 token 110 .*'int4'"):
        encode(kv, plan_of(kv, INT4, CONDITIONED_MENU), profile=profile)

    def pinned(layer: LayerKV, name: str) -> np.ndarray:
        tiers = np.full((2, 16), INT4, np.uint8)
        if layer.layer_id == 1 and name == "k":
            tiers[~ok] = NATIVE
        return tiers

    plan = plan_of(kv, pinned, CONDITIONED_MENU)
    got = decode(encode(kv, plan, profile=profile), profile=profile)
    assert got.layers[1].components["k"][1, 10, 3] == 60000.0
    assert bool(got.layers[1].components["k"].isfinite().all())


def test_planes_of_another_profile_never_give_a_value_beyond_the_dtype() -> None:
    kv = cache(dtype="float16")
    plan = plan_of(kv, INT8, CONDITIONED_MENU)
    pieces = pieces_of(kv, plan, profile_of(kv))
    forged = profile_of(kv, offset=1e6)
    assembler = Assembler(offer_of(plan.shape, plan.menu, profile=forged.hash), profile=forged)
    with pytest.raises(CodecError, match="layer 0 component 'k': a restored key is beyond"):
        assembler.add(Segments(pieces[0].manifest, memoryview(pieces[0].area)))
