"""Whole streams: their bytes, what comes back, how they may be cut, and what is refused."""

import random
import tracemalloc
from pathlib import Path

import msgspec
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

from codec.pieces import cut_cache, pieces_of, planes_of, stream_of
from kvprism.codec.reference import nested_scale
from kvprism.codec.stream import (
    Assembler,
    Encoded,
    decode,
    encode,
    encode_layer,
    menu_of,
    offered_shape,
)
from kvprism.core import MENU, MENUS, ONE_WIDTH_MENUS, PUBLISHED_MENU
from kvprism.errors import (
    CodecError,
    KVPrismError,
    PositionMismatch,
    ProtocolViolation,
    ShapeMismatch,
    Truncated,
)
from kvprism.layout import Split
from kvprism.plans import Plan, offer_of
from kvprism.profiles import Profile
from kvprism.tensors import DTYPES, LayerKV, RequestKV
from kvprism.wire import frames
from kvprism.wire.messages import NOT_STATED, Manifest, Offer
from kvprism.wire.stream import Segments, parse

GOLDEN = Path(__file__).parent / "golden"
TIERS = np.array([[0, 1, 2, 3, 1, 2], [1, 2, 0, 3, 2, 1]], np.uint8)


def golden_cache(dtype: str) -> RequestKV:
    """From integers alone: no generator of random numbers that could change."""

    def component(offset: int) -> torch.Tensor:
        values = [((i * 37 + offset) % 239 - 119) / 8 for i in range(2 * 6 * 8)]
        return torch.tensor(values).reshape(2, 6, 8).to(DTYPES[dtype])

    layers = tuple(
        LayerKV(layer, {"k": component(layer), "v": component(100 + layer)}, torch.arange(6))
        for layer in (0, 5)
    )
    return RequestKV(layers, 6)


GOLDENS = {
    "nested-1.0.kvp": ("bfloat16", MENU, Split()),
    "nested-split-1.0.kvp": ("float32", MENU, Split(tokens=4, heads=1)),
    "published-1.0.kvp": ("float16", PUBLISHED_MENU, Split()),
}


def golden_stream(name: str) -> tuple[RequestKV, Plan, bytes]:
    dtype, menu, split = GOLDENS[name]
    kv = golden_cache(dtype)
    plan = plan_of(kv, TIERS, menu, split)
    return kv, plan, encode(kv, plan, fingerprint=bytes(range(32)))


@pytest.mark.parametrize("name", GOLDENS)
def test_not_a_byte_of_the_golden_streams_changes(name: str) -> None:
    _, _, stream = golden_stream(name)
    assert stream == (GOLDEN / name).read_bytes()


@pytest.mark.parametrize("name", GOLDENS)
def test_golden_streams_decode_to_what_was_encoded(name: str) -> None:
    kv, _, _ = golden_stream(name)
    got = decode((GOLDEN / name).read_bytes())
    assert got.next_position == 6
    for layer, original in zip(got.layers, kv.layers, strict=True):
        assert layer.layer_id == original.layer_id
        assert layer.positions.tolist() == [0, 1, 2, 4, 5]
        assert same_bits(layer.components["k"][0, 0], original.components["k"][0, 0])


def scales_of(x: torch.Tensor, levels: int) -> torch.Tensor:
    """float64 scale per row; the published one may be half a float16 step away."""
    absmax = x.float().abs().amax(dim=-1)
    return nested_scale(absmax).double() if levels == 119 else absmax.double() / levels


def worst_error(x: torch.Tensor, tier: int, published: bool) -> torch.Tensor:
    """The derived bounds of test_reference.py, per value."""
    if published:
        levels = 127 if tier == INT8 else 7
        s = scales_of(x, levels)
        half_step = (s * 2**-11).clamp_min(2.0**-25)
        scale, steps = s + half_step, 0.5 + levels * 2**-22
        slack = levels * half_step
    else:
        scale, steps = scales_of(x, 119), (0.5 if tier == INT8 else 8.0) + 119 * 2**-22
        slack = torch.zeros_like(scale)
    bound = (scale.clamp_min(2.0**-24) * steps + slack)[..., None].expand(x.shape)
    unit = torch.finfo(x.dtype).eps / 2
    tiny = torch.finfo(x.dtype).smallest_normal
    return bound + (x.double().abs() + bound) * unit + tiny


