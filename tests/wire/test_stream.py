"""The reader: however the bytes are cut or broken, the same events or a typed end."""

import random
import tracemalloc
from collections.abc import Callable
from itertools import cycle, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvprism.errors import LimitExceeded, Truncated, WireError
from kvprism.wire.frames import Buffer, Limits, pack, segments_nbytes
from kvprism.wire.messages import NO_ID, Block, Manifest, Message, Ping, Segment
from kvprism.wire.stream import DamagedSegments, Event, Segments, StreamReader, parse

from .examples import UNIFORM, filler, flat, manifests_of, offer_of, stream, stream_parts

LARGE = stream(200_000)
SMALL = stream()


def fed(pieces: list[bytes]) -> list[Event]:
    reader = StreamReader()
    events = [event for piece in pieces for event in reader.feed(piece)]
    reader.close()
    return events


def received(data: bytes, how_many: Callable[[int], int]) -> list[Event]:
    """As a connection would: straight into the reader's buffers, `how_many(room)` bytes at once."""
    reader, at = StreamReader(), 0
    events: list[Event] = []
    while at < len(data):
        buffer = reader.next_buffer()
        n = min(how_many(len(buffer)), len(data) - at)
        buffer[:n] = data[at : at + n]
        events += reader.advance(n)
        at += n
    reader.close()
    return events


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
def test_the_events_are_the_messages_and_the_segments(data: bytes) -> None:
    events = fed([data])
    names = [type(event).__name__ for event in events]
    assert names == ["Offer"] + ["Manifest", "Segments"] * 3 + ["End"]
    assert events[0] == offer_of()
    areas = [event.area for event in events if isinstance(event, Segments)]
    parts = stream_parts(700 if data is SMALL else 200_000)
    assert [bytes(area) for area in areas] == [parts[2], parts[4], parts[6]]


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
def test_one_byte_at_a_time_gives_the_same_events(data: bytes) -> None:
    assert flat(received(data, lambda room: 1)) == flat(fed([data]))


@given(st.lists(st.integers(0, len(LARGE)), max_size=20))
def test_arbitrary_chunks_give_the_same_events(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(LARGE)]
    pieces = [LARGE[a:b] for a, b in pairwise(edges)]
    assert flat(fed(pieces)) == flat(fed([LARGE]))


@given(st.lists(st.integers(1, 100_000), min_size=1, max_size=10))
def test_arbitrary_receives_give_the_same_events(sizes: list[int]) -> None:
    repeated = cycle(sizes)
    assert flat(received(LARGE, lambda room: min(room, next(repeated)))) == flat(fed([LARGE]))


def test_a_stream_in_memory_gives_the_same_events_without_copies() -> None:
    blob = bytearray(LARGE)
    events = list(parse(blob))
    assert flat(events) == flat(fed([LARGE]))
    blob[:] = bytes(len(blob))
    assert not any(
        bytes(event.area).strip(b"\0") for event in events if isinstance(event, Segments)
    )


def test_the_whole_area_is_wanted_at_once() -> None:
    manifest = manifests_of(200_000)[0][0]
    reader = StreamReader()
    assert reader.feed(pack(manifest)) == [manifest]
    assert len(reader.next_buffer()) == segments_nbytes(manifest) > 200_000


def test_the_caller_may_own_the_memory() -> None:
    memory: list[Buffer] = []

    def allocate(nbytes: int) -> Buffer:
        memory.append(bytearray(nbytes + 100))
        return memory[-1]

    reader = StreamReader(allocate=allocate)
    areas = [event.area for event in reader.feed(SMALL) if isinstance(event, Segments)]
    assert [area.obj for area in areas if area] == memory


def area_of(reader: StreamReader, data: bytes) -> memoryview:
    (area,) = (event.area for event in reader.feed(data) if isinstance(event, Segments))
    return area


def test_memory_is_used_again_only_when_nobody_holds_it() -> None:
    reader, parts = StreamReader(), stream_parts()
    held = area_of(reader, parts[1] + parts[2])[256:]
    assert area_of(reader, parts[3] + parts[4]).obj is not held.obj
    assert bytes(held) == parts[2][256:]
    last = area_of(reader, parts[1] + parts[2])
    memory = last.obj
    del last
    assert area_of(reader, parts[3] + parts[4]).obj is memory


