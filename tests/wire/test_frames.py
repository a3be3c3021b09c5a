"""Frames: what is refused, and before what is allocated; where segments lie."""

import struct
import tracemalloc
from typing import Any

import msgspec
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from kvprism.errors import BadInput, Damaged, LimitExceeded, ProtocolViolation, WireError
from kvprism.wire.frames import (
    HEAD_NBYTES,
    Limits,
    digest_of,
    frame_nbytes,
    pack,
    padded,
    parse_head,
    segment_slices,
    segments_nbytes,
    unpack,
    verify,
    with_padding,
)
from kvprism.wire.messages import (
    NO_ID,
    TYPES,
    Abort,
    Block,
    ComponentEntry,
    LayerEntry,
    Manifest,
    Message,
    Offer,
    Ping,
    Segment,
    TierMap,
)

from .examples import (
    LISTED,
    PACKED,
    UNIFORM,
    every_message,
    filler,
    manifests_of,
    offer_of,
    segment_of,
)


def framed(kind: type[Message], body: object) -> bytes:
    """A frame with a right digest around any body."""
    raw = body if isinstance(body, bytes) else msgspec.msgpack.encode(body)
    head = struct.pack("<4sBBHII", b"KVPF", TYPES.index(kind) + 1, 0, 0, len(raw), 0)
    return head + struct.pack("<Q", xxhash.xxh3_64_intdigest(head + raw)) + raw


def read(data: bytes, limits: Limits | None = None) -> Message:
    return unpack(parse_head(data[:HEAD_NBYTES]), data[HEAD_NBYTES:], limits or Limits())


def fields(message: Message) -> dict[str, Any]:
    return msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=dict[str, Any])


def manifest_of(*blocks: Block, maps: tuple[TierMap, ...] = (UNIFORM,)) -> Manifest:
    return Manifest(NO_ID, NO_ID, 0, maps, blocks)


def block_of(**changes: object) -> Block:
    block = Block(0, "k", (0, 2), (0, 12), 0, (segment_of(1, filler(300, 1)),))
    return msgspec.structs.replace(block, **changes)


@pytest.mark.parametrize("message", every_message(), ids=lambda m: type(m).__name__)
def test_the_length_of_a_frame_is_known_without_packing_it(message: Message) -> None:
    assert frame_nbytes(message) == len(pack(message))


@pytest.mark.parametrize(
    ("at", "value", "error"),
    [
        (0, b"PVKF", WireError),
        (4, b"\x00", ProtocolViolation),
        (4, b"\x0f", ProtocolViolation),
        (5, b"\x01", ProtocolViolation),
        (6, b"\x01\x00", ProtocolViolation),
        (12, b"\x01\x00\x00\x00", ProtocolViolation),
        (8, b"\x00\x00\x00\x00", ProtocolViolation),
    ],
)
def test_a_head_that_this_version_does_not_know_is_refused(
    at: int, value: bytes, error: type[WireError]
) -> None:
    head = bytearray(pack(Ping())[:HEAD_NBYTES])
    head[at : at + len(value)] = value
    with pytest.raises(error):
        parse_head(head)


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.__name__)
def test_each_type_has_a_longest_body(kind: type[Message]) -> None:
    most = {"Manifest": 2**24, "Offer": 2**20}.get(kind.__name__, 2**16)
    number = TYPES.index(kind) + 1
    for nbytes in (most, most + 1, 2**32 - 1):
        head = struct.pack("<4sBBHIIQ", b"KVPF", number, 0, 0, nbytes, 0, 0)
        if nbytes <= most:
            assert parse_head(head).body_nbytes == most
        else:
            with pytest.raises(LimitExceeded, match=str(nbytes)):
                parse_head(head)


def test_a_message_that_nobody_would_take_is_not_packed() -> None:
    with pytest.raises(LimitExceeded):
        pack(Abort(NO_ID, NO_ID, "failed", "x" * 2**16))


def test_a_wrong_digest_is_noticed() -> None:
    data = bytearray(pack(Ping()))
    data[16] ^= 1
    with pytest.raises(Damaged):
        read(bytes(data))


@pytest.mark.parametrize("message", every_message(), ids=lambda m: type(m).__name__)
def test_an_unknown_critical_field_is_refused(message: Message) -> None:
    with pytest.raises(ProtocolViolation, match="later"):
        read(framed(type(message), fields(message) | {"later": 1}))


