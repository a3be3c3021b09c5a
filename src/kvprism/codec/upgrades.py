"""Upgrades of rows that came before in four bits: what is made of them, and kept for them.

The residuals alone turn a row of 4 bits into one of 8 (`docs/format.md`, 6.2). An encoder makes
them as it makes the whole row, and lets go of the scale and the anchors; a decoder has kept those.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from kvprism.core import EMBEDDED, UPGRADE_CODEC, Tier
from kvprism.errors import ProtocolViolation
from kvprism.layout import Plane, TierArray, rows_in
from kvprism.wire.messages import Block

Area = tuple[slice, slice]  # heads, tokens
_MISSING, _UPGRADED = 255, 254


def with_room(
    planes: Mapping[Plane, memoryview], tiers: TierArray, menu: Sequence[Tier], channels: int
) -> dict[Plane, memoryview]:
    """The planes of an upgrade, and room for the scales and anchors that were sent before."""
    refined = int(rows_in(Plane.RESIDUAL, tiers, menu).sum())
    if not refined:
        return dict(planes)
    sent = {Plane.SCALE: 2 * refined, Plane.ANCHOR: channels // 2 * refined}
    return {**planes, **{plane: memoryview(bytearray(size)) for plane, size in sent.items()}}


class Base:
    """What has come of one component's rows: their tiers, and scales and anchors of those coded."""

    def __init__(self, heads: int, tokens: int, channels: int, menu: Sequence[Tier]) -> None:
        self._menu = menu
        self._tiers = np.full((heads, tokens), _MISSING, np.uint8)
        self._planes = {
            Plane.SCALE: np.zeros((heads, tokens, 2), np.uint8),
            Plane.ANCHOR: np.zeros((heads, tokens, channels // 2), np.uint8),
        }

    def add(
        self, block: Block, area: Area, tiers: TierArray, planes: Mapping[Plane, memoryview]
    ) -> None:
        """Rows have come for the first time.

        Raises:
            ProtocolViolation: not for the first time.
        """
        if (self._tiers[area] != _MISSING).any():
            raise ProtocolViolation(f"{_named(block)}: rows that came before, so pieces overlap")
        self._tiers[area] = tiers
        coded = rows_in(Plane.SCALE, tiers, self._menu)
        for plane, kept in self._planes.items():
            if plane in planes:
                kept[area][coded] = np.frombuffer(planes[plane], np.uint8).reshape(
                    -1, kept.shape[-1]
                )

    def is_complete(self, area: Area) -> bool:
        """Whether all of these rows have come."""
        return bool((self._tiers[area] != _MISSING).all())

    def upgrade(self, block: Block, area: Area, tiers: TierArray) -> dict[Plane, memoryview]:
        """Take note of an upgrade: the scales and anchors of the rows that it refines.

        Raises:
            ProtocolViolation: rows that are not in 4 bits, or were upgraded before.
        """
        upgraded = self._upgradable(tiers, self._tiers[area])
        if upgraded is None:
            raise ProtocolViolation(
                f"{_named(block)}: an upgrade of rows that cannot have it, or had one before"
            )
        refined = rows_in(Plane.RESIDUAL, tiers, self._menu)
        self._tiers[area][upgraded] = _UPGRADED
        if not refined.any():
            return {}
        return {
            plane: memoryview(kept[area][refined].tobytes()) for plane, kept in self._planes.items()
        }

    def _upgradable(self, tiers: TierArray, before: TierArray) -> NDArray[np.bool_] | None:
        """`[head, token]`: which rows become something else; None where one cannot."""
        # By index; what is no tier of the menu came from no code.
        coded = np.zeros(256, bool)
        four = np.zeros(256, bool)
        for i, tier in enumerate(self._menu):
            coded[i] = tier.codec in EMBEDDED
            four[i] = coded[i] and tier.bits == 4
        bits = np.array([t.bits if t.codec == UPGRADE_CODEC else 0 for t in self._menu])[tiers]
        fits = (bits == 0) | ((bits == 4) & four[before]) | ((bits == 16) & coded[before])
        return bits > 0 if fits.all() else None


def _named(block: Block) -> str:
    return (
        f"layer {block.layer} component {block.component!r}, heads {block.heads}, tokens "
        f"{block.tokens}"
    )
