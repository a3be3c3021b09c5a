"""Deployment profiles: what both ends must agree on before a byte moves."""

import hashlib
import json
import math
import re
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
        BadInput: a fingerprint that is not 32 bytes in lower-case hex, or shares that are not
            positive and finite.
    """

    fingerprint: str
    layer_shares: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if re.fullmatch("[0-9a-f]{64}", self.fingerprint) is None:
            raise BadInput(
                "a KV fingerprint is 32 bytes in lower-case hex (`fingerprint(model).hex()`), got "
                f"{self.fingerprint!r}"
            )
        if self.layer_shares is None:
            return
        # As they are read back, so that a profile with whole numbers keeps its hash in a file.
        object.__setattr__(self, "layer_shares", tuple(map(float, self.layer_shares)))
        if not self.layer_shares or not all(0 < share < math.inf for share in self.layer_shares):
            raise BadInput(f"layer shares must be positive and finite, got {self.layer_shares}")

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
        """Write the profile as readable JSON with its own hash, in one step.

        Raises:
            BadInput: the file cannot be written.
        """
        body = {**json.loads(self._canonical()), "hash": self.hash.hex()}
        temporary = path.with_name(path.name + ".part")
        try:
            temporary.write_text(json.dumps(body, indent=2) + "\n")
            temporary.replace(path)
        except OSError as error:
            raise BadInput(f"profile {path} cannot be written: {error.strerror}") from error

    @classmethod
    def load(cls, path: Path) -> "Profile":
        """Read and verify a profile.

        Raises:
            BadInput: no file, or not a profile.
            ProfileMismatch: it was edited, or is of another version.
        """
        try:
            stored = msgspec.json.decode(path.read_bytes(), type=_Stored)
        except OSError as error:
            raise BadInput(f"profile {path} cannot be read: {error.strerror}") from error
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise BadInput(f"{path} is not a kvprism profile: {error}") from error
        profile = cls(stored.fingerprint, stored.layer_shares)
        if stored.schema != SCHEMA or profile.hash.hex() != stored.hash:
            raise ProfileMismatch(
                f"{path}: schema {stored.schema} (expected {SCHEMA}), hash {stored.hash[:16]}... "
                f"(contents hash to {profile.hash.hex()[:16]}...): it was edited or is of another "
                "version; make the profile again"
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