def test_an_unknown_critical_field_of_a_nested_record_is_refused() -> None:
    body = fields(manifests_of()[0][0])
    body["blocks"][0].append(1)
    with pytest.raises(ProtocolViolation):
        read(framed(Manifest, body))


@pytest.mark.parametrize("message", every_message(), ids=lambda m: type(m).__name__)
def test_an_unknown_ancillary_field_is_skipped(message: Message) -> None:
    later = {"ancillary": {"later": [1, {"deep": b"x"}], "note": "y"}}
    got = read(framed(type(message), fields(message) | later))
    assert set(got.ancillary) == {"later", "note"}
    assert msgspec.structs.replace(got, ancillary={}) == message


@pytest.mark.parametrize(
    "body",
    [
        b"\xc1",
        b"\x80\x80",
        b"\x81\xa1\xff\x01",
        b"\x81\xa9ancillary\x81\xa1\xff\x01",
        b"\x81\xa9ancillary\x81\xa1a" + b"\x91" * 60_000 + b"\x01",
        b"\x90",
        b"\xdf\xff\xff\xff\xff",
    ],
)
def test_a_body_that_is_no_map_of_fields_is_refused(body: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        read(framed(Ping, body))


@pytest.mark.parametrize("message", every_message(), ids=lambda m: type(m).__name__)
def test_a_missing_field_is_refused(message: Message) -> None:
    for name in fields(message):
        body = {key: value for key, value in fields(message).items() if key != name}
        with pytest.raises(ProtocolViolation, match=name):
            read(framed(type(message), body))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("request", bytes(15)),
        ("ticket", bytes(17)),
        ("sequence", -1),
        ("sequence", 2**32),
        ("blocks", []),
        ("maps", [[1, 0, 0, b"", b""]]),
        ("maps", [[1, 0, 0, bytes(17), b""]]),
    ],
)
def test_a_manifest_field_out_of_bounds_is_refused(name: str, value: object) -> None:
    with pytest.raises(ProtocolViolation):
        read(framed(Manifest, fields(manifests_of()[0][0]) | {name: value}))


@pytest.mark.parametrize(
    "manifest",
    [
        manifest_of(block_of(heads=(2, 2))),
        manifest_of(block_of(tokens=(3, 2))),
        manifest_of(block_of(map=1)),
        manifest_of(block_of(segments=(segment_of(1, b"x"), segment_of(1, b"x")))),
        manifest_of(block_of(segments=(segment_of(2, b"x"), segment_of(1, b"x")))),
        manifest_of(block_of(segments=(Segment(1, 65_537, bytes(8)),))),
        manifest_of(block_of(segments=(Segment(1, 0, bytes(8)),))),
        manifest_of(block_of(), maps=(TierMap(0, 0, 0, b"\x00", b""),)),
        manifest_of(block_of(), maps=(TierMap(3, 0, 0, b"\x00", b""),)),
        manifest_of(block_of(), maps=(TierMap(1, 0, 0, b"\x00\x01", b""),)),
        manifest_of(block_of(), maps=(TierMap(1, 0, 0, b"\x00", b"x"),)),
        manifest_of(block_of(), maps=(TierMap(1, 1, 3, b"\x00\x01", bytes(5)),)),
        manifest_of(block_of(), maps=(TierMap(1, 1, 1, b"\x00\x01\x02", bytes(2)),)),
        manifest_of(block_of(), maps=(TierMap(2, 1, 1, b"\x00\x01", bytes(2)),)),
        manifest_of(block_of(), maps=(TierMap(1, 2, 0, b"\x00\x01", bytes(5)),)),
        manifest_of(block_of(), maps=(TierMap(1, 3, 0, b"\x00", b""),)),
        manifest_of(block_of(), maps=(TierMap(1, 1, 1, b"\x00\x00", bytes(2)),)),
        manifest_of(block_of(), maps=(TierMap(1, 0, 0, b"\x10", b""),)),
    ],
)
def test_a_manifest_that_describes_nothing_possible_is_refused(manifest: Manifest) -> None:
    with pytest.raises(ProtocolViolation, match="manifest 0"):
        read(pack(manifest))


@pytest.mark.parametrize("tier_map", [UNIFORM, PACKED, LISTED])
def test_every_mode_of_tier_map_is_read(tier_map: TierMap) -> None:
    manifest = manifest_of(block_of(), maps=(tier_map,))
    assert read(pack(manifest)) == manifest


