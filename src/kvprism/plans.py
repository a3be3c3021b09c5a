"""Plans: which tier every (layer, component, head, token) takes, and their exact cost. numpy only."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from kvprism.core import MENU, KVShape, LayerShape, Tier
from kvprism.errors import ShapeMismatch
from kvprism.layout import (
    WHOLE,
    Split,
    TierArray,
    check_menu,
    pack_tier_map,
    plane_nbytes,
    ranges,
)
from kvprism.wire import frames
from kvprism.wire.messages import (
    DIGEST,
    FORMAT,
    NO_ID,
    NOT_STATED,
    Block,
    ComponentEntry,
    End,
    LayerEntry,
    Manifest,
    Offer,
    Segment,
    TierEntry,
    TierMap,
)


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """One layer's tiers: component -> uint8 `[head, token]`, indices into the plan's menu.

    Raises:
        ShapeMismatch: an array that does not fit the layer's shape.
    """

    shape: LayerShape
    tier_of: Mapping[str, TierArray]

    def __post_init__(self) -> None:
        for name, heads, _ in self.shape.components:
            expected = (heads, self.shape.n_tokens)
            got = self.tier_of[name] if name in self.tier_of else None
            if got is None or got.shape != expected or got.dtype != np.uint8:
                found = "nothing" if got is None else f"{got.dtype} {list(got.shape)}"
                raise ShapeMismatch(
                    f"layer {self.shape.layer_id} component {name!r}: expected uint8 "
                    f"{list(expected)} tiers, got {found}"
                )


@dataclass(frozen=True, eq=False)
class Plan:
    """A tier for every row of a request; `nbytes` is what `encode` will produce, to the byte.

    Raises:
        BadInput: a menu that is not legal for these shapes, or a tier beyond it.
    """

    layers: tuple[LayerPlan, ...]
    menu: tuple[Tier, ...] = MENU
    split: Split = WHOLE
    policy: str = ""

    def __post_init__(self) -> None:
        for layer in self.layers:
            for name, _, channels in layer.shape.components:
                check_menu(self.menu, channels, layer.shape.itemsize)
                highest = int(layer.tier_of[name].max())
                if highest >= len(self.menu):
                    raise ShapeMismatch(f"tier {highest} in a menu of {len(self.menu)}")

    @cached_property
    def shape(self) -> KVShape:
        return KVShape(tuple(layer.shape for layer in self.layers))

    @cached_property
    def nbytes(self) -> int:
        """Exact wire bytes: offer, manifests, maps, scales, payload, padding, digests, end."""
        return stream_nbytes(self.layers, self.menu, self.split)

    @property
    def fraction(self) -> float:
        """Wire bytes over the same cache at 16 bits."""
        return self.nbytes / self.shape.reference_nbytes

    @property
    def fraction_native(self) -> float:
        """Wire bytes over the cache in its own dtype."""
        return self.nbytes / self.shape.native_nbytes

    def histogram(self) -> dict[str, int]:
        """Tier name -> (layer, component, head, token) rows that take it."""
        counts = np.zeros(len(self.menu), np.int64)
        for layer in self.layers:
            for tiers in layer.tier_of.values():
                counts += np.bincount(tiers.reshape(-1), minlength=len(self.menu))
        return {tier.name: int(count) for tier, count in zip(self.menu, counts, strict=True)}


def offer_of(
    shape: KVShape,
    menu: Sequence[Tier],
    request: bytes = NO_ID,
    fingerprint: bytes = NOT_STATED,
    profile: bytes = NOT_STATED,
) -> Offer:
    """The frame that opens a request's stream: what will be sent, in which codes."""
    layers = tuple(
        LayerEntry(
            layer.layer_id,
            *layer.token_range,
            layer.dtype,
            tuple(ComponentEntry(*component) for component in layer.components),
        )
        for layer in shape.layers
    )
    entries = tuple(TierEntry(tier.codec, tier.bits, tier.name) for tier in menu)
    return Offer(
        format=FORMAT,
        digest=DIGEST,
        request=request,
        fingerprint=fingerprint,
        profile=profile,
        menu=entries,
        layers=layers,
    )


def manifests_of(
    layer: LayerPlan,
    menu: Sequence[Tier],
    split: Split = WHOLE,
    first_sequence: int = 0,
    request: bytes = NO_ID,
    ticket: bytes = NO_ID,
) -> Iterator[Manifest]:
    """One layer's manifests with zero digests, one per (token range, head range) of the split."""
    most_heads = max(component.heads for component in layer.shape.components)
    sequence = first_sequence
    for tokens in ranges(*layer.shape.token_range, split.tokens):
        for heads in ranges(0, most_heads, split.heads):
            maps, blocks = _blocks(layer, menu, heads, tokens)
            yield Manifest(
                request=request, ticket=ticket, sequence=sequence, maps=maps, blocks=blocks
            )
            sequence += 1


def end_of(manifests: int, nbytes: int, request: bytes = NO_ID, ticket: bytes = NO_ID) -> End:
    """The frame that closes a request's stream: what came before it."""
    return End(request=request, ticket=ticket, manifests=manifests, nbytes=nbytes)


def tiers_in(
    layer: LayerPlan, component: str, heads: tuple[int, int], tokens: tuple[int, int]
) -> TierArray:
    """The `[head, token]` slice of a layer's tiers; ranges in global head and token numbers."""
    start = layer.shape.token_range[0]
    return layer.tier_of[component][slice(*heads), tokens[0] - start : tokens[1] - start]


def _blocks(
    layer: LayerPlan, menu: Sequence[Tier], heads: tuple[int, int], tokens: tuple[int, int]
) -> tuple[tuple[TierMap, ...], tuple[Block, ...]]:
    """A manifest's blocks, and the tier maps that they share."""
    maps: list[TierMap] = []
    blocks = []
    for name, n_heads, channels in layer.shape.components:
        own = (heads[0], min(heads[1], n_heads))
        if own[0] >= own[1]:
            continue
        tiers = tiers_in(layer, name, own, tokens)
        tier_map = pack_tier_map(tiers)
        if tier_map not in maps:
            maps.append(tier_map)
        segments = tuple(
            Segment(int(plane), size, bytes(8 * -(-size // frames.DIGEST_BLOCK)))
            for plane, size in plane_nbytes(tiers, menu, channels, layer.shape.itemsize).items()
        )
        blocks.append(
            Block(layer.shape.layer_id, name, own, tokens, maps.index(tier_map), segments)
        )
    return tuple(maps), tuple(blocks)


def layer_nbytes(
    layer: LayerPlan, menu: Sequence[Tier], split: Split = WHOLE, first_sequence: int = 0
) -> tuple[int, int]:
    """Exact wire bytes of one layer, and how many manifests carry it."""
    nbytes = count = 0
    for manifest in manifests_of(layer, menu, split, first_sequence):
        nbytes += len(frames.pack(manifest)) + frames.segments_nbytes(manifest)
        count += 1
    return nbytes, count


def stream_nbytes(layers: Sequence[LayerPlan], menu: Sequence[Tier], split: Split = WHOLE) -> int:
    """Length of the stream that carries these layers, from the plan alone."""
    nbytes = len(frames.pack(offer_of(KVShape(tuple(la.shape for la in layers)), menu)))
    sequence = 0
    for layer in layers:
        more, count = layer_nbytes(layer, menu, split, sequence)
        nbytes += more
        sequence += count
    return nbytes + len(frames.pack(end_of(sequence, nbytes)))