@pytest.mark.parametrize("read", [lambda data: fed([data]), lambda data: list(parse(data))])
def test_every_truncation_is_noticed(read: Callable[[bytes], list[Event]]) -> None:
    whole = {sum(len(part) for part in stream_parts()[:i]) for i in (0, 1, 3, 5, 7, 8)}
    for length in set(range(len(SMALL))) - whole:
        with pytest.raises(Truncated):
            read(SMALL[:length])


def outcome(data: Buffer) -> str:
    """Whether an event or a typed error tells of the damage; untyped errors pass through."""
    reader = StreamReader(Limits(max_segments_nbytes=2**20))
    try:
        events = reader.feed(data)
        reader.close()
    except WireError:
        return "damaged"
    return "damaged" if any(isinstance(event, DamagedSegments) for event in events) else "accepted"


def test_every_single_bit_flip_is_noticed() -> None:
    assert outcome(SMALL) == "accepted"
    data = bytearray(SMALL)
    accepted = []
    for bit in range(8 * len(data)):
        data[bit // 8] ^= 1 << bit % 8
        if outcome(data) != "damaged":
            accepted.append(bit)
        data[bit // 8] ^= 1 << bit % 8
    assert 8 * len(data) >= 10_000 and accepted == []


def test_ten_thousand_random_breakages_are_noticed() -> None:
    source = random.Random(20260608)
    for _ in range(10_000):
        data = bytearray(SMALL)
        for _ in range(source.randint(1, 8)):
            data[source.randrange(len(data))] ^= source.randint(1, 255)
        if data != SMALL:
            assert outcome(data) == "damaged"


def test_damaged_segments_leave_the_rest_of_the_stream_readable() -> None:
    parts = stream_parts(200_000)
    manifest, segments = manifests_of(200_000)[0]
    for at in (0, 299, 300, 511, 512, 768, 768 + 65_536, 768 + 199_999, len(parts[2]) - 1):
        broken = bytearray(parts[2])
        broken[at] ^= 1
        events = fed([*parts[:2], bytes(broken), *parts[3:]])
        assert events[2] == DamagedSegments(manifest)
        assert flat(events[3:]) == flat(fed(parts)[3:])
    assert len(segments) == 3


def test_after_an_error_every_call_raises_it_again() -> None:
    reader = StreamReader()
    with pytest.raises(WireError) as first:
        reader.feed(b"x" * 24)
    for call in (reader.next_buffer, lambda: reader.advance(1), reader.close):
        with pytest.raises(WireError) as again:
            call()
        assert again.value is first.value


def peak_of(call: Callable[[], object]) -> int:
    tracemalloc.start()
    call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_a_hostile_body_length_is_refused_before_it_is_allocated() -> None:
    head = bytearray(pack(Ping())[:24])
    head[8:12] = b"\xff\xff\xff\xff"

    def attack() -> None:
        with pytest.raises(LimitExceeded):
            StreamReader().feed(head)

    attack()  # the first failure imports what pytest needs to show it
    assert peak_of(attack) < 2**16


def huge_manifest(nbytes: int) -> Manifest:
    segment = Segment(1, nbytes, bytes(8 * -(-nbytes // 65_536)))
    return Manifest(NO_ID, NO_ID, 0, (UNIFORM,), (Block(0, "k", (0, 2), (0, 12), 0, (segment,)),))


def test_a_hostile_segment_length_is_refused_before_it_is_allocated() -> None:
    frame = pack(huge_manifest(2**30 + 1))

    def attack() -> None:
        with pytest.raises(LimitExceeded):
            StreamReader().feed(frame)

    attack()
    assert peak_of(attack) < 2**20


def test_an_area_is_not_allocated_before_its_manifest_was_seen() -> None:
    frame = pack(huge_manifest(2**29))
    events: list[Event] = []
    assert peak_of(lambda: events.extend(StreamReader().feed(frame))) < 2**20
    assert len(events) == 1 and isinstance(events[0], Message)


def test_digests_are_checked_while_the_area_arrives() -> None:
    data = filler(3 * 65_536, 5)
    manifest, _ = manifests_of(len(data))[0]
    reader = StreamReader()
    reader.feed(pack(manifest))
    reader.feed(bytes(256 * 3) + data[:100])  # the first planes are wrong
    area = reader.next_buffer()
    area[:] = bytes(len(area))
    assert reader.advance(len(area)) == [DamagedSegments(manifest)]
