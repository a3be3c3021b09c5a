"""`kvprism inspect`: verify a saved stream and say what is in it."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from kvprism.codec.stream import menu_of, offered_shape
from kvprism.commands import console
from kvprism.errors import BadInput, WireError
from kvprism.layout import Plane, unpack_tier_map
from kvprism.wire.messages import Offer
from kvprism.wire.session import FileSession
from kvprism.wire.stream import Segments, parse


class _Census:
    """What the segments of a stream hold: bytes per plane, rows per tier."""

    def __init__(self, offer: Offer) -> None:
        self.menu = menu_of(offer)
        self.manifests = 0
        self.planes: Counter[str] = Counter()
        self.rows = np.zeros(len(self.menu), np.int64)

    def count(self, segments: Segments) -> None:
        self.manifests += 1
        for block in segments.manifest.blocks:
            for segment in block.segments:
                self.planes[Plane(segment.plane).name.lower()] += segment.nbytes
            heads, tokens = block.heads[1] - block.heads[0], block.tokens[1] - block.tokens[0]
            tier_map = segments.manifest.maps[block.map]
            tiers = unpack_tier_map(tier_map, heads, tokens, len(self.menu))
            self.rows += np.bincount(tiers.reshape(-1), minlength=len(self.menu))


def inspect_stream(path: Path) -> dict[str, Any]:
    """Read and verify every byte of a stream; nothing is decoded.

    Raises:
        BadInput: the file cannot be read.
        WireError: it is not a complete, undamaged stream.
    """
    try:
        stream = path.read_bytes()
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}") from error
    try:
        offer, census = _take_census(stream)
    except WireError as error:
        error.args = (f"{path}: {error}",)
        raise
    return _described(path, len(stream), offer, census)


def _take_census(stream: bytes) -> tuple[Offer, _Census]:
    session = FileSession()
    census: _Census | None = None
    for event in parse(stream):
        session.handle(event)
        if isinstance(event, Offer):
            census = _Census(event)
        elif isinstance(event, Segments) and census is not None:
            census.count(event)
    session.close()
    assert session.offer is not None and census is not None  # it closes after a whole stream only
    return session.offer, census


def _described(path: Path, nbytes: int, offer: Offer, census: _Census) -> dict[str, Any]:
    shape = offered_shape(offer)
    first = max(shape.layers, key=lambda layer: layer.n_tokens)
    return {
        "kind": "stream",
        "file": str(path),
        "format": ".".join(map(str, offer.format)),
        "fingerprint": offer.fingerprint.hex(),
        "profile": offer.profile.hex(),
        "codecs": sorted({tier.codec for tier in census.menu}),
        "wire_bytes": nbytes,
        "reference_bytes": shape.reference_nbytes,
        "native_bytes": shape.native_nbytes,
        "fraction": nbytes / shape.reference_nbytes,
        "fraction_native": nbytes / shape.native_nbytes,
        "layers": len(shape.layers),
        "components": [component._asdict() for component in first.components],
        "dtype": first.dtype,
        "token_range": list(first.token_range),  # of the first layer that is not cut to a window
        "next_position": shape.next_position,
        "manifests": census.manifests,
        "rows_per_tier": {
            tier.name: int(n) for tier, n in zip(census.menu, census.rows, strict=True)
        },
        "plane_bytes": dict(census.planes),
        "overhead_bytes": nbytes - sum(census.planes.values()),
    }


def show_stream(result: dict[str, Any]) -> None:
    """Print what `inspect_stream` found."""
    start, stop = result["token_range"]
    parts = ", ".join(
        f"{c['name']} of {c['heads']} heads x {c['channels']}" for c in result["components"]
    )
    for line in (
        f"{result['file']}: complete, every digest is right; format {result['format']}",
        f"{result['layers']} layers ({parts}) in {result['dtype']}, tokens {start} to {stop - 1}; "
        f"decode goes on at position {result['next_position']}",
        f"codecs {', '.join(result['codecs'])}; fingerprint {result['fingerprint'][:16]}...",
    ):
        console.say(line)
    total = sum(result["rows_per_tier"].values())
    rows = [
        [name, f"{n:,}", console.percent(n / total)] for name, n in result["rows_per_tier"].items()
    ]
    console.table("rows (layer, component, head, token) per tier", ["tier", "rows", "share"], rows)
    planes = {
        **result["plane_bytes"],
        "manifests, maps, padding": result["overhead_bytes"],
        "all": result["wire_bytes"],
    }
    rows = [
        [name, f"{n:,}", console.size(n), console.percent(n / result["reference_bytes"])]
        for name, n in planes.items()
    ]
    console.table("bytes", ["plane", "bytes", "", "of 16-bit"], rows)
