"""Deployment profiles: what both ends must agree on before a byte moves.

A profile is JSON in sections. Each is hashed apart, so that an edited one can be named: SHA-256
over its name, a zero byte and its JSON with sorted keys, without spaces, in ASCII. The profile's
hash, which the handshake compares, is SHA-256 over a tag and the section hashes in order. Routes
came later: a profile without them has neither that section nor its hash, and keeps its own.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import numpy as np
import torch

from kvprism.core import CONDITIONED_CODEC, KEYS, ComponentShape, KVShape, LayerShape, Tier
from kvprism.errors import BadInput, KVPrismError, ProfileMismatch
from kvprism.routes import Route, line_of, parse_layers
from kvprism.tensors import KeyConditioning
from kvprism.wire.messages import NOT_STATED

SCHEMA = 2
SECTIONS = ("fingerprint", "layer_shares", "conditioning", "probe")
ROUTES = "routes"
# 80 layers of 8 heads of 128 channels take 0.7 MB.
MAX_PROFILE_NBYTES = 2**26
_TAG = b"kvprism profile 2\0"

Verdict = Literal["yes", "no", "inconclusive"]
LayerSetting = Literal["plain", "conditioned", "no-int4"]


class ProbeRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the INT4 probe found, and what to do about it.

    int4, conditioned: whether the model tolerates plain and conditioned INT4; settings: one per
    layer, which `spectrum-adaptive` follows; reason: the verdict's reason in a sentence.
    """

    int4: Verdict
    conditioned: Verdict
    settings: tuple[LayerSetting, ...]
    reason: str


