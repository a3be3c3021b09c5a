"""Every error a caller may catch; messages name the thing, the expected, the got and the way out.

KVPrismError
    BadInput                a value from outside is wrong (also a ValueError)
        UnknownName         a name that is in no table; lists the ones that are
        ShapeMismatch       two descriptions of the same cache disagree
        BudgetTooSmall      no legal plan fits; carries the minimum
    Unsupported             well formed, but not built (architecture, component, tier)
    MissingExtra            an optional library is not installed; names what to install
    MissingSignal           a scorer needs something that the capture did not record
    ProfileMismatch         a profile made for another model or deployment
    PositionMismatch        a continuation that would not start at the true next position
    CodecError              a value that its tier cannot hold, or planes that do not fit the plan
    WireError               bytes that are not a valid stream
        Truncated           the stream ended inside a frame or segment
        Damaged             a digest does not match
        LimitExceeded       a declared length above its bound; refused before any allocation
        ProtocolViolation   a valid frame at the wrong time, or one that contradicts the offer
        TicketRefused       unknown, expired or already used ticket
        Rejected            the peer refused the handshake; carries the field and both values
            Busy            the peer has no byte credit left for this request
    TransportError          the bytes did not arrive
        PeerLost            connection refused, reset or closed
        PeerSilent          no progress within the deadline
        AddressInUse        the port is taken
        AuthenticationFailed  the peer does not hold our token
"""


class KVPrismError(Exception):
    """Root of every error that kvprism raises on purpose."""


class BadInput(KVPrismError, ValueError):
    """A value from outside is wrong."""


class UnknownName(BadInput):
    """A name that is in no table."""

    def __init__(self, kind: str, name: str, known: list[str]) -> None:
        super().__init__(f"unknown {kind} {name!r}; known: {', '.join(known)}")
        self.kind, self.name, self.known = kind, name, known


class ShapeMismatch(BadInput):
    """Two descriptions of the same cache disagree."""


class BudgetTooSmall(BadInput):
    """No legal plan fits the budget; `needed` is the smallest that does, both in bytes."""

    def __init__(self, policy: str, needed: int, given: int, reference: int) -> None:
        super().__init__(
            f"budget too small for policy {policy!r}: {given} bytes ({given / reference:.4f} of "
            f"16-bit) given, at least {needed} ({needed / reference:.4f}) needed"
        )
        self.policy, self.needed, self.given, self.reference = policy, needed, given, reference


class Unsupported(KVPrismError):
    """Well formed, but not built."""


class MissingExtra(KVPrismError):
    """`what` needs `library`, which is not installed; it comes with `extra`."""

    def __init__(self, what: str, library: str, extra: str) -> None:
        super().__init__(f"{what} needs {library}: pip install 'kvprism[{extra}]'")
        self.what, self.library, self.extra = what, library, extra


class MissingSignal(KVPrismError):
    """A scorer needs something that the capture did not record."""


class ProfileMismatch(KVPrismError):
    """A profile made for another model or deployment."""


class PositionMismatch(KVPrismError):
    """A continuation that would not start at the true next position."""


class CodecError(KVPrismError):
    """A value that the chosen tier cannot hold, or planes that do not fit the plan."""


class WireError(KVPrismError):
    """Bytes that are not a valid stream."""


class Truncated(WireError):
    """The stream ended inside a frame or segment."""


class Damaged(WireError):
    """A digest does not match."""


class LimitExceeded(WireError):
    """A declared length above its bound; refused before any allocation."""


class ProtocolViolation(WireError):
    """A valid frame at the wrong time, or with contents that contradict the offer."""


class TicketRefused(WireError):
    """Unknown, expired or already used ticket."""


class Rejected(WireError):
    """The peer refused the handshake over `field`, of which `ours` and `theirs` are the values."""

    def __init__(self, code: str, field: str, ours: str, theirs: str) -> None:
        super().__init__(f"peer refused ({code}): {field} is {theirs} there and {ours} here")
        self.code, self.field, self.ours, self.theirs = code, field, ours, theirs


class Busy(Rejected):
    """The peer has no byte credit left for this request."""


class TransportError(KVPrismError):
    """The bytes did not arrive."""


class PeerLost(TransportError):
    """Connection refused, reset or closed."""


class PeerSilent(TransportError):
    """No progress within the deadline."""


class AddressInUse(TransportError):
    """The port is taken."""


class AuthenticationFailed(TransportError):
    """The peer does not hold our token."""
