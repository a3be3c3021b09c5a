"""The decode side: what peers offer is admitted, checked and restored, piece by piece."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from kvprism.codec.stream import MAX_REQUEST_NBYTES, Assembler, offered_shape
from kvprism.core import CONDITIONED_CODEC, Capability, Drop, KVShape
from kvprism.errors import PeerLost, PeerSilent, Rejected, Unsupported
from kvprism.pipeline.link import SILENCE_S, Link
from kvprism.profiles import Profile, stated_hash
from kvprism.tensors import RequestKV
from kvprism.transport import addresses
from kvprism.wire.frames import frame_nbytes
from kvprism.wire.intake import manifest_nbytes
from kvprism.wire.messages import NOT_STATED, End, Offer
from kvprism.wire.session import ReceiverConfig, ReceiverSession, TicketBook
from kvprism.wire.stream import Segments


@dataclass(frozen=True)
class Received:
    """One restored request. `seconds` runs from the offer to the last piece, `decode_s` in it."""

    request: bytes
    kv: RequestKV
    wire_nbytes: int
    decode_s: float
    seconds: float


@dataclass(frozen=True)
class _Admission(ReceiverConfig):
    """Also refuses, before any KV byte, what this side's codecs or model could not take."""

    expected: KVShape | None = None

    def judge(self, offer: Offer) -> None:
        super().judge(offer)
        offered = offered_shape(offer)
        if self.expected is None:
            return
        ours, theirs = ([la.layer_id for la in shape.layers] for shape in (self.expected, offered))
        if ours != theirs:
            raise Rejected("shape", "layers", str(ours), str(theirs))
        for our, their in zip(self.expected.layers, offered.layers, strict=True):
            if our.components != their.components:
                field = f"components of layer {our.layer_id}"
                raise Rejected("shape", field, our.named_components, their.named_components)


def _readable(codecs: Sequence[str], profile: Profile | None) -> tuple[str, ...]:
    """Without key conditioning the conditioned code cannot be read."""
    conditions = profile is not None and profile.conditioning is not None
    return tuple(codec for codec in codecs if conditions or codec != CONDITIONED_CODEC)


class Receiver:
    """The decode side: listens, authenticates one peer at a time, restores its requests.

    `expected` is the shape of this side's model, its tokens and dtype aside: an offer for other
    layers, heads or channels is refused before any KV byte moves, and so is a peer that has another
    profile, or none where this side has one. Without key conditioning in its profile a receiver
    does not read the conditioned code.

    host `shm`: shared memory, for a sender on this machine; any other is an address of TCP.

    Raises:
        AddressInUse: the port is taken.
        Unsupported: a capability that this receiver does not have; no shared memory here.

    Example:
        with Receiver(token) as receiver:
            print(receiver.address)
            received = receiver.receive(timeout_s=60)
    """

    def __init__(
        self,
        token: bytes,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        fingerprint: bytes = NOT_STATED,
        profile: Profile | None = None,
        capability: Capability | None = None,
        expected: KVShape | None = None,
        max_request_nbytes: int = MAX_REQUEST_NBYTES,
        credit_nbytes: int = 2**28,
        lease_s: float = 60.0,
        silence_s: float = SILENCE_S,
        allow_remote: bool = False,
    ) -> None:
        capability = capability or Capability()
        if capability.block != 1:
            raise Unsupported(
                f"this receiver holds any set of tokens; {capability} is not built, use block=1"
            )
        self._config = _Admission(
            token=token,
            fingerprint=fingerprint,
            profile=stated_hash(profile),
            codecs=_readable(capability.codecs, profile),
            drop=capability.drop,
            block=capability.block,
            credit_nbytes=credit_nbytes,
            max_request_nbytes=max_request_nbytes,
            lease_s=lease_s,
            expected=expected,
        )
        self._profile = profile
        self._tickets = TicketBook(time.monotonic)
        self._listener = addresses.listen(
            host, port, silence_s=silence_s, allow_remote=allow_remote
        )
        self._peer: _Peer | None = None

    @property
    def address(self) -> tuple[str, int]:
        return self._listener.address

    def __enter__(self) -> "Receiver":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening and drop the peer."""
        if self._peer is not None:
            self._peer.link.close()
            self._peer = None
        self._listener.close()

    def receive(self, timeout_s: float) -> Received:
        """The next complete request; waits at most `timeout_s` for it to be offered.

        The receiver can be used again after any error. A peer that broke off or broke the rules is
        dropped then; one whose offer was refused, or that had nothing to offer yet, is not.

        Raises:
            PeerSilent: nothing was offered in time, or the peer stopped in the middle.
            PeerLost: the peer went away in the middle.
            Rejected, Busy: the offer is not acceptable, and the peer was told so.
            AuthenticationFailed, WireError, CodecError: what the peer sent is not acceptable.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            peer = self._peer = self._peer or self._accept(deadline)
            try:
                received = peer.next_request(deadline)
            finally:
                if peer.link.closed:
                    self._peer = None
            if received is not None:
                return received

    def _accept(self, deadline: float) -> "_Peer":
        # A time-out of 0 would make the socket non-blocking instead.
        connection = self._listener.accept(max(0.001, deadline - time.monotonic()))
        return _Peer(Link(connection, ReceiverSession(self._config, self._tickets)), self._profile)


class _Peer:
    """One accepted connection and what it brings."""

    def __init__(self, link: Link[ReceiverSession], profile: Profile | None) -> None:
        self.link, self._profile = link, profile
        self._introduced_by = time.monotonic() + link.connection.silence_s
        with link.guard():
            link.put([link.session.greeting()])

    def next_request(self, deadline: float) -> Received | None:
        """None when the peer hung up between two requests, as one that has finished does."""
        while True:
            # A peer that we know may think for as long as the caller waits; others may not.
            idle = self.link.session.state == "ready"
            left = deadline - time.monotonic()
            if idle and not self.link.connection.readable(max(0.0, left)):
                raise PeerSilent(
                    "the connected peer offered no request in time; it stays connected"
                )
            with self.link.guard():
                if not idle and time.monotonic() > self._introduced_by:
                    silence_s = self.link.connection.silence_s
                    raise PeerSilent(f"the peer did not introduce itself within {silence_s:g} s")
                try:
                    events = self.link.get()
                except PeerLost:
                    if not idle:
                        raise
                    self.link.close()
                    return None
                for event in events:
                    if isinstance(event, Offer):
                        return self._restore(event)

    def _restore(self, offer: Offer) -> Received:
        started = time.perf_counter()
        session = self.link.session
        limit, drop = session.config.max_request_nbytes, cast(Drop, session.config.drop)
        assembler = Assembler(offer, limit, self._profile, drop)
        nbytes, decode_s = frame_nbytes(offer), 0.0
        while not session.complete:
            session.tickets.check(session, session.request, session.ticket)  # a lease may run out
            for event in self.link.get():
                if isinstance(event, Segments):
                    before = time.perf_counter()
                    assembler.add(event)
                    decode_s += time.perf_counter() - before
                    self.link.put([session.consumed(event.manifest)])
                    nbytes += manifest_nbytes(event.manifest)
                elif isinstance(event, End):
                    nbytes += frame_nbytes(event)
        seconds = time.perf_counter() - started
        return Received(offer.request, assembler.finish(), nbytes, decode_s, seconds)
