"""Who may say what and when: the two ends of a connection, without I/O.

`handle(event)` takes every event of a `StreamReader` and returns the frames to send, or raises; the
event itself tells the driver what happened. After a raise the driver sends `farewell(error)` and
closes; only a `Rejected` offer leaves the session usable (`state` is then "ready").

    connection.send(session.handle(event))
    match event:
        case Segments(manifest, area):
            ...
            connection.send([session.consumed(manifest)])

    sender      on                  ->          receiver    on                         ->
    hello       Hello: send Auth    welcome     auth        Auth: send Welcome         ready
    welcome     Welcome             ready       ready       Offer: send Accept         open
    ready       offer()             offered     open        Manifest, Segments         open
    offered     Accept              open        open        DamagedSegments: send      open
    open        manifest(), Credit  open                      Resend and Credit
    open        Resend              open        open        consumed(): Credit         open
    open        end()               ended       open        End                        ended
    ended       Credit, Resend,     ended       ended       Manifest, Segments of      ended
                  manifest() again                            what came damaged
    ended       Ack                 ready       ended       all is consumed: Ack       ready

Ping is answered with Pong once both know each other; everything else is a ProtocolViolation.
"""

import hmac
import secrets

from msgspec.structs import replace

from kvprism.errors import (
    AuthenticationFailed,
    Busy,
    Damaged,
    KVPrismError,
    LimitExceeded,
    PeerLost,
    PeerSilent,
    ProtocolViolation,
    Rejected,
    TicketRefused,
    Truncated,
    WireError,
)
from kvprism.wire.admission import ReceiverConfig
from kvprism.wire.frames import frame_nbytes, pack
from kvprism.wire.intake import Intake, manifest_nbytes
from kvprism.wire.messages import (
    DIGEST,
    FORMAT,
    NO_ID,
    Abort,
    Accept,
    Ack,
    Auth,
    Credit,
    End,
    Hello,
    Manifest,
    Offer,
    Ping,
    Pong,
    Reject,
    Resend,
    Welcome,
)
from kvprism.wire.order import FileSession, Session
from kvprism.wire.stream import DamagedSegments, Event, Segments
from kvprism.wire.tickets import TicketBook, check_token, proof

__all__ = [
    "FileSession",
    "Peer",
    "ReceiverConfig",
    "ReceiverSession",
    "SenderSession",
    "TicketBook",
]

_ABORT_CODES: dict[str, type[KVPrismError]] = {
    "truncated": Truncated,
    "damaged": Damaged,
    "limit": LimitExceeded,
    "protocol": ProtocolViolation,
    "failed": WireError,
}


class Peer(Session):
    """One end of a connection: it keeps it alive, and says a last word."""

    _peer_knows = False  # of the error, because it told us

    def farewell(self, error: BaseException) -> list[bytes]:
        """What to tell the peer of `error` before closing; nothing when it told us, or is gone."""
        if self._peer_knows or isinstance(error, PeerLost | PeerSilent):
            return []
        codes = [code for code, kind in _ABORT_CODES.items() if isinstance(error, kind)]
        code = codes[0] if codes else "failed"
        return [pack(Abort(self.request, self.ticket, code, str(error)[:1024]))]

    def _handle(self, event: Event) -> list[bytes]:
        if self.state not in ("hello", "auth", "closed"):
            match event:
                case Ping():
                    return [pack(Pong())]
                case Pong():
                    return []
                case Abort(code=code, reason=reason):
                    self._peer_knows = True
                    raise _ABORT_CODES.get(code, WireError)(f"the peer gave up ({code}): {reason}")
        return super()._handle(event)


