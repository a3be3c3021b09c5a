"""Tensors to manifests and segments, and back: `encode`, `decode`, and the pieces between.

A request's stream is the same bytes in a file and on a connection: offer, then every manifest with
its segments, then end. `plan.nbytes == len(encode(kv, plan))`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from io import BytesIO

import msgspec
import numpy as np
import torch

from kvprism.codec.backend import decode_into, encode_into
from kvprism.codec.destination import LayerDestination
from kvprism.codec.reference import Conditioned
from kvprism.codec.upgrades import with_room
from kvprism.core import (
    CONDITIONED_CODEC,
    KEYS,
    NATIVE_CODEC,
    STATE,
    ComponentShape,
    Drop,
    KVShape,
    LayerShape,
    Tier,
)
from kvprism.errors import (
    BadInput,
    CodecError,
    LimitExceeded,
    PositionMismatch,
    ProfileMismatch,
    ProtocolViolation,
    ShapeMismatch,
)
from kvprism.layout import (
    WHOLE,
    Plane,
    Split,
    TierArray,
    as_coded,
    check_menu,
    plane_nbytes,
    unpack_tier_map,
    upgrading,
)
from kvprism.plans import LayerPlan, Plan, end_of, manifests_of, offer_of, tiers_in
from kvprism.profiles import Profile, conditioning_for, stated_hash
from kvprism.staged import StagedPlan
from kvprism.tensors import KeyConditioning, LayerKV, RequestKV
from kvprism.wire import frames
from kvprism.wire.intake import native_nbytes
from kvprism.wire.messages import NO_ID, NOT_STATED, Block, Manifest, Offer, Segment, TierMap
from kvprism.wire.session import FileSession
from kvprism.wire.stream import Segments, parse

MAX_REQUEST_NBYTES = 2**36


@dataclass(frozen=True)
class Encoded:
    """One manifest and its segment area, padding included."""

    manifest: Manifest
    area: memoryview


def encode_layer(
    kv: LayerKV,
    layer: LayerPlan,
    menu: Sequence[Tier],
    split: Split = WHOLE,
    first_sequence: int = 0,
    conditioning: KeyConditioning | None = None,
    allocate: Callable[[int], memoryview] = lambda nbytes: memoryview(bytearray(nbytes)),
) -> Iterator[Encoded]:
    """Encode one layer, manifest by manifest; conditioning: of its quantised keys, if they are.

    allocate: the memory of a segment area of so many bytes, whatever is in it.

    Whatever applies a plan comes through here, so this is where a merging policy's rewrite acts.

    Raises:
        ShapeMismatch: the tensors are not those that were planned.
        CodecError: a value that its tier cannot hold, naming layer, component, head and token.
    """
    check_layer(kv, layer.shape)
    kv = kv if layer.rewrite is None else layer.rewrite(kv)
    for manifest in manifests_of(layer, menu, split, first_sequence):
        area = allocate(frames.segments_nbytes(manifest))
        frames.clear_padding(manifest, area)
        slices = iter(frames.segment_slices(manifest))
        blocks = []
        for block in manifest.blocks:
            planes = {Plane(segment.plane): area[next(slices)] for segment in block.segments}
            conditioned = _conditioned(block, conditioning)
            _encode_block(kv, layer, block, menu, planes, conditioned)
            blocks.append(_with_digests(block, planes))
        yield Encoded(msgspec.structs.replace(manifest, blocks=tuple(blocks)), area)


def _encode_block(
    kv: LayerKV,
    layer: LayerPlan,
    block: Block,
    menu: Sequence[Tier],
    planes: dict[Plane, memoryview],
    conditioned: Conditioned | None,
) -> None:
    start = layer.shape.token_range[0]
    x = kv.components[block.component]
    x = x[slice(*block.heads), block.tokens[0] - start : block.tokens[1] - start]
    tiers = tiers_in(layer, block.component, block.heads, block.tokens)
    if upgrading(menu)[tiers[0, 0]]:
        planes = with_room(planes, tiers, menu, x.shape[-1])
    try:
        first = (block.heads[0], block.tokens[0])
        encode_into(x, tiers, as_coded(menu), planes, first, conditioned, block.component)
    except CodecError as error:
        raise _at(block, error) from error


def _conditioned(block: Block, conditioning: KeyConditioning | None) -> Conditioned | None:
    """How the quantised rows of a block are conditioned, if they are: keys alone."""
    if conditioning is None or block.component != KEYS:
        return None
    heads = slice(*block.heads)
    own = replace(conditioning, offset=conditioning.offset[heads], scale=conditioning.scale[heads])
    return Conditioned(own, torch.arange(*block.tokens))


def _at(block: Block, error: CodecError) -> CodecError:
    return CodecError(f"layer {block.layer} component {block.component!r}: {error}")


def _with_digests(block: Block, planes: dict[Plane, memoryview]) -> Block:
    segments = tuple(
        Segment(s.plane, s.nbytes, frames.digest_of(planes[Plane(s.plane)])) for s in block.segments
    )
    return msgspec.structs.replace(block, segments=segments)


def encode(
    kv: RequestKV,
    plan: Plan,
    *,
    fingerprint: bytes = NOT_STATED,
    profile: Profile | None = None,
) -> bytes:
    """The whole request as one stream; the file format of `docs/format.md`.

    profile: stated by its hash; the conditioned code takes its key conditioning.

    Raises:
        ShapeMismatch, PositionMismatch: the plan is for another cache.
        ProfileMismatch: the conditioned code without a profile for this cache.
        CodecError: a value that its tier cannot hold.
    """
    check_planned(kv, plan)
    conditioning = conditioning_for(plan.shape, plan.menu, profile)
    stated = stated_hash(profile)
    # One growing buffer that is given away without a copy: the encoded request is held once.
    stream = BytesIO()
    stream.write(frames.pack(offer_of(plan.shape, plan.menu, NO_ID, fingerprint, stated)))
    sequence = 0
    for layer_kv, layer in stages(kv, plan):
        own = conditioning.get(layer_kv.layer_id)
        for encoded in encode_layer(layer_kv, layer, plan.menu, plan.split, sequence, own):
            stream.write(frames.pack(encoded.manifest))
            stream.write(encoded.area)
            sequence += 1
    stream.write(frames.pack(end_of(sequence, stream.tell())))
    assert stream.tell() == plan.nbytes, (stream.tell(), plan.nbytes)
    return stream.getvalue()


def stages(kv: RequestKV, plan: Plan) -> Iterator[tuple[LayerKV, LayerPlan]]:
    """What is encoded under a plan, in order: its layers, or those of the stages that it has."""
    if not isinstance(plan, StagedPlan):
        yield from zip(kv.layers, plan.layers, strict=True)
        return
    layers = {layer.layer_id: layer for layer in kv.layers}
    for planned in plan.stages():
        yield layers[planned.shape.layer_id].part(*planned.shape.token_range), planned


def check_planned(kv: RequestKV, plan: Plan) -> None:
    """Refuse a plan that was not made for this cache.

    Raises:
        ShapeMismatch: other layers, heads, tokens, channels or dtype.
        PositionMismatch: a cache that goes on later than after its last token.
    """
    if len(kv.layers) != len(plan.layers):
        raise ShapeMismatch(
            f"the plan has {len(plan.layers)} layers, the cache {len(kv.layers)}; plan it anew"
        )
    for layer, planned in zip(kv.layers, plan.shape.layers, strict=True):
        check_layer(layer, planned)
    if kv.next_position != plan.shape.next_position:
        raise PositionMismatch(
            f"the cache goes on at position {kv.next_position}, but its tokens end at "
            f"{plan.shape.next_position}, where a decoded stream goes on; prefill the whole prompt"
        )


def check_layer(kv: LayerKV, planned: LayerShape) -> None:
    """Raises `ShapeMismatch` unless this is the layer that was planned."""
    if kv.shape() != planned:
        raise ShapeMismatch(f"the plan is for {planned}, the cache has {kv.shape()}; plan it anew")


def decode(
    stream: bytes | memoryview,
    *,
    profile: Profile | None = None,
    max_nbytes: int = MAX_REQUEST_NBYTES,
    drop: Drop = "uniform",
) -> RequestKV:
    """Restore a request from its stream; tokens that were dropped are absent.

    profile: that of the encoder, which the conditioned code needs; the others do not look at it.
    drop: `per_head` also takes streams whose heads keep different tokens, and pads them in memory:
    see `LayerKV.held`.

    Raises:
        ProfileMismatch: the conditioned code, and not with this profile.
        WireError: not a complete, undamaged stream (`Truncated`, `Damaged`, `LimitExceeded`, ...).
        CodecError: planes that no codec of ours made.
    """
    session = FileSession()
    assembler: Assembler | None = None
    for event in parse(stream):
        session.handle(event)
        if isinstance(event, Offer):
            assembler = Assembler(event, max_nbytes, profile, drop)
        elif isinstance(event, Segments) and assembler is not None:
            assembler.add(event)
    session.close()
    if assembler is None:
        raise ProtocolViolation("a stream without an offer")
    return assembler.finish()


def offered_shape(offer: Offer) -> KVShape:
    """The shape that an offer describes.

    Raises:
        ProtocolViolation: no legal one, or one that the offered menu does not suit.
        Unsupported: a tier that is not built.
    """
    try:
        shape = KVShape(
            tuple(
                LayerShape(
                    entry.layer,
                    tuple(ComponentShape(c.name, c.heads, c.channels) for c in entry.components),
                    (entry.start, entry.stop),
                    entry.dtype,
                )
                for entry in offer.layers
            )
        )
        for layer in shape.layers:
            for name, _, channels in layer.components:
                if name not in STATE:
                    check_menu(menu_of(offer), channels, layer.itemsize)
    except BadInput as error:
        raise ProtocolViolation(f"the offer describes no cache: {error}") from error
    return shape


def menu_of(offer: Offer) -> tuple[Tier, ...]:
    """The tiers that an offer's maps index."""
    return tuple(Tier(entry.name, entry.codec, entry.bits) for entry in offer.menu)


