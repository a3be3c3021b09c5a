"""Sender and Receiver: the data path between two processes, layer by layer over one connection.

Each side drives a sans-I/O session: read bytes into the stream reader's buffers, hand every event
to the session, send the frames that it answers with. Codec work happens between the two.
"""

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

from kvprism.codec.stream import (
    MAX_REQUEST_NBYTES,
    Assembler,
    Encoded,
    check_layer,
    check_planned,
    encode_layer,
    menu_of,
    offered_conditioning,
    offered_shape,
)
from kvprism.core import CONDITIONED_CODEC, Capability, Drop, KVShape, Tier
from kvprism.errors import (
    PeerLost,
    PeerSilent,
    Rejected,
    ShapeMismatch,
    TransportError,
    Unsupported,
)
from kvprism.layout import WHOLE, Split
from kvprism.plans import LayerPlan, Plan, offer_of
from kvprism.profiles import Profile, stated_hash
from kvprism.tensors import LayerKV, RequestKV
from kvprism.transport import tcp
from kvprism.wire.frames import Buffer, frame_nbytes, pack
from kvprism.wire.intake import manifest_nbytes
from kvprism.wire.messages import NOT_STATED, Abort, End, Offer, Ping, Reject, Resend
from kvprism.wire.session import ReceiverConfig, ReceiverSession, SenderSession, TicketBook
from kvprism.wire.stream import Event, Segments, StreamReader

SILENCE_S = 4.0


@dataclass(frozen=True)
class Sent:
    """What sending one request took. `seconds` runs from the offer to the acknowledgement."""

    request: bytes
    wire_nbytes: int
    encode_s: float
    seconds: float
    resent: int


@dataclass(frozen=True)
class Received:
    """One restored request. `seconds` runs from the offer to the last piece, `decode_s` in it."""

    request: bytes
    kv: RequestKV
    wire_nbytes: int
    decode_s: float
    seconds: float


SessionT = TypeVar("SessionT", SenderSession, ReceiverSession)


class _Link(Generic[SessionT]):
    """One connection, its session, and the stream reader between the two."""

    def __init__(self, connection: tcp.Connection, session: SessionT) -> None:
        self.connection = connection
        self.session: SessionT = session
        self.closed = False
        self._reader = StreamReader()

    def close(self) -> None:
        self.closed = True
        self.connection.close()

    def get(self) -> list[Event]:
        """Read what has come, at least a byte, and answer it; the events that it completed."""
        events = self._advance()
        for event in events:
            self.put(self.session.handle(event))
        return events

    def put(self, buffers: Sequence[Buffer]) -> None:
        """Send; a peer that closed in the meantime may have said why, and that is raised then."""
        try:
            self.connection.send(buffers)
        except PeerLost:
            self._hear_out()
            raise

    @contextmanager
    def guard(self) -> Iterator[None]:
        """On an error tell the peer why and close, so that it need not wait for a deadline.

        A refused offer alone leaves both ends ready for the next one.
        """
        try:
            yield
        except BaseException as error:
            with suppress(TransportError):
                self.connection.send(self.session.farewell(error))
            if not (isinstance(error, Rejected) and self.session.state == "ready"):
                self.close()
            raise

    def _advance(self) -> list[Event]:
        return self._reader.advance(self.connection.recv_into(self._reader.next_buffer()))

    def _hear_out(self) -> None:
        with suppress(TransportError):
            while True:
                for event in self._advance():
                    if isinstance(event, Abort | Reject):
                        self.session.handle(event)