class SenderSession(Peer):
    """The prefill side. It answers a Hello, then offers one request after another.

    `handle` raises `Rejected` (or `Busy`, `AuthenticationFailed`, `TicketRefused`) when the
    receiver refuses, and also when its Hello already rules this sender out.

    Raises:
        BadInput: a token shorter than 16 bytes.
    """

    def __init__(self, token: bytes, fingerprint: bytes, profile: bytes) -> None:
        super().__init__("hello")
        check_token(token)
        self.hello: Hello | None = None
        self.credit = 0
        self._token, self._nonce = token, secrets.token_bytes(16)
        self._ours = {"fingerprint": fingerprint, "profile": profile}
        self._window = 0
        self._sent = self._nbytes = 0
        self._resend: set[int] = set()

    def offer(self, offer: Offer) -> bytes:
        """The OFFER frame of a new request.

        Raises:
            Rejected: the receiver cannot decode a codec of the menu.
        """
        self._expect("ready", "an offer")
        assert self.hello is not None
        for tier in offer.menu:
            if tier.codec not in self.hello.codecs:
                raise Rejected("codec", "codec", tier.codec, ", ".join(self.hello.codecs))
        self.state, self.request, self.ticket = "offered", offer.request, NO_ID
        self._sent, self._nbytes, self._resend = 0, frame_nbytes(offer), set()
        self._peer_knows = False
        return pack(offer)

    def take_credit(self, nbytes: int) -> bool:
        """Whether `nbytes` may be sent now; they are then taken. False: wait for a Credit.

        Raises:
            LimitExceeded: more than the receiver ever allows at once.
        """
        if nbytes > self._window:
            raise LimitExceeded(
                f"a manifest of {nbytes} bytes, but the receiver takes at most {self._window} at "
                "once; send smaller token ranges"
            )
        if nbytes > self.credit:
            return False
        self.credit -= nbytes
        return True

    def manifest(self, manifest: Manifest) -> bytes:
        """Its frame with this request and ticket in it; of the same length for any request."""
        if manifest.sequence in self._resend:
            self._resend.discard(manifest.sequence)
        else:
            self._expect("open", "a new manifest")
            if manifest.sequence != self._sent:
                raise ProtocolViolation(f"manifest {manifest.sequence} where {self._sent} is due")
            self._sent += 1
            self._nbytes += manifest_nbytes(manifest)
        return pack(replace(manifest, request=self.request, ticket=self.ticket))

    def end(self) -> bytes:
        """The END frame: every manifest has been sent once."""
        self._expect("open", "END")
        self.state = "ended"
        return pack(End(self.request, self.ticket, self._sent, self._nbytes))

    def _handle(self, event: Event) -> list[bytes]:
        match self.state, event:
            case "hello", Hello():
                return [pack(self._answer(event))]
            case "welcome", Welcome():
                self._check_proof(event)
            case "offered", Accept(request=self.request):
                self.state, self.ticket = "open", event.ticket
                self.credit = self._window = event.credit
            case (("welcome" | "offered" | "open" | "ended"), Reject()):
                self._refused(event)
            case (("open" | "ended"), Credit(request=self.request, ticket=self.ticket)):
                self.credit += event.nbytes
            case (("open" | "ended"), Resend(request=self.request, ticket=self.ticket)):
                if event.sequence >= self._sent:
                    raise ProtocolViolation(f"Resend of manifest {event.sequence} of {self._sent}")
                self._resend.add(event.sequence)
            case "ended", Ack(request=self.request, ticket=self.ticket):
                self.state = "ready"
            case _:
                return super()._handle(event)
        return []

    def _answer(self, hello: Hello) -> Auth:
        if hello.format[0] != FORMAT[0]:
            raise Rejected("version", "format", str(FORMAT), str(hello.format))
        if DIGEST not in hello.digests:
            raise Rejected("digest", "digest", DIGEST, ", ".join(hello.digests))
        for field, ours in self._ours.items():
            if getattr(hello, field) != ours:
                raise Rejected(field, field, ours.hex(), getattr(hello, field).hex())
        self.hello, self.state = hello, "welcome"
        return Auth(self._nonce, self._prove(b"sender"))

    def _prove(self, role: bytes) -> bytes:
        assert self.hello is not None
        return proof(self._token, role, self.hello.nonce, self._nonce, self.hello.fingerprint)

    def _check_proof(self, welcome: Welcome) -> None:
        if not hmac.compare_digest(welcome.proof, self._prove(b"receiver")):
            raise AuthenticationFailed(
                "the receiver does not hold our token; give both the same token file"
            )
        self.state = "ready"

    def _refused(self, reject: Reject) -> None:
        self._peer_knows = True
        code, field = reject.code, reject.field
        if code == "auth":
            raise AuthenticationFailed(
                "the receiver refused our token; give both the same token file"
            )
        if self.state == "offered":
            self.state = "ready"
        if code == "ticket":
            raise TicketRefused(f"the receiver refused our ticket: {reject.ours}")
        raise (Busy if code == "busy" else Rejected)(code, field, reject.theirs, reject.ours)

    def _expect(self, state: str, what: str) -> None:
        if self.state != state:
            raise ProtocolViolation(
                f"{what} may not be sent while {self.state!r}, only while {state!r}"
            )


