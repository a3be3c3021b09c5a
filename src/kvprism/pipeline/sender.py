"""The prefill side: plans become manifests and segments, and leave layer by layer."""

import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from typing import TypeVar, cast

from kvprism.codec.stream import (
    Encoded,
    check_layer,
    check_planned,
    encode_layer,
    menu_of,
    offered_conditioning,
    offered_shape,
    stages,
)
from kvprism.core import Capability, Drop, KVShape, Tier
from kvprism.errors import ShapeMismatch
from kvprism.layout import WHOLE, Split
from kvprism.pipeline.link import SILENCE_S, Link
from kvprism.plans import LayerPlan, Plan, offer_of
from kvprism.profiles import Profile, stated_hash
from kvprism.staged import StagedPlan, within
from kvprism.tensors import LayerKV, RequestKV
from kvprism.transport import addresses
from kvprism.wire.frames import frame_nbytes, pack
from kvprism.wire.messages import NOT_STATED, Offer, Ping, Resend
from kvprism.wire.session import SenderSession

T = TypeVar("T")


@dataclass(frozen=True)
class Sent:
    """What sending one request took. `seconds` runs from the offer to the acknowledgement.

    layer_nbytes: manifests and segments of each layer; the frames around them are in wire_nbytes.
    """

    request: bytes
    wire_nbytes: int
    encode_s: float
    seconds: float
    resent: int
    layer_nbytes: tuple[int, ...]


class Sender:
    """The prefill side: one authenticated connection, one request at a time.

    address: where a `Receiver` listens; the host `shm` stands for shared memory.

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
        connection = addresses.dial(
            *address, timeout_s=silence_s, silence_s=silence_s, allow_remote=allow_remote
        )
        self._link = Link(connection, session)
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

    def pace(self, bytes_per_s: int | None) -> None:
        """Send at most so fast, to stand in for a slower link; None: as fast as it goes."""
        self._link.connection.pace(bytes_per_s)

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
        for layer_kv, layer in stages(kv, plan):
            transfer._encode_and_send(layer_kv, layer)
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
        self._layer_nbytes = dict.fromkeys(self._shapes, 0)
        self._resent = 0
        self.layers_left = len(self._shapes)  # to be sent
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
        self._encode_and_send(kv, layer)
        self.layers_left -= 1

    def send_part(self, kv: LayerKV, part: LayerPlan) -> None:
        """Encode some tokens of a layer, or what becomes of them, and send it.

        Raises:
            ShapeMismatch: not within a layer that was offered, or not the tokens that were planned.
            CodecError, PeerLost, PeerSilent: as `Sender.send`.
        """
        offered, tokens = self._shapes.get(part.shape.layer_id), part.shape.token_range
        if (
            offered is None
            or replace(part.shape, token_range=offered.token_range) != offered
            or within(offered, *tokens) != tokens
        ):
            raise ShapeMismatch(f"offered {offered or 'no such layer'}, got {part.shape}")
        self._encode_and_send(kv, part)

    def send_upgrades(self, kv: RequestKV, plan: StagedPlan) -> None:
        """After all parts: what becomes of their rows; errors as `send_part`."""
        layers = {layer.layer_id: layer for layer in kv.layers}
        for upgrade in plan.upgrades:
            self.send_part(layers[upgrade.shape.layer_id], upgrade)

    def wait_for(self, waiting: "SimpleQueue[T]", patience_s: float = SILENCE_S / 4) -> T:
        """The next item; meanwhile the peer hears every `patience_s` that this side is at work."""
        while True:
            with suppress(Empty):
                return waiting.get(timeout=patience_s)
            self.ping()

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
            self._encoded.clear()
            sender._link.connection.reuse()
        return Sent(
            request=self._offer.request,
            wire_nbytes=self._nbytes + len(end),
            encode_s=self._encode_s,
            seconds=time.perf_counter() - self._started,
            resent=self._resent,
            layer_nbytes=tuple(self._layer_nbytes.values()),
        )

    @property
    def nbytes(self) -> int:
        """What was sent so far, the offer included."""
        return self._nbytes

    @property
    def encode_s(self) -> float:
        """Seconds of encoding so far."""
        return self._encode_s

    def _encode_and_send(self, kv: LayerKV, layer: LayerPlan) -> None:
        own = self._conditioning.get(kv.layer_id)
        allocate = self._sender._link.connection.allocate
        pieces = encode_layer(kv, layer, self._menu, self._split, len(self._encoded), own, allocate)
        with self._sender._link.guard():
            while True:
                started = time.perf_counter()
                encoded = next(pieces, None)
                self._encode_s += time.perf_counter() - started
                if encoded is None:
                    return
                self._encoded.append(encoded)
                nbytes = self._sender._send_encoded(encoded)
                self._nbytes += nbytes
                self._layer_nbytes[kv.layer_id] += nbytes
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
