"""Plans: the tier of every (layer, component, head, token), and their exact cost. numpy only."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import product
from typing import Any

import msgspec
import numpy as np

from kvprism.core import (
    DROP_CODEC,
    MENU,
    STATE,
    Capability,
    ComponentShape,
    KVShape,
    LayerShape,
    Tier,
)
from kvprism.errors import BadInput, ShapeMismatch, Unsupported
from kvprism.layout import (
    WHOLE,
    Plane,
    Split,
    TierArray,
    check_menu,
    counted_nbytes,
    counted_tier_map,
    pack_tier_map,
    plane_nbytes,
    ranges,
)
from kvprism.wire.frames import DIGEST_BLOCK, frame_nbytes
from kvprism.wire.intake import manifest_nbytes
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

# A block's tier map, and the bytes of its planes.
Contents = tuple[TierMap, Mapping[Plane, int]]


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """One layer's tiers: component -> uint8 `[head, token]`, indices into the plan's menu.

    rewrite: of a merging policy, which changes kept rows: the layer's `LayerKV` -> the one that is
    encoded in its place. Sizes do not depend on it.

    Raises:
        ShapeMismatch: other components than the layer has, or an array that does not fit them.
    """

    shape: LayerShape
    tier_of: Mapping[str, TierArray]
    rewrite: Callable[[Any], Any] | None = None  # tensors have no name here
    # By menu, split and first sequence: a solver asks again and again while other layers change.
    _sizes: dict[Any, tuple[int, int]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        names = [component.name for component in self.shape.components]
        if sorted(names) != sorted(self.tier_of):
            raise ShapeMismatch(
                f"layer {self.shape.layer_id}: expected tiers for {names}, got {list(self.tier_of)}"
            )
        for name, heads, _ in self.shape.components:
            expected, got = (heads, self.shape.n_tokens), self.tier_of[name]
            if got.shape != expected or got.dtype != np.uint8:
                raise ShapeMismatch(
                    f"layer {self.shape.layer_id} component {name!r}: expected uint8 "
                    f"{list(expected)} tiers, got {got.dtype} {list(got.shape)}"
                )

    def contents(
        self,
        component: ComponentShape,
        heads: tuple[int, int],
        tokens: tuple[int, int],
        menu: Sequence[Tier],
    ) -> Contents:
        """What a block of this layer holds."""
        name, _, channels = component
        tiers = tiers_in(self, name, heads, tokens)
        sizes = plane_nbytes(tiers, menu, channels, self.shape.itemsize, name)
        return pack_tier_map(tiers), sizes

    def nbytes(self, menu: tuple[Tier, ...], split: Split, first: int) -> tuple[int, int]:
        """As `layer_nbytes`, found once."""
        key = menu, split, first
        if key not in self._sizes:
            self._sizes[key] = _nbytes(self, menu, split, first)
        return self._sizes[key]

    def check_drops(self, menu: Sequence[Tier], capability: Capability) -> None:
        """Refuse a layer whose missing tokens the receiver cannot hold.

        Raises:
            Unsupported: it drops tokens at all, or in blocks, or not the same ones in all heads and
                components.
        """
        drops = np.array([tier.codec == DROP_CODEC for tier in menu])
        rows = np.concatenate([drops[tiers] for tiers in self.tier_of.values()])
        if not rows.any():
            return
        if capability.drop == "none":
            raise Unsupported(
                f"layer {self.shape.layer_id} drops tokens and the receiver's capability is "
                "drop=none; choose a policy that keeps every token, such as spectrum"
            )
        if capability.block != 1:
            raise Unsupported(
                f"the receiver drops tokens in blocks of {capability.block} and only blocks of 1 "
                "are built; choose a policy that keeps every token, such as spectrum"
            )
        if capability.drop == "uniform" and (rows != rows[0]).any():
            raise Unsupported(
                f"layer {self.shape.layer_id} drops other tokens in some heads or components than "
                "in others and the receiver's capability is drop=uniform; drop the same in all"
            )


RangeCounts = Callable[[tuple[int, int]], tuple[int, ...]]  # of a token range, for each tier


@dataclass(frozen=True)
class LayerCounts:
    """How many tokens of a layer take each tier, the same ones in every component and head.

    That is all its size depends on: no array of tiers is made for it. counts: of a token range, in
    global numbers, for each tier of the menu.
    """

    shape: LayerShape
    counts: RangeCounts

    def contents(
        self,
        component: ComponentShape,
        heads: tuple[int, int],
        tokens: tuple[int, int],
        menu: Sequence[Tier],
    ) -> Contents:
        """What a block of this layer holds, with zeros for its tier map."""
        counts, (name, _, channels) = self.counts(tokens), component
        sizes = counted_nbytes(
            (counts,), heads[1] - heads[0], tuple(menu), channels, self.shape.itemsize, name
        )
        return counted_tier_map(counts), sizes


@dataclass(frozen=True, eq=False)
class Plan:
    """A tier for every row of a request; `nbytes` is what `encode` will produce, to the byte.

    Raises:
        BadInput: a menu that is not legal for these shapes, a tier beyond it, or layers that do not
            ascend.
        Unsupported: a tier that is not built.
    """

    layers: tuple[LayerPlan, ...]
    menu: tuple[Tier, ...] = MENU
    split: Split = WHOLE
    policy: str = ""

    def __post_init__(self) -> None:
        for layer in self.shape.layers:
            for name, _, channels in layer.components:
                if name not in STATE:
                    check_menu(self.menu, channels, layer.itemsize)
        for planned in self.layers:
            highest = max(int(tiers.max()) for tiers in planned.tier_of.values())
            if highest >= len(self.menu):
                raise ShapeMismatch(
                    f"layer {planned.shape.layer_id} takes tier {highest}, the menu has 0 to "
                    f"{len(self.menu) - 1}"
                )

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
    """The frame that opens a request's stream: what will be sent, in which codes.

    Raises:
        BadInput: a number or name that the format has no room for.
    """
    layers = tuple(
        LayerEntry(
            layer.layer_id,
            *layer.token_range,
            layer.dtype,
            tuple(ComponentEntry(*component) for component in layer.components),
        )
        for layer in shape.layers
    )
    offer = Offer(
        format=FORMAT,
        digest=DIGEST,
        request=request,
        fingerprint=fingerprint,
        profile=profile,
        menu=tuple(TierEntry(tier.codec, tier.bits, tier.name) for tier in menu),
        layers=layers,
    )
    try:
        # msgspec checks the bounds of a message when it reads one, not when it makes one.
        return msgspec.msgpack.decode(msgspec.msgpack.encode(offer), type=Offer)
    except msgspec.ValidationError as error:
        raise BadInput(f"the format has no room for this cache or its names: {error}") from error


def manifests_of(
    layer: LayerPlan | LayerCounts,
    menu: Sequence[Tier],
    split: Split = WHOLE,
    first_sequence: int = 0,
    request: bytes = NO_ID,
    ticket: bytes = NO_ID,
) -> Iterator[Manifest]:
    """One layer's manifests with zero digests, one per (token range, head range) of the split."""
    for sequence, (tokens, heads) in enumerate(_rectangles(layer.shape, split), first_sequence):
        maps, blocks = _blocks(layer, menu, heads, tokens)
        yield Manifest(request=request, ticket=ticket, sequence=sequence, maps=maps, blocks=blocks)


