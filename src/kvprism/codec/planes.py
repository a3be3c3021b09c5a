"""Plane bytes to tensors and back: what all codes share."""

from collections.abc import Mapping

import numpy as np
import torch

from kvprism.errors import CodecError
from kvprism.layout import Plane

FLOAT16_MAX = 65504.0
UNSOUND_SCALE = "a scale is negative or not finite: the planes were not made by this codec"


def read(buffer: memoryview, dtype: torch.dtype) -> torch.Tensor:
    """A flat copy, because torch cannot promise to leave a read-only buffer alone."""
    return torch.from_numpy(np.frombuffer(buffer, np.uint8).copy()).view(dtype)


def write(buffer: memoryview, x: torch.Tensor) -> None:
    """Fill a buffer of exactly the tensor's size."""
    np.frombuffer(buffer, np.uint8)[:] = x.contiguous().view(-1).view(torch.uint8).numpy()


def read_scales(planes: Mapping[Plane, memoryview]) -> torch.Tensor:
    """float32 `[row]`: one scale per row.

    Raises:
        CodecError: one that is negative or not finite.
    """
    scale = read(planes[Plane.SCALE], torch.float16).float()
    if not bool((torch.isfinite(scale) & (scale >= 0)).all()):
        raise CodecError(UNSOUND_SCALE)
    return scale


def round_up(x: torch.Tensor) -> torch.Tensor:
    """float32 -> the nearest float16 that is not below."""
    nearest = x.to(torch.float16)
    # Float16 bit patterns are ordered like the numbers, negative ones the other way round.
    step = torch.where(nearest >= 0, 1, -1).to(torch.int16)
    above = (nearest.view(torch.int16) + step).view(torch.float16)
    return torch.where(nearest.float() < x, above, nearest)


def inverse_of(scale: torch.Tensor) -> torch.Tensor:
    """float16 scales -> float32(1) / scale, 0 for a scale of 0."""
    return torch.where(scale > 0, 1.0 / scale.float(), 0.0)


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """`[row, channel]` -> uint8 `[row, channel // 2]`: channel i low, i + channels / 2 high."""
    low, high = codes.chunk(2, dim=-1)
    return ((low & 15) | ((high & 15) << 4)).to(torch.uint8)


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_nibbles`, int8 in [0, 15]."""
    return torch.cat([packed & 15, packed >> 4], dim=-1).to(torch.int8)