@given(st.data())
def test_what_is_decoded_lies_within_the_bounds_of_its_tier(data: st.DataObject) -> None:
    kv = data.draw(caches())
    plan = data.draw(plans(kv))
    stream = encode(kv, plan)
    assert plan.nbytes == len(stream)
    got = decode(stream)
    assert got.next_position == kv.next_position
    published = plan.menu == PUBLISHED_MENU
    for layer, original, planned in zip(got.layers, kv.layers, plan.layers, strict=True):
        keeps = next(iter(planned.tier_of.values()))[0] != DROP
        assert layer.positions.tolist() == original.positions[torch.from_numpy(keeps)].tolist()
        for name, x in original.components.items():
            tiers = torch.from_numpy(planned.tier_of[name].copy())[:, torch.from_numpy(keeps)]
            x, y = x[:, torch.from_numpy(keeps)], layer.components[name]
            assert same_bits(x[tiers == NATIVE], y[tiers == NATIVE])
            error = (y.double() - x.double()).abs()
            for tier in (INT8, INT4):
                rows = tiers == tier
                assert (error[rows] <= worst_error(x, tier, published)[rows]).all()


@given(st.data())
def test_a_stream_may_be_cut_anywhere_and_means_the_same(data: st.DataObject) -> None:
    kv = data.draw(caches())
    plan = data.draw(plans(kv))
    whole = Plan(plan.layers, plan.menu)
    assert same_cache(decode(encode(kv, plan)), decode(encode(kv, whole)))


@pytest.mark.parametrize("start", [0, 100])
def test_two_token_chunks_of_two_head_ranges_tile_to_the_same_cache(start: int) -> None:
    kv = cache(layers=3, heads=4, tokens=10, start=start)
    tiers = np.random.default_rng(0).integers(0, 3, (4, 10))
    plan = plan_of(kv, tiers, split=Split(tokens=5, heads=2))
    pieces = pieces_of(kv, plan)
    assert [(p.manifest.blocks[0].tokens, p.manifest.blocks[0].heads) for p in pieces[:4]] == [
        ((start, start + 5), (0, 2)),
        ((start, start + 5), (2, 4)),
        ((start + 5, start + 10), (0, 2)),
        ((start + 5, start + 10), (2, 4)),
    ]
    assert same_cache(decode(encode(kv, plan)), decode(encode(kv, plan_of(kv, tiers))))


@given(st.data())
def test_a_plane_is_the_same_bytes_whole_or_by_head_ranges(data: st.DataObject) -> None:
    kv = data.draw(caches())
    plan = data.draw(plans(kv))
    size = data.draw(st.integers(1, 4))
    whole = planes_of(pieces_of(kv, Plan(plan.layers, plan.menu)))
    assert planes_of(pieces_of(kv, Plan(plan.layers, plan.menu, Split(heads=size)))) == whole


def test_pieces_in_any_order_give_the_same_cache() -> None:
    kv, plan, pieces = cut_cache()
    expected = decode(encode(kv, plan))
    for seed in range(10):
        random.Random(seed).shuffle(pieces)
        assert same_cache(decode(stream_of(offer_of(plan.shape, plan.menu), pieces)), expected)


def test_a_cache_without_any_token_goes_on_at_the_true_position() -> None:
    kv = cache(tokens=5)
    got = decode(encode(kv, plan_of(kv, DROP)))
    assert got.next_position == 5
    assert [len(layer.positions) for layer in got.layers] == [0, 0]
    with pytest.raises(ShapeMismatch, match="holds no token"):
        got.shape()


def test_every_truncation_is_a_typed_error() -> None:
    kv = cache(layers=1, heads=1, tokens=3, channels=4)
    stream = encode(kv, plan_of(kv, np.array([NATIVE, INT8, DROP])))
    for length in range(len(stream)):
        with pytest.raises(Truncated):
            decode(stream[:length])