def n_manifests(shape: LayerShape, split: Split) -> int:
    """How many manifests carry a layer."""
    return sum(1 for _ in _rectangles(shape, split))


def _rectangles(
    shape: LayerShape, split: Split
) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """(token range, head range) of every manifest."""
    most_heads = max(component.heads for component in shape.components)
    return product(ranges(*shape.token_range, split.tokens), ranges(0, most_heads, split.heads))


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
    layer: LayerPlan | LayerCounts,
    menu: Sequence[Tier],
    heads: tuple[int, int],
    tokens: tuple[int, int],
) -> tuple[tuple[TierMap, ...], tuple[Block, ...]]:
    """A manifest's blocks, and the tier maps that they share."""
    maps: list[TierMap] = []
    blocks = []
    for component in layer.shape.components:
        own = (heads[0], min(heads[1], component.heads))
        if own[0] >= own[1]:
            continue
        tier_map, sizes = layer.contents(component, own, tokens, menu)
        if tier_map not in maps:
            maps.append(tier_map)
        segments = tuple(
            Segment(int(plane), size, bytes(8 * -(-size // DIGEST_BLOCK)))
            for plane, size in sizes.items()
        )
        name, index = component.name, maps.index(tier_map)
        blocks.append(Block(layer.shape.layer_id, name, own, tokens, index, segments))
    return tuple(maps), tuple(blocks)


def layer_nbytes(
    layer: LayerPlan | LayerCounts,
    menu: Sequence[Tier],
    split: Split = WHOLE,
    first_sequence: int = 0,
) -> tuple[int, int]:
    """Exact wire bytes of one layer, and how many manifests carry it."""
    if isinstance(layer, LayerPlan):
        return layer.nbytes(tuple(menu), split, first_sequence)
    return _nbytes(layer, menu, split, first_sequence)


def _nbytes(
    layer: LayerPlan | LayerCounts, menu: Sequence[Tier], split: Split, first_sequence: int
) -> tuple[int, int]:
    sizes = [manifest_nbytes(m) for m in manifests_of(layer, menu, split, first_sequence)]
    return sum(sizes), len(sizes)


def sent_after(
    layers: Iterable[LayerPlan | LayerCounts],
    menu: Sequence[Tier],
    split: Split,
    nbytes: int,
    sequence: int = 0,
) -> tuple[int, int]:
    """Bytes and manifests of a stream after these layers; nbytes, sequence: those before them."""
    alike: dict[tuple[LayerShape, RangeCounts], _Alike] = {}
    for layer in layers:
        if isinstance(layer, LayerPlan):
            more, n = layer_nbytes(layer, menu, split, sequence)
        else:
            key = replace(layer.shape, layer_id=0), layer.counts
            if key not in alike:
                alike[key] = _Alike.of(LayerCounts(*key), menu, split)
            more, n = alike[key].nbytes_of(layer.shape.layer_id, sequence), alike[key].manifests
        nbytes, sequence = nbytes + more, sequence + n
    return nbytes, sequence


@dataclass(frozen=True)
class _Alike:
    """Sizes of layers that differ in their number alone: in how long it is, and the manifests'."""

    nbytes: int  # with all of these numbers left out
    manifests: int
    blocks: int

    @classmethod
    def of(cls, layer: LayerCounts, menu: Sequence[Tier], split: Split) -> "_Alike":
        manifests = list(manifests_of(layer, menu, split))
        blocks = sum(len(manifest.blocks) for manifest in manifests)
        numbers = _numbers_nbytes(range(len(manifests)))
        numbers += blocks * _number_nbytes(layer.shape.layer_id)
        return cls(sum(map(manifest_nbytes, manifests)) - numbers, len(manifests), blocks)

    def nbytes_of(self, layer_id: int, sequence: int) -> int:
        numbers = _numbers_nbytes(range(sequence, sequence + self.manifests))
        return self.nbytes + numbers + self.blocks * _number_nbytes(layer_id)


def _numbers_nbytes(numbers: range) -> int:
    return sum(map(_number_nbytes, numbers))


@cache
def _number_nbytes(number: int) -> int:
    return len(msgspec.msgpack.encode(number))


def stream_nbytes(
    layers: Sequence[LayerPlan | LayerCounts],
    menu: Sequence[Tier],
    split: Split = WHOLE,
    shape: KVShape | None = None,
) -> int:
    """Length of the stream that carries these layers, from the plan alone.

    shape: of the offer, where the layers come in parts.
    """
    whole = shape or KVShape(tuple(layer.shape for layer in layers))
    nbytes, sequence = sent_after(layers, menu, split, frame_nbytes(offer_of(whole, menu)))
    return nbytes + frame_nbytes(end_of(sequence, nbytes))
