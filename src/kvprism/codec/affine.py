"""What others send at 4 and 8 bits, for comparison: a scale and an offset for each group of values.

- `kvp.affine/1`: a group is a row, a token of one head.
- `kvp.affine-hadamard/1`: the same of rows that a Walsh-Hadamard transform has mixed, as vLLM's
  `int4_per_token_head` does.
- `kvp.affine-g32/1`: a group is 32 neighbouring channels of a row.
- `kvp.kivi/1`: KIVI (Liu et al. 2024, arXiv 2402.02750, section 3.2): of keys 32 neighbouring
  tokens of one channel, of values 32 channels of a row.

Per group of values x, with n = 15 or 255 levels above the lowest, in float32:
1. low = min(x), -0 as 0, rounded *down* to float16; s = (max(x) - low) / n, rounded *up* to it.
2. q = round_half_even((x - low) * (1 / s)) in [0, n]; q = 0 where s = 0.
3. q decodes to q * s + low, with two roundings.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from kvprism.codec.condition import hadamard
from kvprism.codec.planes import (
    FLOAT16_MAX,
    inverse_of,
    pack_nibbles,
    read,
    round_up,
    unpack_nibbles,
    write,
)
from kvprism.core import AFFINE_CODEC, GROUPED_CODEC, HADAMARD_CODEC, KIVI_CODEC
from kvprism.errors import CodecError
from kvprism.layout import Plane, Scales, scales_of

CODECS = (AFFINE_CODEC, HADAMARD_CODEC, GROUPED_CODEC, KIVI_CODEC)
UNSOUND_NUMBER = (
    "a scale is negative or a number is not finite: the planes were not made by this codec"
)


@dataclass(frozen=True)
class Affine:
    """One of these codes for one component.

    rows: float32 `[row, channel]`, the quantised rows in (head, token) order; per_head: how many
    belong to each head; bits: uint8 `[row]`, 4 or 8.
    """

    scales: Scales
    rotate: bool

    @classmethod
    def of(cls, codec: str, component: str) -> "Affine":
        """The code that `codec` stands for in this component."""
        return cls(scales_of(codec, component), codec == HADAMARD_CODEC)

    def fits(self, absmax: torch.Tensor, channels: int, dtype: torch.dtype) -> torch.Tensor:
        """Which rows have scales within float16, and come back within `dtype`.

        The transform may gather a row in one channel, sqrt(channels) times as large, and its
        errors, at most a fifteenth of that each, in one channel on the way back: together less than
        `channels` times the row's largest value. Without it, less than twice.
        """
        growth = channels if self.rotate else 2
        return absmax * growth <= min(FLOAT16_MAX, torch.finfo(dtype).max)

    def encode(
        self,
        rows: torch.Tensor,
        bits: torch.Tensor,
        per_head: Sequence[int],
        planes: Mapping[Plane, memoryview],
    ) -> None:
        """Write the scale, anchor and byte planes."""
        # Of -0 and 0, which is the least would depend on the order in which a group is looked at.
        rows = (hadamard(rows) if self.rotate else rows) + 0.0
        groups, levels = self._grouped(rows, per_head), self._grouped(_levels(bits, rows), per_head)
        low = -round_up(-groups.amin(dim=-1)).float()
        scale = round_up((groups.amax(dim=-1) - low) / levels[..., 0])
        inverse = inverse_of(scale)
        codes = torch.round((groups - low[..., None]) * inverse[..., None])
        codes = self._ungrouped(codes.minimum(levels), per_head, rows).to(torch.uint8)
        write(planes[Plane.SCALE], torch.stack([scale, low.half()], dim=-1))
        if Plane.ANCHOR in planes:
            write(planes[Plane.ANCHOR], pack_nibbles(codes[bits == 4]))
        if Plane.BYTE in planes:
            write(planes[Plane.BYTE], codes[bits == 8])

    def decode(
        self,
        planes: Mapping[Plane, memoryview],
        bits: torch.Tensor,
        per_head: Sequence[int],
        channels: int,
    ) -> torch.Tensor:
        """The restored rows, float32 `[row, channel]`.

        Raises:
            CodecError: a scale that is negative or not finite, or an offset that is not finite.
        """
        codes = torch.empty(len(bits), channels)
        if Plane.ANCHOR in planes:
            anchor = read(planes[Plane.ANCHOR], torch.uint8).view(-1, channels // 2)
            codes[bits == 4] = unpack_nibbles(anchor).float()
        if Plane.BYTE in planes:
            data = read(planes[Plane.BYTE], torch.uint8)
            codes[bits == 8] = data.view(-1, channels).float()
        groups = self._grouped(codes, per_head)
        numbers = read(planes[Plane.SCALE], torch.float16).float().view(*groups.shape[:2], 2)
        scale, low = numbers.unbind(dim=-1)
        if not bool((numbers.isfinite().all(dim=-1) & (scale >= 0)).all()):
            raise CodecError(UNSOUND_NUMBER)
        values = groups * scale[..., None] + low[..., None]
        rows = self._ungrouped(values, per_head, codes)
        return hadamard(rows) if self.rotate else rows

    def _grouped(self, rows: torch.Tensor, per_head: Sequence[int]) -> torch.Tensor:
        """`[row, channel]` -> `[..., ..., value]`: along the last axis, what shares a scale.

        Rows that share one are counted within their head; a short last group is filled with
        repetitions of its last row, which change neither minimum nor maximum.
        """
        n, channels = rows.shape
        if self.scales.tokens == 1:
            return rows.view(n, -1, self.scales.channels or channels)
        size = self.scales.tokens
        heads = [
            torch.cat([head, head[-1:].expand(-len(head) % size, -1)])
            for head in torch.split(rows, list(per_head))
        ]
        return torch.cat(heads).view(-1, size, channels).transpose(1, 2)

    def _ungrouped(
        self, groups: torch.Tensor, per_head: Sequence[int], like: torch.Tensor
    ) -> torch.Tensor:
        """What `_grouped` gave, back as rows of the shape of `like`."""
        if self.scales.tokens == 1:
            return groups.reshape(like.shape)
        padded = [n + -n % self.scales.tokens for n in per_head]
        heads = torch.split(groups.transpose(1, 2).reshape(-1, like.shape[1]), padded)
        return torch.cat([head[:n] for head, n in zip(heads, per_head, strict=True)])


def _levels(bits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """float32, the largest code of every value of these rows."""
    return torch.where(bits == 8, 255.0, 15.0)[:, None].expand_as(rows).contiguous()