@pytest.mark.parametrize("name", GOLDENS)
def test_no_flipped_bit_goes_unnoticed(name: str) -> None:
    """One bit in each of 300 parts of the stream."""
    _, _, stream = golden_stream(name)
    rng = random.Random(0)
    for part in range(300):
        damaged = bytearray(stream)
        first, last = (len(stream) * each // 300 for each in (part, part + 1))
        damaged[rng.randrange(first, last)] ^= 1 << rng.randrange(8)
        with pytest.raises(KVPrismError):
            decode(bytes(damaged))


@given(st.binary(max_size=300), st.integers(0, 2000))
def test_spliced_bytes_are_a_typed_error(junk: bytes, at: int) -> None:
    _, _, stream = golden_stream("nested-1.0.kvp")
    spliced = stream[:at] + junk + stream[at + len(junk) :]
    if spliced != stream:
        with pytest.raises(KVPrismError):
            decode(spliced)


@pytest.mark.parametrize("extra", [b"\0", b"KVPF", bytes(256)])
def test_bytes_after_the_end_are_refused(extra: bytes) -> None:
    _, _, stream = golden_stream("nested-1.0.kvp")
    with pytest.raises(KVPrismError):
        decode(stream + extra)
    with pytest.raises(ProtocolViolation):
        decode(stream + stream)


def test_a_plan_for_another_cache_is_refused() -> None:
    kv = cache()
    plan = plan_of(kv, INT8)
    with pytest.raises(ShapeMismatch, match="the plan has 2 layers, the cache 3"):
        encode(cache(layers=3), plan)
    with pytest.raises(
        ShapeMismatch, match=r"the plan is for layer 0 .*\[0, 16\).*has layer 0 .*\[0, 17\)"
    ):
        encode(cache(tokens=17), plan)
    with pytest.raises(ShapeMismatch, match="float16"):
        encode(cache(dtype="float16"), plan)


def test_a_cache_that_goes_on_later_than_its_tokens_end_is_refused() -> None:
    kv = cache()
    with pytest.raises(PositionMismatch, match="goes on at position 99, but its tokens end at 16"):
        encode(RequestKV(kv.layers, 99), plan_of(kv, NATIVE))


@pytest.mark.parametrize("split", [Split(), Split(tokens=3, heads=1)])
def test_a_value_that_its_tier_cannot_hold_is_named_by_its_place_in_the_prompt(
    split: Split,
) -> None:
    kv = cache(start=100)
    kv.layers[1].components["v"][1, 10, 3] = torch.nan
    with pytest.raises(CodecError, match=r"layer 1 component 'v': head 1 token 110 .*'int4'"):
        encode(kv, plan_of(kv, INT4, split=split))


def test_the_offer_states_what_it_is_told() -> None:
    kv = cache()
    profile = Profile("ab" * 32)
    stream = encode(kv, plan_of(kv, INT8), fingerprint=b"f" * 32, profile=profile)
    offer = next(parse(stream))
    assert isinstance(offer, Offer)
    assert (offer.fingerprint, offer.profile) == (b"f" * 32, profile.hash)
    assert offered_shape(offer) == kv.shape() and menu_of(offer) == MENU
    plain = next(parse(encode(kv, plan_of(kv, INT8))))
    assert isinstance(plain, Offer) and plain.fingerprint == plain.profile == NOT_STATED


def test_encoding_holds_little_more_than_the_stream_itself() -> None:
    kv = cache(layers=32, heads=4, tokens=128, channels=32)
    plan = plan_of(kv, NATIVE)
    assert plan.nbytes > 2**21
    encode(kv, plan)
    tracemalloc.start()
    encode(kv, plan)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.4 * plan.nbytes


def test_segments_decode_from_memory_that_is_used_again_afterwards() -> None:
    kv, plan, pieces = cut_cache()
    expected = decode(encode(kv, plan))
    assembler = Assembler(offer_of(plan.shape, plan.menu))
    for piece in pieces:
        area = bytearray(piece.area)
        assembler.add(Segments(piece.manifest, memoryview(area)))
        area[:] = b"\xff" * len(area)
    assert same_cache(assembler.finish(), expected)


def test_manifests_that_cover_one_component_alone_are_taken() -> None:
    kv = cache(layers=1)
    plan = plan_of(kv, INT8)
    [piece] = pieces_of(kv, plan)
    halves = []
    start = 0
    for block in piece.manifest.blocks:
        nbytes = sum(frames.padded(segment.nbytes) for segment in block.segments)
        manifest: Manifest = msgspec.structs.replace(piece.manifest, blocks=(block,))
        halves.append(Encoded(manifest, piece.area[start : start + nbytes]))
        start += nbytes
    stream = stream_of(offer_of(plan.shape, plan.menu), halves[::-1])
    assert same_cache(decode(stream), decode(encode(kv, plan)))


@pytest.mark.parametrize("codec", ["auto", "reference"])
@pytest.mark.parametrize("name", [*MENUS, *ONE_WIDTH_MENUS])
def test_whatever_is_in_the_memory_the_bytes_are_the_same(
    monkeypatch: pytest.MonkeyPatch, codec: str, name: str
) -> None:
    """A transport gives memory again without clearing it."""
    monkeypatch.setenv("KVPRISM_CODEC", codec)
    menu, kv = (MENUS | ONE_WIDTH_MENUS)[name], cache(layers=1, heads=2, tokens=70, channels=64)
    own = conditioning_of(kv)[0] if name == "conditioned" else None
    kept = [i for i, tier in enumerate(menu) if tier.bits]
    layer = plan_of(kv, np.resize(kept, (2, 70)), menu).layers[0]
    clean, soiled = (
        encode_layer(
            kv.layers[0],
            layer,
            menu,
            conditioning=own,
            allocate=lambda n, was=was: memoryview(bytearray(was * n)),
        )
        for was in (b"\0", b"\xa5")
    )
    assert [bytes(piece.area) for piece in clean] == [bytes(piece.area) for piece in soiled]
