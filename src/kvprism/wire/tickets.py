"""What lets a peer in: the token, once per connection, and a ticket, once per request."""

import hashlib
import hmac
import secrets
from collections.abc import Callable

from kvprism.errors import BadInput, TicketRefused

MIN_TOKEN_NBYTES = 16
_TAG = b"kvprism/1 proof of token"


def check_token(token: bytes) -> None:
    """Raises `BadInput` for a token shorter than 16 bytes."""
    if len(token) < MIN_TOKEN_NBYTES:
        raise BadInput(f"a token needs at least {MIN_TOKEN_NBYTES} bytes, got {len(token)}")


def proof(
    token: bytes, role: bytes, hello_nonce: bytes, auth_nonce: bytes, fingerprint: bytes
) -> bytes:
    """HMAC-SHA-256 under `token` of role, both nonces and the fingerprint, each behind its length.

    Raises:
        BadInput: a token shorter than 16 bytes.
    """
    check_token(token)
    fields = (_TAG, role, hello_nonce, auth_nonce, fingerprint)
    text = b"".join(len(field).to_bytes(4, "little") + field for field in fields)
    return hmac.new(token, text, hashlib.sha256).digest()


class TicketBook:
    """The live tickets of one receiver, over all its connections.

    A ticket is 128 random bits, bound to one connection (`owner`) and one request, and dead with it
    or after its lease, whichever comes first. `clock` is monotonic, in seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._live: dict[bytes, tuple[object, bytes, float]] = {}

    def issue(self, owner: object, request: bytes, lease_s: float) -> bytes:
        """A fresh ticket that lives for `lease_s` seconds."""
        now = self._clock()
        self._live = {ticket: entry for ticket, entry in self._live.items() if entry[2] > now}
        ticket = secrets.token_bytes(16)
        self._live[ticket] = (owner, request, now + lease_s)
        return ticket

    def check(self, owner: object, request: bytes, ticket: bytes) -> None:
        """Let a frame with this ticket pass.

        Raises:
            TicketRefused: unknown or already used, of another connection or request, or expired.
        """
        if ticket not in self._live:
            raise TicketRefused(
                f"ticket {ticket.hex()} was never issued, has expired or is already used"
            )
        its_owner, its_request, deadline = self._live[ticket]
        if its_owner is not owner or its_request != request:
            raise TicketRefused(
                f"ticket {ticket.hex()} was issued to another connection or request"
            )
        if self._clock() >= deadline:
            self.retire(ticket)
            raise TicketRefused(f"ticket {ticket.hex()} has expired; offer the request again")

    def retire(self, ticket: bytes) -> None:
        """The request is over; its ticket is dead."""
        self._live.pop(ticket, None)
