"""Deployment profiles: what both ends must agree on before a byte moves."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import msgspec

from kvprism.errors import BadInput, ProfileMismatch

SCHEMA = 1
_TAG = b"kvprism profile 1\0"


@dataclass(frozen=True)
class Profile:
    """A model's KV fingerprint (hex) and, if calibrated, the budget share of every layer.

    Raises:
        BadInput: a fingerprint that is not 32 bytes of hex, or shares that are not positive.
    """

    fingerprint: str
    layer_shares: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        try:
            size = len(bytes.fromhex(self.fingerprint))
        except ValueError as error:
            raise BadInput(f"fingerprint {self.fingerprint!r} is not hexadecimal") from error
        if size != 32:
            raise BadInput(f"a KV fingerprint has 32 bytes, got {size}")
        if self.layer_shares is not None and not all(share > 0 for share in self.layer_shares):
            raise BadInput(f"layer shares must be positive, got {self.layer_shares}")

    @property
    def hash(self) -> bytes:
        """32 bytes that both ends compare in the handshake: SHA-256 over the canonical JSON."""
        return hashlib.sha256(_TAG + self._canonical()).digest()

    def check(self, fingerprint: bytes) -> None:
        """Refuse a model that this profile was not made for (`ProfileMismatch`)."""
        if fingerprint.hex() != self.fingerprint:
            raise ProfileMismatch(
                f"profile is for KV fingerprint {self.fingerprint[:16]}..., this model has "
                f"{fingerprint.hex()[:16]}...; make a profile for this model"
            )

    def save(self, path: Path) -> None:
        """Write the profile as readable JSON with its own hash, in one step."""
        body = {**json.loads(self._canonical()), "hash": self.hash.hex()}
        temporary = path.with_name(path.name + ".part")
        temporary.write_text(json.dumps(body, indent=2) + "\n")
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path) -> "Profile":
        """Read and verify a profile; `ProfileMismatch` when it was edited, `BadInput` when malformed."""
        try:
            stored = msgspec.json.decode(path.read_bytes(), type=_Stored)
        except (OSError, msgspec.DecodeError) as error:
            raise BadInput(f"{path} is not a kvprism profile: {error}") from error
        profile = cls(stored.fingerprint, stored.layer_shares)
        if stored.schema != SCHEMA or profile.hash.hex() != stored.hash:
            raise ProfileMismatch(
                f"{path}: schema {stored.schema} (expected {SCHEMA}) and hash {stored.hash[:16]}... "
                f"(contents hash to {profile.hash.hex()[:16]}...): the file was edited or is of another version"
            )
        return profile

    def _canonical(self) -> bytes:
        fields = {
            "schema": SCHEMA,
            "fingerprint": self.fingerprint,
            "layer_shares": self.layer_shares,
        }
        return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()


class _Stored(msgspec.Struct, forbid_unknown_fields=True):
    schema: int
    fingerprint: str
    layer_shares: tuple[float, ...] | None
    hash: str
