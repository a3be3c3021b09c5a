"""The order of events that every session keeps, and the stream that has no peer: a file."""

from kvprism.errors import (
    Damaged,
    KVPrismError,
    ProtocolViolation,
    Rejected,
    TicketRefused,
    Truncated,
)
from kvprism.wire.intake import Intake
from kvprism.wire.messages import DIGEST, FORMAT, NO_ID, End, Manifest, Offer
from kvprism.wire.stream import DamagedSegments, Event, Segments


class Session:
    """A state, and the names of the open request; closed by the first error."""

    def __init__(self, state: str) -> None:
        self.state = state
        self.request, self.ticket = NO_ID, NO_ID

    def handle(self, event: Event) -> list[bytes]:
        """The frames to send in answer to `event`.

        Raises:
            ProtocolViolation: this event may not come now, or contradicts the offer.
            KVPrismError: see the class.
        """
        try:
            return self._handle(event)
        except KVPrismError as error:
            if self.state != "ready" or not isinstance(error, Rejected):
                self.state = "closed"
            raise

    def _handle(self, event: Event) -> list[bytes]:
        raise ProtocolViolation(f"{type(event).__name__} may not come while {self.state!r}")


def check_format(offer: Offer) -> None:
    """Raises `Rejected` for an offer of another major version or digest."""
    if offer.format[0] != FORMAT[0]:
        raise Rejected("version", "format", str(FORMAT), str(offer.format))
    if offer.digest != DIGEST:
        raise Rejected("digest", "digest", DIGEST, offer.digest)


class FileSession(Session):
    """Offer, then Manifest and Segments again and again, then End; nothing is ever answered.

    `handle` raises `Damaged` for damaged segments: nobody can be asked for them again.
    """

    def __init__(self) -> None:
        super().__init__("offer")
        self.offer: Offer | None = None
        self.complete = False

    def close(self) -> None:
        """No event will come.

        Raises:
            Truncated: before END.
        """
        if not self.complete:
            raise Truncated("the stream ends before its END frame")

    def _handle(self, event: Event) -> list[bytes]:
        match self.state, event:
            case "offer", Offer():
                check_format(event)
                self._intake = Intake(event)
                self.state, self.offer, self.request = "open", event, event.request
            case "open", Manifest():
                self._check_names(event)
                self._intake.announce(event)
            case "open", Segments(manifest):
                self._intake.take(manifest)
            case "open", DamagedSegments(manifest):
                raise Damaged(
                    f"the segments of manifest {manifest.sequence} do not match their digests"
                )
            case "open", End():
                self._check_names(event)
                self._intake.check_end(event)
                self._intake.check_tiling()
                self.state, self.complete = "closed", True
            case _:
                return super()._handle(event)
        return []

    def _check_names(self, message: Manifest | End) -> None:
        if not self._intake.manifests:
            self.ticket = message.ticket
        if (message.request, message.ticket) != (self.request, self.ticket):
            raise TicketRefused("a frame of another request or ticket in the middle of a stream")