@dataclass(frozen=True, eq=False)
class Profile:
    """A model's KV fingerprint (hex) and, as far as calibrated, what was found for it.

    layer_shares: the budget share of every layer; conditioning: the key conditioning of every
    layer, None where keys are quantised as they are; probe: the INT4 probe's verdict; routes: for
    `polykv` and its like, an eviction policy and a share for every layer, at some budgets. Profiles
    with the same hash are equal.

    Raises:
        BadInput: a fingerprint that is not 32 bytes in lower-case hex, shares that are not positive
            and finite, sections for different numbers of layers, a verdict or setting that does not
            exist, a layer that is set to `conditioned` and has no conditioning, or two routes for
            one policy and budget.
    """

    fingerprint: str
    layer_shares: tuple[float, ...] | None = None
    conditioning: tuple[KeyConditioning | None, ...] | None = None
    probe: ProbeRecord | None = None
    routes: tuple[Route, ...] = ()

    def __post_init__(self) -> None:
        if re.fullmatch("[0-9a-f]{64}", self.fingerprint) is None:
            raise BadInput(
                "a KV fingerprint is 32 bytes in lower-case hex (`fingerprint(model).hex()`), got "
                f"{self.fingerprint!r}"
            )
        if self.layer_shares is not None:
            # As they are read back, so that a profile with whole numbers keeps its hash in a file.
            object.__setattr__(self, "layer_shares", tuple(map(float, self.layer_shares)))
            _check_shares(self.layer_shares)
        _check_layers(
            layer_shares=self.layer_shares,
            conditioning=self.conditioning,
            probe=None if self.probe is None else self.probe.settings,
            **{str(route): route.layers for route in self.routes},
        )
        _check_routes(self.routes)
        if self.probe is not None:
            _check_probe(self.probe, self.conditioning or (None,) * len(self.probe.settings))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Profile) and self.hash == other.hash

    def __hash__(self) -> int:
        return hash(self.hash)

    @cached_property
    def hash(self) -> bytes:
        """32 bytes that both ends compare in the handshake, over `section_hashes`."""
        return _root_hash(self.section_hashes())

    def section_hashes(self) -> dict[str, bytes]:
        """Section -> 32 bytes; an absent section is hashed as `null`."""
        return _section_hashes(self._body())

    def check(self, fingerprint: bytes) -> None:
        """Refuse a model that this profile was not made for (`ProfileMismatch`)."""
        if fingerprint.hex() != self.fingerprint:
            raise ProfileMismatch(
                f"profile is for KV fingerprint {self.fingerprint[:16]}..., this model has "
                f"{fingerprint.hex()[:16]}...; make a profile for this model"
            )

    def conditioning_of(self, shape: KVShape) -> dict[int, KeyConditioning]:
        """Layer id -> its key conditioning, without the layers that have none.

        Raises:
            ProfileMismatch: no conditioning at all, or one for other layers, heads or channels.
        """
        layers = self.conditioning
        if layers is None or len(layers) != len(shape.layers):
            found = "none" if layers is None else f"that of {len(layers)} layers"
            raise ProfileMismatch(
                f"{CONDITIONED_CODEC} needs the key conditioning of {len(shape.layers)} layers, "
                f"this profile has {found}; calibrate this model, or choose another codec"
            )
        found_for = {}
        for layer, conditioning in zip(shape.layers, layers, strict=True):
            if conditioning is not None:
                _check_fits(layer, conditioning)
                found_for[layer.layer_id] = conditioning
        return found_for

    def save(self, path: Path) -> None:
        """Write the profile as readable JSON with its hashes, in one step.

        Raises:
            BadInput: the file cannot be written.
        """
        hashes = {name: digest.hex() for name, digest in self.section_hashes().items()}
        body = {"schema": SCHEMA, **self._body(), "hashes": hashes, "hash": self.hash.hex()}
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
            BadInput: no file, too large a file, or not a profile.
            ProfileMismatch: it was edited, or is of another version.
        """
        data = _read(path)
        try:
            schema = msgspec.json.decode(data, type=_Version).schema
            if schema != SCHEMA:
                raise ProfileMismatch(
                    f"{path}: profile schema {schema}, this kvprism reads {SCHEMA}; make the "
                    "profile again with this version"
                )
            stored = msgspec.json.decode(data, type=_Stored)
            _check_hashes(path, stored)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise BadInput(f"{path} is not a kvprism profile: {error}") from error
        try:
            return stored.profile()
        except KVPrismError as error:
            raise BadInput(f"{path} is not a kvprism profile: {error}") from error

    def _body(self) -> dict[str, object]:
        """The sections as JSON has them."""
        layers = self.conditioning
        stored = layers and [layer and _StoredConditioning.of(layer) for layer in layers]
        body: dict[str, object] = msgspec.to_builtins(
            {
                "fingerprint": self.fingerprint,
                "layer_shares": self.layer_shares,
                "conditioning": stored,
                "probe": self.probe,
            }
        )
        if self.routes:
            body[ROUTES] = [msgspec.to_builtins(StoredRoute.of(route)) for route in self.routes]
        return body


def conditioning_for(
    shape: KVShape, menu: Sequence[Tier], profile: Profile | None
) -> dict[int, KeyConditioning]:
    """The layers whose keys a menu's quantised tiers are conditioned in; none in other codes.

    Raises:
        ProfileMismatch: the conditioned code without a profile that has what this shape needs.
    """
    if all(tier.codec != CONDITIONED_CODEC for tier in menu):
        return {}
    if profile is None:
        raise ProfileMismatch(
            f"{CONDITIONED_CODEC} needs the profile that holds its key conditioning, and none was "
            "given; give both sides the same profile"
        )
    return profile.conditioning_of(shape)


def stated_hash(profile: Profile | None) -> bytes:
    """What handshakes and offers state of a profile, or of none."""
    return NOT_STATED if profile is None else profile.hash


class _StoredConditioning(msgspec.Struct, forbid_unknown_fields=True):
    """One layer's `KeyConditioning`: base64 of little-endian float32, C order."""

    heads: Annotated[int, msgspec.Meta(ge=1)]
    channels: Annotated[int, msgspec.Meta(ge=2, multiple_of=2)]
    rotate: bool
    offset: bytes
    scale: bytes
    inverse_frequencies: bytes

    @classmethod
    def of(cls, conditioning: KeyConditioning) -> "_StoredConditioning":
        heads, channels = conditioning.offset.shape
        names = ("offset", "scale", "inverse_frequencies")
        arrays = (getattr(conditioning, name).cpu().numpy().astype("<f4") for name in names)
        return cls(heads, channels, conditioning.rotate, *(array.tobytes() for array in arrays))

    def conditioning(self) -> KeyConditioning:
        half = self.channels // 2
        return KeyConditioning(
            offset=self._array("offset", self.heads, self.channels),
            scale=self._array("scale", self.heads, half),
            inverse_frequencies=self._array("inverse_frequencies", half),
            rotate=self.rotate,
        )

    def _array(self, name: str, *shape: int) -> torch.Tensor:
        data, expected = getattr(self, name), 4 * math.prod(shape)
        if len(data) != expected:
            raise BadInput(
                f"conditioning {name} of {list(shape)} float32 takes {expected} bytes, got "
                f"{len(data)}"
            )
        array = np.frombuffer(data, "<f4").astype(np.float32)
        return torch.from_numpy(array).view(shape)


