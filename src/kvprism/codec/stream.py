"""Tensors to manifests and segments, and back: `encode`, `decode`, and the pieces between.

A request's stream is the same bytes in a file and on a connection: offer, then every manifest with
its segments, then end. `plan.nbytes == len(encode(kv, plan))`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from kvprism.codec.reference import decode_into, encode_into
from kvprism.core import ComponentShape, KVShape, LayerShape, Tier
from kvprism.errors import BadInput, CodecError, LimitExceeded, ProtocolViolation, ShapeMismatch
from kvprism.layout import (
    WHOLE,
    Plane,
    Split,
    TierArray,
    check_menu,
    plane_nbytes,
    unpack_tier_map,
)
from kvprism.plans import LayerPlan, Plan, end_of, manifests_of, offer_of, tiers_in
from kvprism.tensors import DTYPES, LayerKV, RequestKV
from kvprism.wire import frames
from kvprism.wire.messages import NO_ID, NOT_STATED, Block, Manifest, Offer, Segment
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
) -> Iterator[Encoded]:
    """Encode one layer, manifest by manifest.

    Raises:
        ShapeMismatch: the tensors are not those that were planned.
        CodecError: a value that its tier cannot hold, naming layer, component, head and token.
    """
    if kv.shape() != layer.shape:
        raise ShapeMismatch(f"planned for {layer.shape}, got {kv.shape()}")
    for manifest in manifests_of(layer, menu, split, first_sequence):
        area = memoryview(bytearray(frames.segments_nbytes(manifest)))
        slices = iter(frames.segment_slices(manifest))
        blocks = []
        for block in manifest.blocks:
            planes = {Plane(segment.plane): area[next(slices)] for segment in block.segments}
            _encode_block(kv, layer, block, menu, planes)
            blocks.append(_with_digests(block, planes))
        yield Encoded(msgspec.structs.replace(manifest, blocks=tuple(blocks)), area)


def _encode_block(
    kv: LayerKV,
    layer: LayerPlan,
    block: Block,
    menu: Sequence[Tier],
    planes: dict[Plane, memoryview],
) -> None:
    start = layer.shape.token_range[0]
    x = kv.components[block.component]
    x = x[slice(*block.heads), block.tokens[0] - start : block.tokens[1] - start]
    try:
        encode_into(x, tiers_in(layer, block.component, block.heads, block.tokens), menu, planes)
    except CodecError as error:
        raise CodecError(f"layer {block.layer} component {block.component!r}: {error}") from error


def _with_digests(block: Block, planes: dict[Plane, memoryview]) -> Block:
    segments = tuple(
        Segment(s.plane, s.nbytes, frames.digest_of(planes[Plane(s.plane)])) for s in block.segments
    )
    return msgspec.structs.replace(block, segments=segments)


def encode(
    kv: RequestKV, plan: Plan, *, fingerprint: bytes = NOT_STATED, profile: bytes = NOT_STATED
) -> bytes:
    """The whole request as one stream; the file format of `docs/format.md`.

    Raises:
        ShapeMismatch: the plan is for another cache.
        CodecError: a value that its tier cannot hold.
    """
    if len(kv.layers) != len(plan.layers):
        raise ShapeMismatch(f"planned {len(plan.layers)} layers, got {len(kv.layers)}")
    parts: list[bytes | memoryview] = [
        frames.pack(offer_of(plan.shape, plan.menu, NO_ID, fingerprint, profile))
    ]
    sequence = 0
    for layer_kv, layer in zip(kv.layers, plan.layers, strict=True):
        for encoded in encode_layer(layer_kv, layer, plan.menu, plan.split, sequence):
            parts += [frames.pack(encoded.manifest), encoded.area]
            sequence += 1
    parts.append(frames.pack(end_of(sequence, sum(len(part) for part in parts))))
    stream = b"".join(parts)
    assert len(stream) == plan.nbytes, (len(stream), plan.nbytes)
    return stream


def decode(stream: bytes | memoryview, *, max_nbytes: int = MAX_REQUEST_NBYTES) -> RequestKV:
    """Restore a request from its stream; tokens that were dropped are absent.

    Raises:
        WireError: not a complete, undamaged stream (`Truncated`, `Damaged`, `LimitExceeded`, ...).
        CodecError: planes that no codec of ours made.
    """
    session = FileSession()
    assembler: Assembler | None = None
    for event in parse(stream):
        session.handle(event)
        if isinstance(event, Offer):
            assembler = Assembler(event, max_nbytes)
        elif isinstance(event, Segments) and assembler is not None:
            assembler.add(event)
    session.close()
    if assembler is None:
        raise ProtocolViolation("a stream without an offer")
    return assembler.finish()


def offered_shape(offer: Offer) -> KVShape:
    """The shape that an offer describes; `ProtocolViolation` when it is not a legal one."""
    try:
        return KVShape(
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
    except BadInput as error:
        raise ProtocolViolation(f"the offer describes no cache: {error}") from error


def menu_of(offer: Offer) -> tuple[Tier, ...]:
    """The tiers that an offer's maps index."""
    return tuple(Tier(entry.name, entry.codec, entry.bits) for entry in offer.menu)


