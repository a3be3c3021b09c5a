"""Whole streams: their bytes, what comes back, how they may be cut, and what is refused."""

import random
import tracemalloc
from collections.abc import Callable
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
    plan_of,
    plans,
    same_bits,
    same_cache,
)

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
from kvprism.core import MENU, PUBLISHED_MENU, KVShape
from kvprism.errors import (
    CodecError,
    KVPrismError,
    LimitExceeded,
    PositionMismatch,
    ProtocolViolation,
    ShapeMismatch,
    Truncated,
    Unsupported,
)
from kvprism.layout import Split, pack_tier_map
from kvprism.plans import Plan, end_of, offer_of
from kvprism.tensors import DTYPES, LayerKV, RequestKV
from kvprism.wire import frames
from kvprism.wire.messages import NOT_STATED, Block, Manifest, Offer, Segment, TierEntry
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


def pieces_of(kv: RequestKV, plan: Plan) -> list[Encoded]:
    pieces: list[Encoded] = []
    for layer, planned in zip(kv.layers, plan.layers, strict=True):
        pieces += encode_layer(layer, planned, plan.menu, plan.split, len(pieces))
    return pieces


def planes_of(pieces: list[Encoded]) -> dict[tuple[int, str, int], bytes]:
    """(layer, component, plane) -> its bytes, the pieces joined in order."""
    planes: dict[tuple[int, str, int], bytes] = {}
    for piece in pieces:
        slices = iter(frames.segment_slices(piece.manifest))
        for block in piece.manifest.blocks:
            for segment in block.segments:
                key = (block.layer, block.component, segment.plane)
                planes[key] = planes.get(key, b"") + bytes(piece.area[next(slices)])
    return planes


def stream_of(offer: Offer, pieces: list[Encoded]) -> bytes:
    """A well-framed stream of any pieces, numbered in this order."""
    parts: list[bytes | memoryview] = [frames.pack(offer)]
    for sequence, piece in enumerate(pieces):
        manifest = msgspec.structs.replace(piece.manifest, sequence=sequence)
        parts += [frames.pack(manifest), piece.area]
    parts.append(frames.pack(end_of(len(pieces), sum(len(part) for part in parts))))
    return b"".join(parts)


def cut_cache() -> tuple[RequestKV, Plan, list[Encoded]]:
    kv = cache(layers=2, heads=4, tokens=9)
    tiers = np.random.default_rng(1).integers(0, 3, (4, 9))
    plan = plan_of(kv, tiers, split=Split(tokens=4, heads=2))
    return kv, plan, pieces_of(kv, plan)


def test_pieces_in_any_order_give_the_same_cache() -> None:
    kv, plan, pieces = cut_cache()
    expected = decode(encode(kv, plan))
    for seed in range(10):
        random.Random(seed).shuffle(pieces)
        assert same_cache(decode(stream_of(offer_of(plan.shape, plan.menu), pieces)), expected)


def test_a_missing_piece_is_refused() -> None:
    _, plan, pieces = cut_cache()
    for i in range(len(pieces)):
        stream = stream_of(offer_of(plan.shape, plan.menu), pieces[:i] + pieces[i + 1 :])
        with pytest.raises(ProtocolViolation, match="rows never came"):
            decode(stream)


def test_a_piece_that_comes_twice_is_refused() -> None:
    _, plan, pieces = cut_cache()
    for i in range(len(pieces)):
        for others in (pieces, pieces[:i] + pieces[i + 1 :]):
            stream = stream_of(offer_of(plan.shape, plan.menu), [*others, pieces[i], pieces[i]])
            with pytest.raises(ProtocolViolation, match="overlap"):
                decode(stream)


def test_pieces_that_overlap_in_part_are_refused() -> None:
    kv, plan, pieces = cut_cache()
    shifted = pieces_of(kv, Plan(plan.layers, plan.menu, Split(tokens=5, heads=2)))
    stream = stream_of(offer_of(plan.shape, plan.menu), [*shifted[:2], *pieces[2:]])
    with pytest.raises(ProtocolViolation, match="overlap"):
        decode(stream)


def changed(piece: Encoded, change: Callable[[Block], Block], area: bytes | None = None) -> Encoded:
    blocks = (change(piece.manifest.blocks[0]), *piece.manifest.blocks[1:])
    manifest = msgspec.structs.replace(piece.manifest, blocks=blocks)
    return Encoded(manifest, piece.area if area is None else memoryview(bytearray(area)))


def without_its_plane(block: Block) -> Block:
    return msgspec.structs.replace(block, segments=block.segments[1:])


def renamed_plane(block: Block) -> Block:
    first = block.segments[0]
    renamed = Segment(first.plane + 1, first.nbytes, first.digests)
    return msgspec.structs.replace(block, segments=(renamed, *block.segments[1:]))


def one_native_plane() -> tuple[Plan, Encoded]:
    kv = cache(layers=1, heads=1, tokens=2, channels=128)
    plan = plan_of(kv, NATIVE)
    return plan, pieces_of(kv, plan)[0]


@pytest.mark.parametrize("change", [without_its_plane, renamed_plane])
def test_planes_that_the_tier_map_does_not_name_are_refused(
    change: Callable[[Block], Block],
) -> None:
    plan, piece = one_native_plane()
    area = bytes(piece.area)[512:] if change is without_its_plane else bytes(piece.area)
    stream = stream_of(offer_of(plan.shape, plan.menu), [changed(piece, change, area)])
    with pytest.raises(ProtocolViolation, match=r"layer 0 component 'k'.*needs planes \{0: 512\}"):
        decode(stream)


