"""Plans that are sent in two stages: a provisional map part by part, then upgrades. numpy only.

What attention makes of a token is known after the last chunk of a prefill. Until then its rows go
under a provisional map; then those that deserve more get it: the residuals of a row turn 4 bits
into 8, and a row that ends in the cache's own dtype is sent again. `docs/format.md`, 6.2.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, pairwise

import numpy as np

from kvprism.core import EMBEDDED, NATIVE_CODEC, UPGRADES, LayerShape, Tier
from kvprism.errors import BadInput, ShapeMismatch, Unsupported
from kvprism.layout import TierArray
from kvprism.plans import LayerPlan, Plan, offer_of, sent_after, stream_nbytes, tiers_in
from kvprism.wire.frames import frame_nbytes

_NEVER = 255


def staged_menu(menu: Sequence[Tier]) -> tuple[Tier, ...]:
    """A menu with what may become of its rows.

    Raises:
        Unsupported: its 4-bit code is no part of its 8-bit code.
    """
    codecs = {tier.codec for tier in menu}
    if not codecs & EMBEDDED:
        raise Unsupported(
            f"upgrades from 4 bits to 8 need a code of which the first are a part, one of "
            f"{sorted(EMBEDDED)}, got {sorted(codecs)}; leave the codec out"
        )
    return (*menu, *UPGRADES)


@dataclass(frozen=True, eq=False)
class StagedPlan(Plan):
    """A plan whose rows come twice: `provisional` part by part, then as `layers` has them.

    provisional: the first tiers of the same layers; cuts: the ascending positions that bound the
    parts, from the first token of any layer, or before, to the last one's end. `nbytes` is of all
    that is sent, what is sent twice counted twice; `histogram` is of what the receiver has at the
    end.

    Raises:
        ShapeMismatch: provisional tiers of other layers, or cuts that do not bound them.
        BadInput: a tier that its provisional tier cannot become, with this menu.
    """

    provisional: tuple[LayerPlan, ...] = ()
    cuts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if [layer.shape for layer in self.provisional] != list(self.shape.layers):
            raise ShapeMismatch("the provisional map is of other layers than the final one")
        starts, stops = zip(*self.shape.token_ranges, strict=True)
        whole = self.cuts[:1] <= (min(starts),) and self.cuts[-1:] >= (max(stops),)
        if not whole or list(self.cuts) != sorted(set(self.cuts)):
            raise ShapeMismatch(
                f"parts bounded by {self.cuts} are not the tokens {min(starts)} to {max(stops)}"
            )
        _ = self.upgrades  # made here: what cannot be is refused now

    @cached_property
    def nbytes(self) -> int:
        return stream_nbytes(tuple(self.stages()), self.menu, self.split, self.shape)

    @cached_property
    def base_nbytes(self) -> int:
        """What is sent before the first upgrade, and without END."""
        offer = frame_nbytes(offer_of(self.shape, self.menu))
        return sent_after(self.parts(), self.menu, self.split, offer)[0]

    def stages(self) -> Iterator[LayerPlan]:
        """What is encoded, in order: every layer of every part, then the layers' upgrades."""
        return chain(self.parts(), self.upgrades)

    def parts(self) -> Iterator[LayerPlan]:
        """The provisional map, part by part."""
        for start, stop in pairwise(self.cuts):
            for layer in self.provisional:
                if (tokens := within(layer.shape, start, stop)) is not None:
                    yield part_of(layer, tokens)

    @cached_property
    def upgrades(self) -> tuple[LayerPlan, ...]:
        """What becomes of the rows of each layer in which something does."""
        made = (
            upgrade_of(first, last, self.menu)
            for first, last in zip(self.provisional, self.layers, strict=True)
        )
        return tuple(layer for layer in made if layer is not None)


def within(shape: LayerShape, start: int, stop: int) -> tuple[int, int] | None:
    """The tokens of a layer that lie in `[start, stop)`, if there are any."""
    low, high = max(shape.token_range[0], start), min(shape.token_range[1], stop)
    return (low, high) if low < high else None


def part_of(layer: LayerPlan, tokens: tuple[int, int]) -> LayerPlan:
    """A layer's plan for some of its tokens."""
    tiers = {
        name: tiers_in(layer, name, (0, heads), tokens) for name, heads, _ in layer.shape.components
    }
    return LayerPlan(replace(layer.shape, token_range=tokens), tiers)


def upgrade_of(first: LayerPlan, last: LayerPlan, menu: Sequence[Tier]) -> LayerPlan | None:
    """What turns a provisional layer into a final one, in tiers of `menu`; None if nothing does.

    Raises:
        BadInput: a row that would have to be taken back, or that no upgrade makes.
    """
    names = list(first.tier_of)
    if all(np.array_equal(first.tier_of[name], last.tier_of[name]) for name in names):
        return None
    if tuple(menu[-len(UPGRADES) :]) != UPGRADES:
        raise BadInput(f"a plan with upgrades has a menu that ends with {UPGRADES}, got {menu}")
    table = _table(tuple(menu))
    tiers = {name: table[first.tier_of[name], last.tier_of[name]] for name in names}
    for name, made in tiers.items():
        if (made == _NEVER).any():
            head, token = (int(i) for i in np.argwhere(made == _NEVER)[0])
            was, becomes = (menu[x.tier_of[name][head, token]].name for x in (first, last))
            raise BadInput(
                f"layer {first.shape.layer_id} component {name!r} head {head} token "
                f"{first.shape.token_range[0] + token}: no upgrade turns {was} into {becomes}"
            )
    return LayerPlan(first.shape, tiers)


def _table(menu: tuple[Tier, ...]) -> TierArray:
    """`[provisional, final]` -> the upgrade tier, by index."""
    keep, refine, becomes_native = range(len(menu) - len(UPGRADES), len(menu))
    table = np.full((len(menu), len(menu)), _NEVER, np.uint8)
    for i, first in enumerate(menu[:keep]):
        for j, last in enumerate(menu[:keep]):
            if i == j:
                table[i, j] = keep
            elif first.codec in EMBEDDED and last.codec == NATIVE_CODEC:
                table[i, j] = becomes_native
            elif first.codec in EMBEDDED and (first.bits, last.bits) == (4, 8):
                table[i, j] = refine
    return table
