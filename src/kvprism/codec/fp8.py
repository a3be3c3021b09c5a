"""`kvp.fp8-e4m3/1`: 8-bit floating point as vLLM's `fp8_per_token_head` has it, for comparison.

Per row x: s = absmax(x) / 448, rounded up to float16; a byte is x * (1 / s), in float32, rounded to
the nearest e4m3 number; it decodes to that number times s.
"""

from collections.abc import Mapping, Sequence

import torch

from kvprism.codec.planes import FLOAT16_MAX, inverse_of, read, read_scales, round_up, write
from kvprism.layout import Plane

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max


class Fp8:
    """The code; arguments as those of `Affine`."""

    def fits(self, absmax: torch.Tensor, channels: int, dtype: torch.dtype) -> torch.Tensor:
        """Which rows have a scale within float16, and come back within `dtype`."""
        # A scale that was rounded up is at most one float16 step of 2^-10 larger.
        within = absmax * (1 + 2.0**-10) <= torch.finfo(dtype).max
        return within & (absmax / LARGEST <= FLOAT16_MAX)

    def encode(
        self,
        rows: torch.Tensor,
        bits: torch.Tensor,
        per_head: Sequence[int],
        planes: Mapping[Plane, memoryview],
    ) -> None:
        """Write the scale and byte planes."""
        scale = round_up(rows.abs().amax(dim=-1) / LARGEST)
        inverse = inverse_of(scale)
        write(planes[Plane.SCALE], scale)
        write(planes[Plane.BYTE], (rows * inverse[:, None]).to(E4M3))

    def decode(
        self,
        planes: Mapping[Plane, memoryview],
        bits: torch.Tensor,
        per_head: Sequence[int],
        channels: int,
    ) -> torch.Tensor:
        """The restored rows, float32 `[row, channel]`; `CodecError` as `read_scales`."""
        values = read(planes[Plane.BYTE], torch.uint8).view(E4M3).float()
        return values.view(-1, channels) * read_scales(planes)[:, None]