class Sender:
    """The prefill side: one authenticated connection, one request at a time.

    Raises:
        PeerLost, PeerSilent: nobody answers at the address, or the peer stops answering.
        AuthenticationFailed: the peer does not hold the token.
        Rejected: the peer has another format, digest, fingerprint or profile.

    Example:
        with Sender(address, token) as sender:
            sent = sender.send(kv, plan)
    """

    def __init__(
        self,
        address: tuple[str, int],
        token: bytes,
        *,
        fingerprint: bytes = NOT_STATED,
        profile: Profile | None = None,
        silence_s: float = SILENCE_S,
        allow_remote: bool = False,
    ) -> None:
        self._profile = profile
        self._identity = (fingerprint, stated_hash(profile))
        session = SenderSession(token, *self._identity)
        connection = tcp.dial(
            *address, timeout_s=silence_s, silence_s=silence_s, allow_remote=allow_remote
        )
        self._link = _Link(connection, session)
        self._asked_again: list[int] = []
        with self._link.guard():
            self._pump_until(lambda: session.state == "ready")

    def __enter__(self) -> "Sender":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; a request under way is lost to the peer."""
        self._link.close()

    @property
    def capability(self) -> Capability:
        """What the peer can hold; for `plan(..., capability=sender.capability)`."""
        hello = self._link.session.hello
        assert hello is not None
        return Capability(cast(Drop, hello.drop), hello.codecs, hello.block)

    def send(self, kv: RequestKV, plan: Plan, request: bytes | None = None) -> Sent:
        """Send a planned request, layer by layer; returns when the peer has acknowledged it.

        Raises:
            ShapeMismatch, PositionMismatch: the plan is not for this cache; nothing was offered.
            Unsupported: the plan drops tokens that the peer must have; nothing was offered.
            ProfileMismatch: the conditioned code without a profile for this cache; nothing was
                offered.
            Rejected, Busy: the peer does not take it; no KV byte has moved, send something else.
            CodecError: a value that its tier cannot hold.
            PeerLost, PeerSilent: the connection broke; nothing was acknowledged.
        """
        check_planned(kv, plan)
        for layer in plan.layers:
            layer.check_drops(plan.menu, self.capability)
        transfer = self.open(plan.shape, plan.menu, plan.split, request)
        for layer_kv, layer in zip(kv.layers, plan.layers, strict=True):
            transfer._send_layer(layer_kv, layer)
        sent = transfer.finish()
        assert sent.wire_nbytes == plan.nbytes, (sent.wire_nbytes, plan.nbytes)
        return sent

    def open(
        self,
        shape: KVShape,
        menu: tuple[Tier, ...],
        split: Split = WHOLE,
        request: bytes | None = None,
    ) -> "Transfer":
        """Offer a request whose layers follow as they are ready, each with its own plan.

        Raises:
            BadInput: a shape that the format cannot name, or a request id that is not 16 bytes.
            ProfileMismatch, Rejected, Busy, PeerLost, PeerSilent: as `send`.
        """
        started = time.perf_counter()
        offer = offer_of(shape, menu, request or secrets.token_bytes(16), *self._identity)
        transfer = Transfer(self, offer, split, started)
        frame = self._link.session.offer(offer)
        with self._link.guard():
            self._link.put([frame])
            self._pump_until(lambda: self._link.session.state == "open")
        return transfer

    def _send_encoded(self, encoded: Encoded) -> int:
        """Send one manifest and its area as soon as the credit allows; returns the bytes sent."""
        frame = self._link.session.manifest(encoded.manifest)
        nbytes = len(frame) + len(encoded.area)
        self._pump_until(lambda: self._link.session.take_credit(nbytes))
        self._link.put([frame, encoded.area])
        return nbytes

    def _pump_until(self, done: Callable[[], bool]) -> None:
        """Read and answer frames until `done`."""
        while not done():
            for event in self._link.get():
                if isinstance(event, Resend):
                    self._asked_again.append(event.sequence)


class Transfer:
    """One request on its way; made by `Sender.open`.

    The peer gives up when it hears nothing for its `silence_s`: while a layer takes longer than
    that, call `ping`.
    """

    def __init__(self, sender: Sender, offer: Offer, split: Split, started: float) -> None:
        self._sender, self._offer, self._split, self._started = sender, offer, split, started
        self._conditioning = offered_conditioning(offer, sender._profile)
        self._shapes = {layer.layer_id: layer for layer in offered_shape(offer).layers}
        self._menu = menu_of(offer)
        self._nbytes = frame_nbytes(offer)
        self._encode_s = 0.0
        self._resent = 0
        # Kept until the acknowledgement: the peer asks again for a damaged piece.
        self._encoded: list[Encoded] = []

    def send_layer(self, kv: LayerKV, layer: LayerPlan) -> None:
        """Encode one layer and send it.

        Raises:
            ShapeMismatch: not a layer that was offered, or not the one that was planned.
            Unsupported, CodecError, PeerLost, PeerSilent: as `Sender.send`.
        """
        offered = self._shapes.get(layer.shape.layer_id)
        if layer.shape != offered:
            raise ShapeMismatch(f"offered {offered or 'no such layer'}, got {layer.shape}")
        check_layer(kv, layer.shape)
        layer.check_drops(self._menu, self._sender.capability)
        self._send_layer(kv, layer)

    def ping(self) -> None:
        """Tell the peer that this side is still at work."""
        with self._sender._link.guard():
            self._sender._link.put([pack(Ping())])
            self._answer()

    def finish(self) -> Sent:
        """Close the request and wait until the peer has acknowledged every piece."""
        sender, session = self._sender, self._sender._link.session
        with sender._link.guard():
            end = session.end()
            sender._link.put([end])
            while session.state != "ready":
                sender._pump_until(lambda: session.state == "ready" or bool(sender._asked_again))
                self._send_again()
        return Sent(
            request=self._offer.request,
            wire_nbytes=self._nbytes + len(end),
            encode_s=self._encode_s,
            seconds=time.perf_counter() - self._started,
            resent=self._resent,
        )

    def _send_layer(self, kv: LayerKV, layer: LayerPlan) -> None:
        own = self._conditioning.get(kv.layer_id)
        pieces = encode_layer(kv, layer, self._menu, self._split, len(self._encoded), own)
        with self._sender._link.guard():
            while True:
                started = time.perf_counter()
                encoded = next(pieces, None)
                self._encode_s += time.perf_counter() - started
                if encoded is None:
                    return
                self._encoded.append(encoded)
                self._nbytes += self._sender._send_encoded(encoded)
                self._answer()

    def _answer(self) -> None:
        """Read and answer the frames that are already here."""
        connection = self._sender._link.connection
        self._sender._pump_until(lambda: not connection.readable(0))
        self._send_again()

    def _send_again(self) -> None:
        while self._sender._asked_again:
            self._sender._send_encoded(self._encoded[self._sender._asked_again.pop(0)])
            self._resent += 1


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

    Raises:
        AddressInUse: the port is taken.
        Unsupported: a capability that this receiver does not have.

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
        self._listener = tcp.listen(host, port, silence_s=silence_s, allow_remote=allow_remote)
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
        return _Peer(_Link(connection, ReceiverSession(self._config, self._tickets)), self._profile)


class _Peer:
    """One accepted connection and what it brings."""

    def __init__(self, link: _Link[ReceiverSession], profile: Profile | None) -> None:
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