class ReceiverSession(Peer):
    """The decode side: it greets, authenticates the sender, then takes one request after another.

    `complete` is true once END came, all is consumed and the blocks tile the offer. `handle` raises
    `AuthenticationFailed` for a wrong proof, `Rejected` or `Busy` for an offer that this receiver
    cannot take, `TicketRefused` for a ticket that is not this connection's live one, `Damaged` for
    segments that stay damaged.
    """

    def __init__(self, config: ReceiverConfig, tickets: TicketBook) -> None:
        super().__init__("auth")
        self.config, self.tickets = config, tickets
        self.offer: Offer | None = None
        self.complete = False
        self._nonce = secrets.token_bytes(16)
        self._credit = 0
        self._unconsumed: dict[int, int] = {}  # sequence -> bytes of credit that it holds
        self._end: End | None = None

    def greeting(self) -> bytes:
        """The HELLO frame, the first thing on a connection."""
        return pack(self.config.hello(self._nonce))

    def consumed(self, manifest: Manifest) -> bytes:
        """What to send once the area of `manifest` is used up: Credit, or Ack after the last one.

        Raises:
            ProtocolViolation: it was the last one, and the blocks do not tile the offer.
        """
        if manifest.ticket != self.ticket or manifest.sequence not in self._unconsumed:
            return b""
        nbytes = self._unconsumed.pop(manifest.sequence)
        self._credit += nbytes
        answer = self._acknowledgement() or [pack(Credit(self.request, self.ticket, nbytes))]
        return answer[0]

    def farewell(self, error: BaseException) -> list[bytes]:
        """Reject for what concerns the handshake, an offer or a ticket, else Abort."""
        match error:
            case AuthenticationFailed():
                return [pack(Reject(NO_ID, "auth", "token", "another token", ""))]
            case TicketRefused():
                return [pack(Reject(self.request, "ticket", "ticket", str(error)[:256], ""))]
            case Rejected():
                shown = error.ours[:256], error.theirs[:256]
                return [pack(Reject(self.request, error.code, error.field, *shown))]
        return super().farewell(error)

    def _handle(self, event: Event) -> list[bytes]:
        match self.state, event:
            case "auth", Auth():
                return [pack(self._welcome(event))]
            case "ready", Offer():
                return [pack(self._accept(event))]
            case (("ready" | "open" | "ended"), Manifest() | End()):
                self.tickets.check(self, event.request, event.ticket)
                if isinstance(event, Manifest):
                    return self._announce(event)
                return self._finish(event)
            case (("open" | "ended"), Segments(manifest)):
                self._intake.take(manifest)
                return []
            case (("open" | "ended"), DamagedSegments(manifest)):
                self._intake.damage(manifest)
                resend = pack(Resend(self.request, self.ticket, manifest.sequence))
                return [resend, self.consumed(manifest)]
        if isinstance(event, Abort):
            self.tickets.retire(self.ticket)
        return super()._handle(event)

    def _welcome(self, auth: Auth) -> Welcome:
        c = self.config
        if not hmac.compare_digest(
            auth.proof, proof(c.token, b"sender", self._nonce, auth.nonce, c.fingerprint)
        ):
            raise AuthenticationFailed(
                "the sender does not hold our token; give both the same token file"
            )
        self.state = "ready"
        return Welcome(proof(c.token, b"receiver", self._nonce, auth.nonce, c.fingerprint))

    def _accept(self, offer: Offer) -> Accept:
        self.request, self.ticket = offer.request, NO_ID
        self.config.judge(offer)
        c = self.config
        self.ticket = self.tickets.issue(self, offer.request, c.lease_s)
        self.state, self.offer, self.complete = "open", offer, False
        self._intake = Intake(offer, allow_drop=c.drop != "none")
        self._credit, self._unconsumed, self._end = c.credit_nbytes, {}, None
        return Accept(offer.request, self.ticket, c.credit_nbytes, int(c.lease_s * 1000))

    def _announce(self, manifest: Manifest) -> list[bytes]:
        if self._end is not None and manifest.sequence not in self._intake.damaged:
            raise ProtocolViolation(f"manifest {manifest.sequence} after END")
        nbytes = manifest_nbytes(manifest)
        if nbytes > self._credit:
            raise ProtocolViolation(
                f"manifest {manifest.sequence} takes {nbytes} bytes, but its credit is "
                f"{self._credit} bytes"
            )
        self._intake.announce(manifest)
        self._credit -= nbytes
        self._unconsumed[manifest.sequence] = nbytes
        return []

    def _finish(self, end: End) -> list[bytes]:
        if self._end is not None:
            raise ProtocolViolation("a second END")
        self._intake.check_end(end)
        self._end, self.state = end, "ended"
        return self._acknowledgement()

    def _acknowledgement(self) -> list[bytes]:
        """Ack, when nothing is missing."""
        if self._end is None or self._intake.damaged or self._unconsumed:
            return []
        self._intake.check_tiling()
        self.tickets.retire(self.ticket)
        self.state, self.complete = "ready", True
        return [pack(Ack(self.request, self.ticket))]
