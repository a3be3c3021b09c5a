"""`kvprism inspect`: verify a saved stream and say what is in it."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from kvprism.codec.stream import menu_of, offered_shape
from kvprism.commands import console
from kvprism.errors import BadInput, ProtocolViolation
from kvprism.layout import Plane, unpack_tier_map
from kvprism.wire.messages import Offer
from kvprism.wire.session import FileSession
from kvprism.wire.stream import Segments, parse


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
    session = FileSession()
    planes: Counter[str] = Counter()
    tiers: Counter[str] = Counter()
    manifests = 0
    offer: Offer | None = None
    for event in parse(stream):
        session.handle(event)
        if isinstance(event, Offer):
            offer = event
        elif isinstance(event, Segments) and offer is not None:
            manifests += 1
            _count(event, offer, planes, tiers)
    session.close()
    if offer is None:
        raise ProtocolViolation(f"{path} has no offer")
    shape = offered_shape(offer)
    return {
        "file": str(path),
        "format": ".".join(map(str, offer.format)),
        "fingerprint": offer.fingerprint.hex(),
        "profile": offer.profile.hex(),
        "wire_bytes": len(stream),
        "reference_bytes": shape.reference_nbytes,
        "fraction": len(stream) / shape.reference_nbytes,
        "fraction_native": len(stream) / shape.native_nbytes,
        "layers": len(shape.layers),
        "components": [c._asdict() for c in shape.layers[0].components],
        "dtype": shape.layers[0].dtype,
        "token_range": list(shape.layers[0].token_range),
        "next_position": shape.next_position,
        "manifests": manifests,
        "rows_per_tier": {tier.name: tiers[tier.name] for tier in menu_of(offer)},
        "plane_bytes": dict(planes),
        "overhead_bytes": len(stream) - sum(planes.values()),
    }


def _count(segments: Segments, offer: Offer, planes: Counter[str], tiers: Counter[str]) -> None:
    menu = menu_of(offer)
    for block in segments.manifest.blocks:
        for segment in block.segments:
            planes[Plane(segment.plane).name.lower()] += segment.nbytes
        heads, tokens = block.heads[1] - block.heads[0], block.tokens[1] - block.tokens[0]
        tier_of = unpack_tier_map(segments.manifest.maps[block.map], heads, tokens, len(menu))
        for tier, count in zip(
            menu, np.bincount(tier_of.reshape(-1), minlength=len(menu)), strict=True
        ):
            tiers[tier.name] += int(count)


def show_stream(result: dict[str, Any]) -> None:
    """Print what `inspect_stream` found."""
    start, stop = result["token_range"]
    console.out.print(f"{result['file']}: format {result['format']}, every digest is right")
    console.out.print(
        f"{result['layers']} layers of {result['components']} in {result['dtype']}, tokens "
        f"[{start}, {stop}), decode goes on at position {result['next_position']}",
        markup=False,
    )
    total = sum(result["rows_per_tier"].values())
    rows = [
        [name, str(n), console.percent(n / total)] for name, n in result["rows_per_tier"].items()
    ]
    console.table("rows (layer, component, head, token) per tier", ["tier", "rows", "share"], rows)
    parts = {**result["plane_bytes"], "manifests, maps, padding": result["overhead_bytes"]}
    rows = [
        [name, console.size(n), console.percent(n / result["reference_bytes"])]
        for name, n in parts.items()
    ]
    whole = [console.size(result["wire_bytes"]), console.percent(result["fraction"])]
    console.table("bytes", ["plane", "bytes", "of 16-bit"], [*rows, ["all", *whole]])
