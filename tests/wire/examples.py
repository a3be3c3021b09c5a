"""Streams to test with: small ones that use every field, and what a peer would say."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec
import pytest

from kvprism.core import DROP_CODEC, NATIVE_CODEC, NESTED_CODEC
from kvprism.wire.admission import ReceiverConfig
from kvprism.wire.frames import digest_of, pack, parse_head, unpack, with_padding
from kvprism.wire.messages import (
    DIGEST,
    FORMAT,
    NO_ID,
    NOT_STATED,
    Abort,
    Accept,
    Ack,
    Auth,
    Block,
    ComponentEntry,
    Credit,
    End,
    Hello,
    LayerEntry,
    Manifest,
    Message,
    Offer,
    Ping,
    Pong,
    Reject,
    Resend,
    Segment,
    TierEntry,
    TierMap,
    Welcome,
)
from kvprism.wire.session import ReceiverSession, SenderSession, TicketBook
from kvprism.wire.stream import Event
from kvprism.wire.tickets import proof

TOKEN = bytes(range(32))
REQUEST = bytes(range(16))
CODECS = (NATIVE_CODEC, DROP_CODEC, NESTED_CODEC)
MENU = (
    TierEntry(NATIVE_CODEC, 16, "native"),
    TierEntry(NESTED_CODEC, 8, "int8"),
    TierEntry(NESTED_CODEC, 4, "int4"),
    TierEntry(DROP_CODEC, 0, "drop"),
)
UNIFORM = TierMap(rows=1, mode=0, bits=0, palette=b"\x01", data=b"")
PACKED = TierMap(rows=2, mode=1, bits=2, palette=b"\x00\x02\x03", data=bytes(range(6)))
LISTED = TierMap(rows=1, mode=2, bits=0, palette=b"\x02\x00", data=bytes([1, 0, 0, 0, 3, 0, 0, 0]))


def filler(nbytes: int, seed: int) -> bytes:
    """Bytes that differ between seeds and are nowhere constant."""
    return bytes((i * 7 + i // 251 + seed * 31) % 256 for i in range(nbytes))


def segment_of(plane: int, data: bytes) -> Segment:
    return Segment(plane, len(data), digest_of(data))


def offer_of(request: bytes = NO_ID, **changes: Any) -> Offer:
    """Two layers of keys and values; the second one misses the prefix `[0, 4)`."""
    components = (ComponentEntry("k", 2, 8), ComponentEntry("v", 2, 8))
    layers = (
        LayerEntry(0, 0, 12, "bfloat16", components),
        LayerEntry(5, 4, 12, "float32", components[:1]),
    )
    offer = Offer(FORMAT, DIGEST, request, NOT_STATED, NOT_STATED, MENU, layers)
    return msgspec.structs.replace(offer, **changes)


def manifests_of(largest_nbytes: int = 700) -> list[tuple[Manifest, list[bytes]]]:
    """Three manifests whose blocks tile `offer_of()`, with the segments of each."""
    pieces = [filler(300, 1), filler(256, 2), filler(largest_nbytes, 3), filler(5, 4), b""]
    long, short = (0, 12), (4, 12)
    blocks = [
        [
            Block(0, "k", (0, 2), long, 0, (segment_of(1, pieces[0]), segment_of(2, pieces[1]))),
            Block(0, "v", (0, 2), long, 1, (segment_of(0, pieces[2]),)),
        ],
        [
            Block(5, "k", (0, 1), short, 2, (segment_of(1, pieces[3]),)),
        ],
        [
            Block(5, "k", (1, 2), (4, 9), 0, (segment_of(1, pieces[4]),)),
            Block(5, "k", (1, 2), (9, 12), 0, ()),
        ],
    ]
    maps = [(UNIFORM, PACKED), (UNIFORM, PACKED, LISTED), (UNIFORM,)]
    data = [pieces[:3], pieces[3:4], pieces[4:]]
    return [
        (Manifest(NO_ID, NO_ID, i, maps[i], tuple(blocks[i])), data[i]) for i in range(len(blocks))
    ]


def stream_parts(largest_nbytes: int = 700) -> list[bytes]:
    """A whole file, as frames and segment areas."""
    parts = [pack(offer_of())]
    for manifest, segments in manifests_of(largest_nbytes):
        parts += [pack(manifest), b"".join(bytes(piece) for piece in with_padding(segments))]
    parts.append(pack(End(NO_ID, NO_ID, 3, sum(map(len, parts)))))
    return parts


def stream(largest_nbytes: int = 700) -> bytes:
    return b"".join(stream_parts(largest_nbytes))


def every_message() -> list[Message]:
    """One message of each type, with every field in use."""
    nonce, ticket = bytes(range(100, 116)), bytes(range(200, 216))
    state = (REQUEST, ticket)
    return [
        Hello(FORMAT, (DIGEST,), CODECS, "uniform", 16, bytes(range(32)), NOT_STATED, nonce),
        Auth(nonce, proof(TOKEN, b"sender", nonce, nonce, NOT_STATED)),
        Welcome(proof(TOKEN, b"receiver", nonce, nonce, NOT_STATED)),
        offer_of(REQUEST),
        Accept(REQUEST, ticket, 2**28, 60_000),
        Reject(REQUEST, "profile", "profile", "00", "ff"),
        manifests_of()[1][0],
        End(*state, 3, 70_000),
        Credit(*state, 65_536),
        Ack(*state),
        Resend(*state, 2),
        Abort(*state, "failed", "why"),
        Ping(),
        Pong(),
    ]


def messages(frames: Iterable[bytes]) -> list[Message]:
    """What a peer reads out of `frames`, each one a whole frame."""
    return [unpack(parse_head(data[:24]), data[24:]) for data in frames if data]


def config_of(**changes: Any) -> ReceiverConfig:
    values: dict[str, Any] = {
        "token": TOKEN,
        "fingerprint": NOT_STATED,
        "profile": NOT_STATED,
        "codecs": CODECS,
    }
    return ReceiverConfig(**(values | changes))


def receiver_of(clock: Callable[[], float] = lambda: 0.0, **changes: Any) -> ReceiverSession:
    return ReceiverSession(config_of(**changes), TicketBook(clock))


def sender_of(token: bytes = TOKEN) -> SenderSession:
    return SenderSession(token, NOT_STATED, NOT_STATED)


def introduced(receiver: ReceiverSession, sender: SenderSession) -> None:
    """Both sides have proved that they hold the token."""
    auth = sender.handle(messages([receiver.greeting()])[0])
    welcome = receiver.handle(messages(auth)[0])
    assert sender.handle(messages(welcome)[0]) == []


def opened(receiver: ReceiverSession, sender: SenderSession) -> None:
    """A request is offered and accepted."""
    introduced(receiver, sender)
    accept = receiver.handle(messages([sender.offer(offer_of(REQUEST))])[0])
    sender.handle(messages(accept)[0])


def answered(sender: SenderSession, frames: list[bytes]) -> list[Message]:
    said = messages(frames)
    for message in said:
        assert sender.handle(message) == []
    return said


def told(peer: ReceiverSession | SenderSession, frames: list[bytes], error: type[Exception]) -> str:
    """The peer reads a last word and raises its own error; what that says."""
    (message,) = messages(frames)
    with pytest.raises(error) as raised:
        peer.handle(message)
    assert peer.farewell(raised.value) == []
    return str(raised.value)


def flat(events: Sequence[Event]) -> list[tuple[str, object, bytes]]:
    """Events as plain values, so that two runs compare."""
    return [
        (type(e).__name__, getattr(e, "manifest", e), bytes(getattr(e, "area", b"")))
        for e in events
    ]
