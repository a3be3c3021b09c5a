"""Sender and Receiver: the data path between two processes, layer by layer over one connection.

Each side drives a sans-I/O session: read bytes into the stream reader's buffers, hand every event
to the session, send the frames that it answers with. Codec work happens between the two.
"""

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from kvprism.codec.stream import MAX_REQUEST_NBYTES, Assembler, Encoded, encode_layer, menu_of
from kvprism.core import Capability, KVShape, Tier
from kvprism.errors import KVPrismError, PeerLost, PeerSilent, ShapeMismatch, TransportError
from kvprism.layout import WHOLE, Split
from kvprism.plans import LayerPlan, Plan, offer_of
from kvprism.tensors import LayerKV, RequestKV
from kvprism.transport import tcp
from kvprism.wire import frames
from kvprism.wire.messages import NOT_STATED, End, Offer, Resend
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
    """One restored request. `seconds` runs from the offer to the last piece, `decode_s` within it."""

    request: bytes
    kv: RequestKV
    wire_nbytes: int
    decode_s: float
    seconds: float


class Sender:
    """The prefill side: one authenticated connection, one request at a time.

    Raises:
        PeerLost, PeerSilent: nobody answers at the address, or the peer stops answering.
        AuthenticationFailed: the peer does not hold the token.

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
        profile: bytes = NOT_STATED,
        silence_s: float = SILENCE_S,
        allow_remote: bool = False,
    ) -> None:
        self._identity = (fingerprint, profile)
        self._session = SenderSession(token, fingerprint, profile)
        self._reader = StreamReader()
        self._asked_again: list[int] = []
        self._connection = tcp.dial(
            *address, timeout_s=silence_s, silence_s=silence_s, allow_remote=allow_remote
        )
        self._pump_until(lambda: self._session.state == "ready")

    def __enter__(self) -> "Sender":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; a request under way is lost to the peer."""
        self._connection.close()

    def send(self, kv: RequestKV, plan: Plan, request: bytes | None = None) -> Sent:
        """Send a planned request, layer by layer; returns when the peer has acknowledged it.

        Raises:
            ShapeMismatch, CodecError: the plan is not for this cache.
            Rejected, Busy: the peer does not take it; no KV byte has moved.
            PeerLost, PeerSilent: the connection broke; nothing was acknowledged.
        """
        if len(kv.layers) != len(plan.layers):
            raise ShapeMismatch(f"planned {len(plan.layers)} layers, got {len(kv.layers)}")
        transfer = self.open(plan.shape, plan.menu, plan.split, request)
        for layer_kv, layer in zip(kv.layers, plan.layers, strict=True):
            transfer.send_layer(layer_kv, layer)
        return transfer.finish()

    def open(
        self,
        shape: KVShape,
        menu: tuple[Tier, ...],
        split: Split = WHOLE,
        request: bytes | None = None,
    ) -> "Transfer":
        """Offer a request whose layers follow as they are ready, each with its own plan."""
        started = time.perf_counter()
        offer = offer_of(shape, menu, request or secrets.token_bytes(16), *self._identity)
        frame = self._session.offer(offer)
        self._put([frame])
        self._pump_until(lambda: self._session.state == "open")
        return Transfer(self, offer, split, len(frame), started)

    def _send_encoded(self, encoded: Encoded) -> int:
        """Send one manifest and its area as soon as the credit allows; returns the bytes sent."""
        frame = self._session.manifest(encoded.manifest)
        nbytes = len(frame) + len(encoded.area)
        self._pump_until(lambda: self._session.take_credit(nbytes))
        self._put([frame, encoded.area])
        return nbytes

    def _put(self, buffers: Sequence[frames.Buffer]) -> None:
        with _farewell(self._connection, self._session):
            self._connection.send(buffers)

    def _pump_until(self, done: Callable[[], bool]) -> None:
        """Read and answer frames until `done`."""
        with _farewell(self._connection, self._session):
            while not done():
                self._read()

    def _poll(self) -> None:
        """Read and answer the frames that are already here."""
        self._pump_until(lambda: not self._connection.readable(0))

    def _read(self) -> None:
        for event in _events(self._connection, self._reader):
            self._connection.send(self._session.handle(event))
            if isinstance(event, Resend):
                self._asked_again.append(event.sequence)


class Transfer:
    """One request on its way; made by `Sender.open`."""

    def __init__(
        self, sender: Sender, offer: Offer, split: Split, offered_nbytes: int, started: float
    ) -> None:
        self._sender, self._offer, self._split, self._started = sender, offer, split, started
        self._menu = menu_of(offer)
        self._nbytes = offered_nbytes
        self._encode_s = 0.0
        self._resent = 0
        # Kept until the acknowledgement: the peer asks again for a damaged piece.
        self._encoded: list[Encoded] = []

    def send_layer(self, kv: LayerKV, layer: LayerPlan) -> None:
        """Encode one layer and send it."""
        pieces = encode_layer(kv, layer, self._menu, self._split, len(self._encoded))
        while True:
            started = time.perf_counter()
            encoded = next(pieces, None)
            self._encode_s += time.perf_counter() - started
            if encoded is None:
                return
            self._encoded.append(encoded)
            self._nbytes += self._sender._send_encoded(encoded)
            self._sender._poll()
            self._send_again()

    def finish(self) -> Sent:
        """Close the request and wait until the peer has acknowledged every piece."""
        sender = self._sender
        end = sender._session.end()
        sender._put([end])
        while sender._session.state != "ready":
            sender._pump_until(
                lambda: sender._session.state == "ready" or bool(sender._asked_again)
            )
            self._send_again()
        return Sent(
            request=self._offer.request,
            wire_nbytes=self._nbytes + len(end),
            encode_s=self._encode_s,
            seconds=time.perf_counter() - self._started,
            resent=self._resent,
        )

    def _send_again(self) -> None:
        while self._sender._asked_again:
            self._sender._send_encoded(self._encoded[self._sender._asked_again.pop(0)])
            self._resent += 1