class Assembler:
    """Restores a request from its pieces, in any order, straight into the destination tensors.

    Raises:
        LimitExceeded: the offered cache is larger than `max_nbytes`; nothing was allocated.
    """

    def __init__(self, offer: Offer, max_nbytes: int = MAX_REQUEST_NBYTES) -> None:
        self.shape = offered_shape(offer)
        self.menu = menu_of(offer)
        if self.shape.native_nbytes > max_nbytes:
            raise LimitExceeded(
                f"the offer decodes to {self.shape.native_nbytes} bytes, at most {max_nbytes} are "
                "allowed here"
            )
        for layer in self.shape.layers:
            for _, _, channels in layer.components:
                check_menu(self.menu, channels, layer.itemsize)
        self._layers = {layer.layer_id: layer for layer in self.shape.layers}
        self._out: dict[tuple[int, str], torch.Tensor] = {}
        self._kept: dict[tuple[int, str], NDArray[np.bool_]] = {}

    def add(self, segments: Segments) -> None:
        """Decode every block of one manifest."""
        slices = iter(frames.segment_slices(segments.manifest))
        for block in segments.manifest.blocks:
            planes = {s.plane: segments.area[next(slices)] for s in block.segments}
            self._add_block(block, segments.manifest, planes)

    def _add_block(self, block: Block, manifest: Manifest, planes: dict[int, memoryview]) -> None:
        layer = self._layers[block.layer]
        component = layer.component(block.component)
        heads, tokens = block.heads[1] - block.heads[0], block.tokens[1] - block.tokens[0]
        tiers = unpack_tier_map(manifest.maps[block.map], heads, tokens, len(self.menu))
        expected = plane_nbytes(tiers, self.menu, component.channels, layer.itemsize)
        if {plane: len(data) for plane, data in planes.items()} != expected:
            raise ProtocolViolation(
                f"layer {block.layer} component {block.component!r}: the tier map needs planes "
                f"{expected}, got { {plane: len(data) for plane, data in planes.items()} }"
            )
        start = layer.token_range[0]
        area = (slice(*block.heads), slice(block.tokens[0] - start, block.tokens[1] - start))
        out, kept = self._destination(layer, component)
        kept[area] = self._keeps(tiers)
        decode_planes = {Plane(plane): data for plane, data in planes.items()}
        if out[area].is_contiguous():
            decode_into(decode_planes, tiers, self.menu, out[area])
        else:
            dense = torch.zeros_like(out[area], memory_format=torch.contiguous_format)
            decode_into(decode_planes, tiers, self.menu, dense)
            out[area] = dense

    def _destination(
        self, layer: LayerShape, component: ComponentShape
    ) -> tuple[torch.Tensor, NDArray[np.bool_]]:
        key = (layer.layer_id, component.name)
        if key not in self._out:
            shape = (component.heads, layer.n_tokens)
            self._out[key] = torch.zeros(*shape, component.channels, dtype=DTYPES[layer.dtype])
            self._kept[key] = np.zeros(shape, bool)
        return self._out[key], self._kept[key]

    def _keeps(self, tiers: TierArray) -> NDArray[np.bool_]:
        return np.array([tier.bits > 0 for tier in self.menu])[tiers]

    def finish(self) -> RequestKV:
        """The restored cache, dropped tokens left out.

        Raises:
            CodecError: heads or components of one layer that keep different tokens.
        """
        layers = tuple(self._finish_layer(layer) for layer in self.shape.layers)
        return RequestKV(layers, self.shape.next_position)

    def _finish_layer(self, layer: LayerShape) -> LayerKV:
        keys = [(layer.layer_id, component.name) for component in layer.components]
        kept = self._kept[keys[0]][0]
        if any((self._kept[key] != kept).any() for key in keys):
            raise CodecError(
                f"layer {layer.layer_id}: heads or components keep different tokens; this receiver "
                "holds one set of tokens per layer (capability drop=uniform)"
            )
        positions = torch.from_numpy(np.flatnonzero(kept)) + layer.token_range[0]
        whole = bool(kept.all())
        mask = torch.from_numpy(kept)
        components = {
            name: self._out[layer.layer_id, name]
            if whole
            else self._out[layer.layer_id, name][:, mask]
            for name, _, _ in layer.components
        }
        return LayerKV(layer.layer_id, components, positions)
