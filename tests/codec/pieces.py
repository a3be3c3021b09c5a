"""Streams put together from pieces, in any order, for the tests of the codec."""

import msgspec
import numpy as np
from strategies import cache, plan_of

from kvprism.codec.stream import Encoded, encode_layer
from kvprism.layout import Split
from kvprism.plans import Plan, end_of
from kvprism.profiles import Profile, conditioning_for
from kvprism.tensors import RequestKV
from kvprism.wire import frames
from kvprism.wire.messages import Offer


def pieces_of(kv: RequestKV, plan: Plan, profile: Profile | None = None) -> list[Encoded]:
    conditioning = conditioning_for(plan.shape, plan.menu, profile)
    pieces: list[Encoded] = []
    for layer, planned in zip(kv.layers, plan.layers, strict=True):
        own = conditioning.get(layer.layer_id)
        pieces += encode_layer(layer, planned, plan.menu, plan.split, len(pieces), own)
    return pieces


def planes_of(pieces: list[Encoded]) -> dict[tuple[int, str, int], bytes]:
    """(layer, component, plane) -> its bytes, the pieces joined in order."""
    planes: dict[tuple[int, str, int], bytes] = {}
    for piece in pieces:
        slices = iter(frames.segment_slices(piece.manifest))
        for block in piece.manifest.blocks:
            for segment in block.segments:
                key = (block.layer, block.component, segment.plane)
                planes[key] = planes.get(key, b"") + bytes(piece.area[next(slices)])
    return planes


def stream_of(offer: Offer, pieces: list[Encoded]) -> bytes:
    """A well-framed stream of any pieces, numbered in this order."""
    parts: list[bytes | memoryview] = [frames.pack(offer)]
    for sequence, piece in enumerate(pieces):
        manifest = msgspec.structs.replace(piece.manifest, sequence=sequence)
        parts += [frames.pack(manifest), piece.area]
    parts.append(frames.pack(end_of(len(pieces), sum(len(part) for part in parts))))
    return b"".join(parts)


def cut_cache() -> tuple[RequestKV, Plan, list[Encoded]]:
    kv = cache(layers=2, heads=4, tokens=9)
    tiers = np.random.default_rng(1).integers(0, 3, (4, 9))
    plan = plan_of(kv, tiers, split=Split(tokens=4, heads=2))
    return kv, plan, pieces_of(kv, plan)
