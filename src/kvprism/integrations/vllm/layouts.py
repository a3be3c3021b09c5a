"""Token-major keys and values out of vLLM's paged blocks, and back.

A layer of vLLM's cache is one tensor `[block, head, slot, 2 * channel]`; a token's slot is
`block_of[position // slots] , position % slots`. How a block is filled is the attention backend's
business, and two fillings are known here.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from kvprism.errors import ShapeMismatch, Unsupported

# Keys and values as views `[block, head, slot, channel]` of a layer's tensor.
Views = tuple[torch.Tensor, torch.Tensor]


def flash_views(kv: torch.Tensor) -> Views:
    """FlashAttention and its like since vLLM 0.28: a slot's key, then its value."""
    channels = kv.shape[-1] // 2
    return kv[..., :channels], kv[..., channels:]


def cpu_views(kv: torch.Tensor) -> Views:
    """CPU_ATTN since vLLM 0.24: a block's keys, transposed to `[channel, slot]`, then its values.

    The declared shape says otherwise: the kernel reads the block's memory anew.
    """
    blocks, heads, slots, width = kv.shape
    keys, values = kv.view(blocks, heads, 2 * slots, width // 2).chunk(2, dim=2)
    return keys.view(blocks, heads, width // 2, slots).transpose(-1, -2), values


_LAYOUTS: Mapping[tuple[str, str], Callable[[torch.Tensor], Views]] = {
    ("CPU_ATTN", "vec"): cpu_views,
    ("CPU_ATTN", "vec16"): cpu_views,
    ("FLASH_ATTN", ""): flash_views,
}


def layout_of(backend: str, instructions: str = "") -> Callable[[torch.Tensor], Views]:
    """The filling that an attention backend uses; instructions: the CPU backend's instruction set.

    Raises:
        Unsupported: no filling that was tried.
    """
    found = _LAYOUTS.get((backend, instructions))
    if found is None:
        known = ", ".join(" ".join(key).strip() for key in _LAYOUTS)
        raise Unsupported(
            f"attention backend {backend} {instructions}".rstrip()
            + f" fills its blocks in a way that was not tried; tried: {known}"
        )
    return found


@dataclass(frozen=True, eq=False)
class PagedCache:
    """All layers' blocks: layer id -> the views of its tensor.

    Raises:
        ShapeMismatch: no layer, or layers that differ in their blocks.
    """

    layers: Mapping[int, Views]

    def __post_init__(self) -> None:
        shapes = {(keys.shape[0], keys.shape[2]) for keys, _ in self.layers.values()}
        if len(shapes) != 1:
            raise ShapeMismatch(f"expected layers with the same blocks and slots, got {shapes}")

    @property
    def slots(self) -> int:
        """Tokens in a block."""
        return next(iter(self.layers.values()))[0].shape[2]

    def gather(
        self, layer: int, blocks: Sequence[int], start: int, stop: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of keys and values `[head, token, channel]` of the tokens `[start, stop)`.

        blocks: those of the whole request, in order.
        """
        where, first = self._blocks(blocks, start, stop)
        keys, values = (
            view[where].transpose(0, 1).flatten(1, 2)[:, first : first + stop - start].contiguous()
            for view in self.layers[layer]
        )
        return keys, values

    def scatter(
        self,
        layer: int,
        blocks: Sequence[int],
        start: int,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        """Write `[head, token, channel]` of the tokens from `start` on, in the cache's dtype."""
        positions = torch.arange(start, start + keys.shape[1])
        where = torch.as_tensor(blocks)[positions // self.slots]
        slot = positions % self.slots
        for view, new in zip(self.layers[layer], (keys, values), strict=True):
            view[where.to(view.device), :, slot.to(view.device)] = new.transpose(0, 1).to(
                view.device, view.dtype
            )

    def _blocks(self, blocks: Sequence[int], start: int, stop: int) -> tuple[torch.Tensor, int]:
        """The blocks that hold `[start, stop)`, and where in the first of them it starts."""
        first, last = start // self.slots, -(-stop // self.slots)
        if not 0 <= start < stop or last > len(blocks):
            raise ShapeMismatch(
                f"tokens [{start}, {stop}) do not lie in {len(blocks)} blocks of {self.slots}"
            )
        where = torch.as_tensor(blocks[first:last], device=self._device)
        return where, start - first * self.slots

    @property
    def _device(self) -> torch.device:
        return next(iter(self.layers.values()))[0].device


def layer_number(name: str) -> int:
    """The layer id in a name such as `model.layers.3.self_attn.attn`.

    Raises:
        Unsupported: none, or several numbers.
    """
    numbers = re.findall(r"(?<=\.)\d+(?=\.)", name)
    if len(numbers) != 1:
        raise Unsupported(f"attention layer {name!r}: expected one number in its name")
    return int(numbers[0])
