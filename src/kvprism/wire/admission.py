"""What a receiver admits: its own description, and its verdict on an offer."""

from dataclasses import dataclass

from kvprism.core import ITEMSIZE
from kvprism.errors import BadInput, Busy, Rejected
from kvprism.wire.intake import native_nbytes
from kvprism.wire.messages import DIGEST, FORMAT, Hello, Offer
from kvprism.wire.order import check_format
from kvprism.wire.tickets import check_token


@dataclass(frozen=True)
class ReceiverConfig:
    """What a receiver is, can hold and allows.

    `credit_nbytes`: bytes in flight that were not consumed yet, per request; `max_request_nbytes`:
    the largest request, in native bytes; `lease_s`: how long a request may take.

    Raises:
        BadInput: a value that would admit nothing, or a hash that is not 32 bytes.
    """

    token: bytes
    fingerprint: bytes
    profile: bytes
    codecs: tuple[str, ...]
    drop: str = "uniform"
    block: int = 1
    credit_nbytes: int = 2**28
    max_request_nbytes: int = 2**36
    lease_s: float = 60.0

    def __post_init__(self) -> None:
        check_token(self.token)
        for name in ("fingerprint", "profile"):
            if len(getattr(self, name)) != 32:
                raise BadInput(f"{name} must be 32 bytes, got {len(getattr(self, name))}")
        for name in ("block", "credit_nbytes", "max_request_nbytes", "lease_s"):
            if getattr(self, name) <= 0:
                raise BadInput(f"{name} must be positive, got {getattr(self, name)}")

    def hello(self, nonce: bytes) -> Hello:
        """The first message to a sender."""
        return Hello(
            FORMAT,
            (DIGEST,),
            self.codecs,
            self.drop,
            self.block,
            self.fingerprint,
            self.profile,
            nonce,
        )

    def judge(self, offer: Offer) -> None:
        """Let an offer pass.

        Raises:
            Rejected: another version, digest, codec, fingerprint, profile or dtype than ours.
            Busy: larger than `max_request_nbytes`.
        """
        check_format(offer)
        for tier in offer.menu:
            if tier.codec not in self.codecs:
                raise Rejected("codec", "codec", ", ".join(self.codecs), tier.codec)
        for field in ("fingerprint", "profile"):
            ours, theirs = getattr(self, field), getattr(offer, field)
            if ours != theirs:
                raise Rejected(field, field, ours.hex(), theirs.hex())
        for entry in offer.layers:
            if entry.dtype not in ITEMSIZE:
                field = f"dtype of layer {entry.layer}"
                raise Rejected("shape", field, ", ".join(ITEMSIZE), entry.dtype)
        if native_nbytes(offer) > self.max_request_nbytes:
            ours, theirs = str(self.max_request_nbytes), str(native_nbytes(offer))
            raise Busy("busy", "native bytes", ours, theirs)