class Receiver:
    """The decode side: listens, authenticates one peer at a time, restores its requests.

    `expected` is the shape of this side's model without tokens: an offer for other layers, heads or
    channels is refused before any KV byte moves.

    Raises:
        AddressInUse: the port is taken.

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
        profile: bytes = NOT_STATED,
        capability: Capability | None = None,
        max_request_nbytes: int = MAX_REQUEST_NBYTES,
        credit_nbytes: int = 2**28,
        lease_s: float = 60.0,
        silence_s: float = SILENCE_S,
        allow_remote: bool = False,
    ) -> None:
        capability = capability or Capability()
        self._config = ReceiverConfig(
            token=token,
            fingerprint=fingerprint,
            profile=profile,
            codecs=capability.codecs,
            drop=capability.drop,
            block=capability.block,
            credit_nbytes=credit_nbytes,
            max_request_nbytes=max_request_nbytes,
            lease_s=lease_s,
        )
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
        self._drop_peer()
        self._listener.close()

    def receive(self, timeout_s: float) -> Received:
        """The next complete request; waits at most `timeout_s` for it to be offered.

        After an error the peer is dropped and the receiver can be used again.

        Raises:
            PeerSilent: nothing was offered in time, or the peer stopped in the middle.
            PeerLost: the peer went away in the middle.
            AuthenticationFailed, WireError, CodecError: what the peer sent is not acceptable.
        """
        deadline = time.monotonic() + timeout_s
        try:
            while True:
                received = self._next_request(deadline)
                if received is not None:
                    return received
        except KVPrismError:
            self._drop_peer()
            raise

    def _next_request(self, deadline: float) -> Received | None:
        """None when the peer hung up between two requests, as a peer that has finished does."""
        left = max(0.0, deadline - time.monotonic())
        if self._peer is None:
            connection = self._listener.accept(left)
            self._peer = _Peer(connection, ReceiverSession(self._config, self._tickets))
        try:
            return self._peer.next_request(deadline)
        except PeerLost:
            if not self._peer.idle:
                raise
            self._drop_peer()
            return None

    def _drop_peer(self) -> None:
        if self._peer is not None:
            self._peer.connection.close()
            self._peer = None


class _Peer:
    """One accepted connection and its session."""

    def __init__(self, connection: tcp.Connection, session: ReceiverSession) -> None:
        self.connection, self.session = connection, session
        self._reader = StreamReader()
        connection.send([session.greeting()])

    @property
    def idle(self) -> bool:
        return self.session.state == "ready"

    def next_request(self, deadline: float) -> Received:
        with _farewell(self.connection, self.session):
            offer = self._wait_for_offer(deadline)
            return self._restore(offer)

    def _wait_for_offer(self, deadline: float) -> Offer:
        while True:
            # An authenticated peer may think for as long as the caller waits; others may not.
            if self.idle and not self.connection.readable(max(0.0, deadline - time.monotonic())):
                raise PeerSilent("no request was offered in time")
            for event in self._handled_events():
                if isinstance(event, Offer):
                    return event

    def _restore(self, offer: Offer) -> Received:
        started = time.perf_counter()
        assembler = Assembler(offer, self.session.config.max_request_nbytes)
        nbytes, decode_s = len(frames.pack(offer)), 0.0
        while not self.session.complete:
            for event in self._handled_events():
                if isinstance(event, Segments):
                    before = time.perf_counter()
                    assembler.add(event)
                    decode_s += time.perf_counter() - before
                    self.connection.send([self.session.consumed(event.manifest)])
                    nbytes += len(frames.pack(event.manifest)) + len(event.area)
                elif isinstance(event, End):
                    nbytes += len(frames.pack(event))
        seconds = time.perf_counter() - started
        return Received(offer.request, assembler.finish(), nbytes, decode_s, seconds)

    def _handled_events(self) -> Iterator[Event]:
        for event in _events(self.connection, self._reader):
            self.connection.send(self.session.handle(event))
            yield event


def _events(connection: tcp.Connection, reader: StreamReader) -> Sequence[Event]:
    return reader.advance(connection.recv_into(reader.next_buffer()))


@contextmanager
def _farewell(
    connection: tcp.Connection, session: SenderSession | ReceiverSession
) -> Iterator[None]:
    """On any error of ours tell the peer why, then close, so that it need not wait for a deadline."""
    try:
        yield
    except KVPrismError as error:
        with suppress(TransportError):
            connection.send(session.farewell(error))
        connection.close()
        raise
