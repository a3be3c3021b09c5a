"""Files: the same order without a peer."""

from typing import Any

import msgspec
import pytest

from kvprism.errors import Damaged, ProtocolViolation, Rejected, TicketRefused, Truncated, WireError
from kvprism.wire.frames import pack
from kvprism.wire.messages import NO_ID, End, Manifest, Ping
from kvprism.wire.order import FileSession
from kvprism.wire.stream import DamagedSegments, Event, parse

from .examples import REQUEST, manifests_of, offer_of, stream, stream_parts

EVENTS = list(parse(stream()))


def handled(events: list[Event]) -> FileSession:
    session = FileSession()
    for event in events:
        assert session.handle(event) == []
    session.close()
    return session


def test_a_whole_file_is_complete() -> None:
    session = handled(EVENTS)
    assert session.complete and session.offer == offer_of()


@pytest.mark.parametrize("count", range(len(EVENTS)))
def test_a_file_that_stops_between_frames_is_truncated(count: int) -> None:
    with pytest.raises(Truncated, match="END"):
        handled(EVENTS[:count])


@pytest.mark.parametrize("left_out", range(len(EVENTS) - 1))
def test_a_file_without_one_of_its_frames_is_refused(left_out: int) -> None:
    with pytest.raises(WireError):
        handled(EVENTS[:left_out] + EVENTS[left_out + 1 :])


@pytest.mark.parametrize("first", range(len(EVENTS) - 1))
def test_two_frames_in_the_wrong_order_are_refused(first: int) -> None:
    events = list(EVENTS)
    events[first : first + 2] = reversed(events[first : first + 2])
    with pytest.raises(WireError):
        handled(events)


def test_nothing_follows_the_end() -> None:
    for event in (*EVENTS, Ping()):
        with pytest.raises(ProtocolViolation, match="closed"):
            handled([*EVENTS, event])


def test_damaged_segments_end_the_file() -> None:
    manifest = manifests_of()[0][0]
    with pytest.raises(Damaged, match="manifest 0"):
        handled([*EVENTS[:2], DamagedSegments(manifest)])


def test_frames_of_two_requests_do_not_mix() -> None:
    first, second = manifests_of()[0][0], manifests_of()[1][0]
    other = msgspec.structs.replace(second, ticket=bytes(range(16)))
    with pytest.raises(TicketRefused):
        handled([*EVENTS[:3], other])
    with pytest.raises(TicketRefused):
        handled([EVENTS[0], msgspec.structs.replace(first, request=REQUEST)])


def test_a_recorded_connection_is_a_file() -> None:
    ticket = bytes(range(50, 66))
    parts = [pack(offer_of(REQUEST))]
    old = stream_parts()
    for i, (manifest, _) in enumerate(manifests_of()):
        named = msgspec.structs.replace(manifest, request=REQUEST, ticket=ticket)
        parts += [pack(named), old[2 + 2 * i]]
    parts.append(pack(End(REQUEST, ticket, 3, sum(map(len, parts)))))
    data = b"".join(parts)
    assert handled(list(parse(data))).complete
    assert len(data) == len(stream())


@pytest.mark.parametrize(
    ("change", "code"), [({"format": (2, 0)}, "version"), ({"digest": "crc32"}, "digest")]
)
def test_another_major_version_or_digest_is_refused(change: dict[str, Any], code: str) -> None:
    with pytest.raises(Rejected) as refused:
        handled([offer_of(**change)])
    assert refused.value.code == code


def test_a_later_minor_version_is_read() -> None:
    session = FileSession()
    session.handle(offer_of(format=(1, 7)))
    assert session.state == "open"


def test_a_manifest_of_a_file_names_what_the_offer_has() -> None:
    manifest = manifests_of()[0][0]
    assert isinstance(EVENTS[1], Manifest) and manifest.request == NO_ID