@pytest.mark.parametrize(
    "layers",
    [
        (LayerEntry(1, 0, 4, "bfloat16", (ComponentEntry("k", 1, 8),)),) * 2,
        (LayerEntry(1, 4, 4, "bfloat16", (ComponentEntry("k", 1, 8),)),),
        (LayerEntry(1, 0, 4, "bfloat16", (ComponentEntry("k", 0, 8),)),),
        (LayerEntry(1, 0, 4, "bfloat16", (ComponentEntry("k", 1, 0),)),),
        (LayerEntry(1, 0, 4, "bfloat16", (ComponentEntry("k", 1, 8),) * 2),),
    ],
)
def test_an_offer_that_describes_no_cache_is_refused(layers: tuple[LayerEntry, ...]) -> None:
    with pytest.raises(ProtocolViolation, match="offer"):
        read(pack(offer_of(layers=layers)))


def test_a_menu_has_at_most_sixteen_tiers() -> None:
    menu = offer_of().menu * 4
    assert read(pack(offer_of(menu=menu))) == offer_of(menu=menu)
    with pytest.raises(ProtocolViolation):
        read(pack(offer_of(menu=(*menu, menu[0]))))


def test_a_manifest_above_the_receivers_limits_is_refused() -> None:
    manifest = manifests_of()[0][0]
    area = segments_nbytes(manifest)
    assert read(pack(manifest), Limits(area, 2)) == manifest
    with pytest.raises(LimitExceeded, match=str(area)):
        read(pack(manifest), Limits(area - 1, 2))
    with pytest.raises(LimitExceeded, match="2 blocks"):
        read(pack(manifest), Limits(area, 1))


def test_limits_that_admit_nothing_are_refused() -> None:
    with pytest.raises(BadInput):
        Limits(max_blocks=0)


@pytest.mark.parametrize(
    "body",
    [
        b"\x81\xa4maps\xdd\xff\xff\xff\xff",
        b"\x81\xa7request\xc6\xff\xff\xff\xff",
        b"\x81\xa9ancillary\xdf\xff\xff\xff\xff",
    ],
)
def test_a_length_inside_a_body_allocates_nothing_by_itself(body: bytes) -> None:
    data = framed(Manifest, body)
    tracemalloc.start()
    with pytest.raises(ProtocolViolation):
        read(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**16


@given(st.lists(st.integers(0, 3000), max_size=6))
def test_segments_lie_at_multiples_of_256_with_zeros_between(sizes: list[int]) -> None:
    data = [filler(n, i + 1) for i, n in enumerate(sizes)]
    segments = tuple(segment_of(i, piece) for i, piece in enumerate(data))
    manifest = manifest_of(block_of(segments=segments))
    area = b"".join(bytes(piece) for piece in with_padding(data))
    slices = segment_slices(manifest)
    assert len(area) == segments_nbytes(manifest) == sum(map(padded, sizes))
    assert [area[where] for where in slices] == data
    assert all(where.start % 256 == 0 for where in slices)
    rest = bytearray(area)
    for where in slices:
        rest[where] = bytes(where.stop - where.start)
    assert not any(rest)


@pytest.mark.parametrize("nbytes", [0, 1, 65_535, 65_536, 65_537, 200_000])
def test_a_segment_has_one_digest_for_each_64_kib(nbytes: int) -> None:
    data = filler(nbytes, 9)
    expected = [
        struct.pack("<Q", xxhash.xxh3_64(data[at : at + 65_536]).intdigest())
        for at in range(0, nbytes, 65_536)
    ]
    assert digest_of(data) == b"".join(expected)
    verify(segment_of(1, data), memoryview(data))


def test_a_segment_that_is_not_the_one_described_is_damaged() -> None:
    data = filler(70_000, 9)
    for other in (data[:-1], data + b"x", data[:-1] + b"x", b"x" + data[1:]):
        with pytest.raises(Damaged, match="plane 1"):
            verify(segment_of(1, data), other)


def test_the_same_frame_with_any_names_has_the_same_length() -> None:
    manifest = manifests_of()[0][0]
    other = msgspec.structs.replace(manifest, request=b"\xff" * 16, ticket=b"\xfe" * 16)
    assert frame_nbytes(manifest) == frame_nbytes(other)
    assert isinstance(read(pack(offer_of())), Offer)