class StoredRoute(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """One `Route`; prefill: its layers as a line, such as `0-3: full, 4-10: snapkv@640`; decode:
    those of its decode phase, left out, and not hashed, where it has none of its own.
    """

    policy: str
    tokens: int
    prefill: str
    note: str
    decode: str = ""

    @classmethod
    def of(cls, route: Route) -> "StoredRoute":
        return cls(route.policy, route.tokens, str(route), route.note, line_of(route.decode))

    def route(self) -> Route:
        decode = parse_layers(self.decode) if self.decode else ()
        return Route(self.policy, self.tokens, parse_layers(self.prefill), self.note, decode)


class _Version(msgspec.Struct):
    schema: int


class _Stored(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    schema: int
    fingerprint: str
    layer_shares: tuple[float, ...] | None
    conditioning: tuple[_StoredConditioning | None, ...] | None
    probe: ProbeRecord | None
    hashes: dict[str, str]
    hash: str
    routes: tuple[StoredRoute, ...] = ()

    def profile(self) -> Profile:
        layers = self.conditioning
        conditioning = None
        if layers is not None:
            conditioning = tuple(None if la is None else la.conditioning() for la in layers)
        routes = tuple(route.route() for route in self.routes)
        return Profile(self.fingerprint, self.layer_shares, conditioning, self.probe, routes)


def _read(path: Path) -> bytes:
    try:
        nbytes = path.stat().st_size
        if nbytes > MAX_PROFILE_NBYTES:
            raise BadInput(
                f"profile {path} has {nbytes} bytes, at most {MAX_PROFILE_NBYTES} are read; is it "
                "a profile?"
            )
        return path.read_bytes()
    except OSError as error:
        raise BadInput(f"profile {path} cannot be read: {error.strerror}") from error


def _section_hashes(body: Mapping[str, object]) -> dict[str, bytes]:
    return {name: _section_hash(name, body[name]) for name in (*SECTIONS, ROUTES) if name in body}


def _section_hash(name: str, value: object) -> bytes:
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(f"{name}\0{canonical}".encode()).digest()


def _root_hash(hashes: Mapping[str, bytes]) -> bytes:
    return hashlib.sha256(_TAG + b"".join(hashes.values())).digest()


def _check_hashes(path: Path, stored: _Stored) -> None:
    hashes = _section_hashes(msgspec.to_builtins(stored))
    shown = {name: digest.hex() for name, digest in hashes.items()}
    edited = [name for name in shown if stored.hashes.get(name) != shown[name]]
    if edited or stored.hashes != shown or stored.hash != _root_hash(hashes).hex():
        raise ProfileMismatch(
            f"{path} was edited: {', '.join(edited) or 'hash'} is not what was hashed; make the "
            "profile again"
        )


def _check_fits(layer: LayerShape, conditioning: KeyConditioning) -> None:
    heads, channels = conditioning.offset.shape
    if ComponentShape(KEYS, heads, channels) not in layer.components:
        raise ProfileMismatch(
            f"layer {layer.layer_id} has {layer.named_components}, this profile conditions "
            f"{KEYS} {heads} x {channels}; make a profile for this model"
        )


def _check_shares(shares: Sequence[float]) -> None:
    if not shares or not all(0 < share < math.inf for share in shares):
        raise BadInput(f"layer shares must be positive and finite, got {shares}")


def _check_probe(probe: ProbeRecord, conditioning: Sequence[KeyConditioning | None]) -> None:
    try:
        # msgspec checks a struct when it reads one, not when it makes one.
        msgspec.convert(msgspec.to_builtins(probe), ProbeRecord)
    except msgspec.ValidationError as error:
        raise BadInput(f"probe record {probe}: {error}") from error
    for layer, setting in enumerate(probe.settings):
        if setting == "conditioned" and conditioning[layer] is None:
            raise BadInput(
                f"the probe sets layer {layer} to 'conditioned' and the profile has no "
                "conditioning for it; set it to 'plain' or 'no-int4'"
            )


def _check_routes(routes: Sequence[Route]) -> None:
    seen = [(route.policy, route.tokens) for route in routes]
    for policy, tokens in seen:
        if seen.count((policy, tokens)) > 1:
            raise BadInput(f"a profile has one route for {policy!r} at {tokens} tokens, got more")


def _check_layers(**sections: Sequence[object] | None) -> None:
    counts = {name: len(layers) for name, layers in sections.items() if layers is not None}
    if len(set(counts.values())) > 1 or 0 in counts.values():
        raise BadInput(f"sections must be for the same layers, at least one, got {counts}")
