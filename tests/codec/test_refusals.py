"""Well-framed streams whose pieces, planes, maps or offers are not right."""

from collections.abc import Callable

import msgspec
import numpy as np
import pytest
from strategies import DROP, INT4, INT8, NATIVE, cache, plan_of, same_cache

from codec.pieces import cut_cache, pieces_of, stream_of
from kvprism.codec.stream import Assembler, Encoded, decode, encode, offered_shape
from kvprism.core import MENU, KVShape
from kvprism.errors import CodecError, KVPrismError, LimitExceeded, ProtocolViolation, Unsupported
from kvprism.layout import Split, pack_tier_map
from kvprism.plans import Plan, offer_of
from kvprism.wire import frames
from kvprism.wire.messages import Block, Offer, Segment, TierEntry


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


def test_planes_that_no_encoder_made_are_refused_by_name() -> None:
    kv = cache(layers=1, heads=1, tokens=2, channels=128)
    plan = plan_of(kv, INT4)
    [piece] = pieces_of(kv, plan)
    area = bytearray(piece.area)
    area[:2] = b"\x00\xbc"  # a scale of -1

    def digested(block: Block) -> Block:
        scale = Segment(1, 4, frames.digest_of(area[:4]))
        return msgspec.structs.replace(block, segments=(scale, *block.segments[1:]))

    stream = stream_of(offer_of(plan.shape, plan.menu), [changed(piece, digested, bytes(area))])
    with pytest.raises(CodecError, match="layer 0 component 'k': a scale is negative"):
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


@pytest.mark.parametrize("split", [Split(), Split(heads=1), Split(tokens=5)])
def test_keys_without_their_values_are_refused_even_where_heads_are_ragged(split: Split) -> None:
    kv = cache(layers=1)
    tiers = np.full((2, 16), INT8, np.uint8)
    uneven = tiers.copy()
    uneven[1, 3] = DROP
    plan = plan_of(kv, lambda _, name: uneven if name == "k" else tiers, split=split)
    with pytest.raises(CodecError, match="components 'v' and 'k' keep different rows"):
        decode(encode(kv, plan), drop="per_head")
    alike = plan_of(kv, uneven, split=split)
    got = decode(encode(kv, alike), drop="per_head").layers[0]
    assert got.held is not None and (~got.held).nonzero().tolist() == [[1, 3]]
    assert not got.components["k"][1, 3].any()