def offered_conditioning(offer: Offer, profile: Profile | None) -> dict[int, KeyConditioning]:
    """The layers whose quantised keys come conditioned by `profile`.

    Raises:
        ProfileMismatch: the conditioned code, and the offer states another profile than this one.
    """
    menu = menu_of(offer)
    if (
        profile is not None
        and profile.hash != offer.profile
        and CONDITIONED_CODEC in {tier.codec for tier in menu}
    ):
        raise ProfileMismatch(
            f"the stream was made with profile {offer.profile.hex()[:16]}..., this one is "
            f"{profile.hash.hex()[:16]}...; decode with the profile of the encoder"
        )
    return conditioning_for(offered_shape(offer), menu, profile)


class Assembler:
    """Restores a request from its pieces, in any order, straight into the destination tensors.

    profile: for the conditioned code, and drop: what is held here, as in `decode`.

    Whether the pieces tile the offered area is the session's business (`wire.intake`).

    Raises:
        ProtocolViolation: the offer describes no cache, or a menu that is not legal for it.
        Unsupported: a tier that is not built.
        LimitExceeded: the offered cache is larger than `max_nbytes`; nothing was allocated.
        ProfileMismatch: as `decode`.
    """

    def __init__(
        self,
        offer: Offer,
        max_nbytes: int = MAX_REQUEST_NBYTES,
        profile: Profile | None = None,
        drop: Drop = "uniform",
    ) -> None:
        self.shape = offered_shape(offer)
        self.menu = menu_of(offer)
        nbytes = native_nbytes(offer)  # state too
        if nbytes > max_nbytes:
            raise LimitExceeded(
                f"the offer decodes to {nbytes} bytes, at most {max_nbytes} are allowed here"
            )
        self._conditioning = offered_conditioning(offer, profile)
        ragged, self._upgrading = drop == "per_head", upgrading(self.menu)
        staged = self.menu if self._upgrading.any() else None
        self._layers = {
            la.layer_id: LayerDestination(la, ragged, staged) for la in self.shape.layers
        }
        self._finished: dict[int, LayerKV] = {}
        # Upgrades of rows that came damaged and are on their way again.
        self._early: list[tuple[Block, TierArray, dict[Plane, memoryview]]] = []

    def add(self, segments: Segments) -> None:
        """Decode every block of one manifest.

        Raises:
            ProtocolViolation: a tier map or planes that do not fit their block.
            CodecError: planes that no codec of ours made, or heads and components that keep
                different tokens.
        """
        slices = iter(frames.segment_slices(segments.manifest))
        for block in segments.manifest.blocks:
            planes = {s.plane: segments.area[next(slices)] for s in block.segments}
            self._add_block(block, segments.manifest.maps[block.map], planes)

    def _add_block(self, block: Block, tier_map: TierMap, planes: dict[int, memoryview]) -> None:
        destination = self._layers.get(block.layer)
        if destination is None:
            raise ProtocolViolation(
                f"layer {block.layer} component {block.component!r}, heads {block.heads}, tokens "
                f"{block.tokens}: as many rows as the layer has came before, so pieces overlap"
            )
        layer = destination.shape
        heads, tokens = block.heads[1] - block.heads[0], block.tokens[1] - block.tokens[0]
        tiers = unpack_tier_map(tier_map, heads, tokens, len(self.menu))
        channels = layer.component(block.component).channels
        expected = plane_nbytes(tiers, self.menu, channels, layer.itemsize, block.component)
        got = {plane: len(data) for plane, data in planes.items()}
        if got != expected:
            raise ProtocolViolation(
                f"layer {block.layer} component {block.component!r}: the tier map needs planes "
                f"{ {int(plane): size for plane, size in expected.items()} }, got {got}"
            )
        if block.component in STATE:
            self._check_state(block, tiers)
        named = {Plane(plane): data for plane, data in planes.items()}
        if self._upgrading[tiers].any():
            self._upgrade(block, tiers, named)
            return
        destination.keep(block, np.array([tier.bits > 0 for tier in self.menu])[tiers])
        destination.remember(block, tiers, named)
        self._decode(block, tiers, named)
        destination.missing -= tiers.size
        if not destination.missing and not self._upgrading.any():
            # Without its dropped tokens a layer is a copy: never are two layers held twice.
            self._finished[block.layer] = self._layers.pop(block.layer).finish()

    def _decode(self, block: Block, tiers: TierArray, planes: dict[Plane, memoryview]) -> None:
        out = self._layers[block.layer].rows(block)
        conditioned = _conditioned(block, self._conditioning.get(block.layer))
        try:
            decode_into(planes, tiers, as_coded(self.menu), out, conditioned, block.component)
        except CodecError as error:
            raise _at(block, error) from error

    def _upgrade(self, block: Block, tiers: TierArray, planes: dict[Plane, memoryview]) -> None:
        if not self._upgrading[tiers].all():
            raise ProtocolViolation(f"layer {block.layer}: a block mixes upgrades with other tiers")
        kept = self._layers[block.layer].kept_for(block, tiers)
        if kept is None:
            self._early.append((block, tiers, planes))
        else:
            self._decode(block, tiers, planes | kept)

    def _check_state(self, block: Block, tiers: TierArray) -> None:
        codecs = {self.menu[tier].codec for tier in np.unique(tiers) if self.menu[tier].bits}
        if codecs - {NATIVE_CODEC}:
            raise ProtocolViolation(
                f"layer {block.layer}: state {block.component!r} comes native or not at all, got "
                f"{sorted(codecs)}"
            )

    def finish(self) -> RequestKV:
        """The restored cache, dropped tokens left out; every piece was added.

        Raises:
            ProtocolViolation: upgrades of rows that never came.
        """
        early, self._early = self._early, []
        for upgrade in early:
            self._upgrade(*upgrade)
        if self._early:
            raise ProtocolViolation(f"{len(self._early)} upgrades of rows that never came")
        for layer_id, destination in self._layers.items():
            self._finished[layer_id] = destination.finish()
        layers = tuple(self._finished[layer.layer_id] for layer in self.shape.layers)
        return RequestKV(layers, self.shape.next_position)
