"""What the tests of the C kernels share: planes to write into, and when they are skipped."""

from collections.abc import Sequence

import pytest
import torch

from kvprism.codec import cpu
from kvprism.core import KEYS, Tier
from kvprism.layout import Plane, TierArray, plane_nbytes

COMPILED = [
    pytest.mark.skipif(
        not cpu.LIBRARY.exists(), reason="the C kernels were not compiled (scripts/build-codec)"
    ),
    pytest.mark.usefixtures("blocks_of_any_size_are_shared"),
]
PREFIX = 3  # bytes before a plane, so that none is aligned

Planes = dict[Plane, memoryview]


def buffers(
    tier_of: TierArray, menu: Sequence[Tier], x: torch.Tensor, component: str = KEYS
) -> Planes:
    sizes = plane_nbytes(tier_of, menu, x.shape[-1], x.element_size(), component)
    return {
        p: memoryview(bytearray(b"\xaa" * (size + PREFIX)))[PREFIX:] for p, size in sizes.items()
    }


def as_bytes(planes: Planes) -> dict[Plane, bytes]:
    return {plane: bytes(data) for plane, data in planes.items()}