@pytest.mark.parametrize("nbytes", [511, 513])
def test_a_plane_of_another_size_is_refused(nbytes: int) -> None:
    plan, piece = one_native_plane()
    data = (bytes(piece.area)[:512] + b"x")[:nbytes]

    def resize(block: Block) -> Block:
        return msgspec.structs.replace(
            block, segments=(Segment(0, nbytes, frames.digest_of(data)), *block.segments[1:])
        )

    area = data + bytes(frames.padded(nbytes) - nbytes) + bytes(piece.area)[512:]
    stream = stream_of(offer_of(plan.shape, plan.menu), [changed(piece, resize, area)])
    with pytest.raises(ProtocolViolation, match="needs planes"):
        decode(stream)


def test_a_tier_map_for_other_planes_is_refused() -> None:
    plan, piece = one_native_plane()
    wrong = pack_tier_map(np.full((1, 2), INT8, np.uint8))
    manifest = msgspec.structs.replace(piece.manifest, maps=(wrong,))
    stream = stream_of(offer_of(plan.shape, plan.menu), [Encoded(manifest, piece.area)])
    with pytest.raises(ProtocolViolation, match="the tier map needs planes"):
        decode(stream)


def test_a_tier_beyond_the_menu_is_refused() -> None:
    plan, piece = one_native_plane()
    stream = stream_of(offer_of(plan.shape, plan.menu[1:3]), [beyond(piece, 2)])
    with pytest.raises(ProtocolViolation, match="menu of 2"):
        decode(stream)


def beyond(piece: Encoded, tier: int) -> Encoded:
    wrong = pack_tier_map(np.full((1, 2), tier, np.uint8))
    return Encoded(msgspec.structs.replace(piece.manifest, maps=(wrong,)), piece.area)


def with_menu(*entries: TierEntry) -> Callable[[Offer], Offer]:
    return lambda offer: msgspec.structs.replace(offer, menu=entries)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (with_menu(TierEntry("kvp.nested/1", 2, "int2")), Unsupported, "at 2 bits is not built"),
        (with_menu(TierEntry("kvp.new/7", 4, "x")), Unsupported, "'x': codec kvp.new/7"),
        (
            with_menu(TierEntry("kvp.nested/1", 8, "a"), TierEntry("kvp.absmax/1", 8, "b")),
            ProtocolViolation,
            "one quantised codec",
        ),
    ],
)
def test_an_offer_of_codes_that_cannot_be_read_is_refused(
    change: Callable[[Offer], Offer], error: type[KVPrismError], message: str
) -> None:
    plan, piece = one_native_plane()
    stream = stream_of(change(offer_of(plan.shape, plan.menu)), [piece])
    with pytest.raises(error, match=message):
        decode(stream)


def test_an_offer_of_an_odd_number_of_channels_is_refused() -> None:
    offer = offer_of(KVShape.dense(layers=1, heads=1, channels=4, tokens=1), MENU)
    entry = offer.layers[0]
    odd = msgspec.structs.replace(entry.components[0], channels=3)
    layers = (msgspec.structs.replace(entry, components=(odd,)),)
    with pytest.raises(ProtocolViolation, match="even number of channels"):
        offered_shape(msgspec.structs.replace(offer, layers=layers))


def test_a_cache_that_is_too_large_is_refused_before_it_is_allocated() -> None:
    shape = KVShape.dense(layers=4000, heads=60_000, channels=60_000, tokens=2**32 - 1)
    with pytest.raises(LimitExceeded, match="at most 68719476736 are allowed"):
        Assembler(offer_of(shape, MENU))
    kv = cache()
    stream = encode(kv, plan_of(kv, NATIVE))
    native = kv.shape().native_nbytes
    assert same_cache(decode(stream, max_nbytes=native), kv)
    with pytest.raises(LimitExceeded):
        decode(stream, max_nbytes=native - 1)


@pytest.mark.parametrize("split", [Split(), Split(heads=1)])
@pytest.mark.parametrize("component", ["k", "v"])
def test_heads_or_components_that_keep_other_tokens_are_refused(
    split: Split, component: str
) -> None:
    kv = cache(layers=1)
    tiers = np.full((2, 16), INT8, np.uint8)
    uneven = tiers.copy()
    uneven[1, 3] = DROP
    plan = plan_of(kv, lambda _, name: uneven if name == component else tiers, split=split)
    with pytest.raises(CodecError, match="one set of tokens per layer"):
        decode(encode(kv, plan))


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
    _, _, stream = golden_stream(name)
    rng = random.Random(0)
    for _ in range(1000):
        damaged = bytearray(stream)
        damaged[rng.randrange(len(stream))] ^= 1 << rng.randrange(8)
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
    with pytest.raises(ShapeMismatch, match="planned 2 layers, got 3"):
        encode(cache(layers=3), plan)
    with pytest.raises(ShapeMismatch, match="plan this cache anew"):
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
    stream = encode(kv, plan_of(kv, INT8), fingerprint=b"f" * 32, profile=b"p" * 32)
    offer = next(parse(stream))
    assert isinstance(offer, Offer)
    assert (offer.fingerprint, offer.profile) == (b"f" * 32, b"p" * 32)
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
