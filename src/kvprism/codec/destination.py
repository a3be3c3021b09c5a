"""Where one layer is restored: its tensors, which rows are kept, and what upgrades will need."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from kvprism.codec.upgrades import Area, Base
from kvprism.core import LayerShape, Tier
from kvprism.errors import CodecError
from kvprism.layout import Plane, TierArray
from kvprism.tensors import DTYPES, LayerKV
from kvprism.wire.messages import Block


class LayerDestination:
    """The tensors of one layer, allocated when its first piece comes, and which rows are kept.

    ragged: whether heads may keep different tokens; staged: the menu, if rows may be upgraded;
    missing: how many rows are still to come.
    """

    def __init__(self, shape: LayerShape, ragged: bool, staged: Sequence[Tier] | None) -> None:
        self.shape, self._ragged, self._staged = shape, ragged, staged
        self._bases: dict[str, Base] = {}
        self.missing = sum(heads for _, heads, _ in shape.components) * shape.n_tokens
        self._components: dict[str, torch.Tensor] = {}
        # Ragged: component -> what is known of its rows, and which are kept, both [head, token].
        self._rows: dict[str, tuple[NDArray[np.bool_], NDArray[np.bool_]]] = {}
        self._known = self._kept = np.zeros(0, bool)

    def keep(self, block: Block, kept: NDArray[np.bool_]) -> None:
        """Take note of the kept rows `[head, token]`: in all components the same, if not more."""
        if not self._components:
            self._allocate()
        tokens = self._tokens(block)
        if self._ragged:
            self._keep_rows(block, self._area(block), kept)
            return
        known = self._known[tokens]
        if (kept != kept[:1]).any() or (known & (self._kept[tokens] != kept[0])).any():
            raise _not_uniform(block)
        self._known[tokens], self._kept[tokens] = True, kept[0]

    def _keep_rows(self, block: Block, area: Area, kept: NDArray[np.bool_]) -> None:
        own = self._rows[block.component]
        for name, (known, rows) in self._rows.items():
            if rows.shape != own[1].shape or (known[area] & (rows[area] != kept)).any():
                raise CodecError(
                    f"layer {block.layer}: components {block.component!r} and {name!r} keep "
                    "different rows; a key is of no use without its value, nor a value without it"
                )
        own[0][area], own[1][area] = True, kept

    def rows(self, block: Block) -> torch.Tensor:
        """The `[head, token, channel]` part of the destination that a block fills."""
        return self._components[block.component][self._area(block)]

    def remember(self, block: Block, tiers: TierArray, planes: dict[Plane, memoryview]) -> None:
        """What an upgrade of these rows will need."""
        if self._staged is not None:
            self._bases[block.component].add(block, self._area(block), tiers, planes)

    def kept_for(self, block: Block, tiers: TierArray) -> dict[Plane, memoryview] | None:
        """What came before of the rows of an upgrade; None while some have not come."""
        base = self._bases.get(block.component)
        if base is None or not base.is_complete(self._area(block)):
            return None
        return base.upgrade(block, self._area(block), tiers)

    def finish(self) -> LayerKV:
        rows = next(iter(self._rows.values()))[1] if self._ragged else self._kept[None]
        kept = rows.any(axis=0)
        positions = torch.from_numpy(np.flatnonzero(kept)) + self.shape.token_range[0]
        components, mask = self._components, torch.from_numpy(kept)
        if not kept.all():
            components = {name: x[:, mask] for name, x in components.items()}
        held = None if rows[:, kept].all() else torch.from_numpy(rows[:, kept])
        return LayerKV(self.shape.layer_id, components, positions, held)

    def _allocate(self) -> None:
        n, dtype = self.shape.n_tokens, DTYPES[self.shape.dtype]
        for name, heads, channels in self.shape.components:
            self._components[name] = torch.zeros(heads, n, channels, dtype=dtype)
            self._rows[name] = np.zeros((heads, n), bool), np.zeros((heads, n), bool)
            if self._staged is not None:
                self._bases[name] = Base(heads, n, channels, self._staged)
        self._known, self._kept = np.zeros(n, bool), np.zeros(n, bool)

    def _area(self, block: Block) -> Area:
        return slice(*block.heads), self._tokens(block)

    def _tokens(self, block: Block) -> slice:
        start = self.shape.token_range[0]
        return slice(block.tokens[0] - start, block.tokens[1] - start)


def _not_uniform(block: Block) -> CodecError:
    return CodecError(
        f"layer {block.layer} component {block.component!r}, heads {block.heads}, tokens "
        f"{block.tokens}: heads or components keep different tokens; this receiver holds one set "
        "of tokens per layer (capability drop=uniform); drop='per_head' holds them too, padded"
    )
