"""The nested code on a GPU: Triton kernels, bit for bit what `reference.py` does.

A launch takes every quantised row of a block: it gathers them by tier, finds the scale, quantises
and packs; or unpacks, dequantises and scatters into the destination. Layers whose tensors lie in
one allocation go in one launch, stacked along the head axis: each plane then holds theirs one after
another. Divisions are rounded (`div_rn`) and no multiplication is fused with an addition.

The only file that imports triton (extra `gpu`). Under `TRITON_INTERPRET=1` it runs on the CPU,
slowly, which is how it is tested without a GPU.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from kvprism.codec.planes import UNSOUND_SCALE
from kvprism.codec.reference import quantised_codec
from kvprism.core import NESTED_CODEC, Tier
from kvprism.errors import CodecError, Unsupported
from kvprism.layout import Plane, TierArray, planes_of

ROWS = 16  # of one program
DevicePlanes = dict[Plane, torch.Tensor]


def encode(x: torch.Tensor, tier_of: TierArray, menu: Sequence[Tier]) -> DevicePlanes:
    """`[head, token, channel]`, tiers uint8 `[head, token]` -> uint8 planes on the device of `x`.

    Raises:
        Unsupported: a menu of another code, or channels that are not next to each other.
        CodecError: a quantised tier cannot hold a row; `reference.encode_into` names which.
    """
    _check(x, menu)
    rows, half = _Rows.of(tier_of, menu, x.device), x.shape[2] // 2
    made = {
        Plane.SCALE: torch.empty(rows.n, dtype=torch.float16, device=x.device),
        Plane.ANCHOR: torch.empty(rows.n, half, dtype=torch.uint8, device=x.device),
        Plane.RESIDUAL: torch.empty(rows.n_eight, half, dtype=torch.uint8, device=x.device),
        Plane.NATIVE: x[rows.native // x.shape[1], rows.native % x.shape[1]],
    }
    unfit = torch.zeros(rows.n, dtype=torch.uint8, device=x.device)
    if rows.n:
        _encode_kernel[(triton.cdiv(rows.n, ROWS),)](
            x,
            rows.quantised,
            rows.residual_of,
            *(made[plane] for plane in (Plane.SCALE, Plane.ANCHOR, Plane.RESIDUAL)),
            unfit,
            rows.n,
            x.shape[1],
            x.stride(0),
            x.stride(1),
            half,
            **_launch(half),
        )
    if bool(unfit.any()):
        raise CodecError("a row has a value that its tier cannot hold; plan it as native")
    planes = {plane: data.view(-1).view(torch.uint8) for plane, data in made.items()}
    return {plane: planes[plane] for plane in sorted(planes) if planes[plane].numel()}


def decode(
    planes: Mapping[Plane, torch.Tensor],
    tier_of: TierArray,
    menu: Sequence[Tier],
    out: torch.Tensor,
    slots: torch.Tensor | None = None,
) -> None:
    """Restore every row that was not dropped into `out` `[head, slot, channel]`, of any strides.

    slots: int64 `[token]`, the place of each token in `out`; by default its own number. vLLM's
    pages `[block, token in block, head, channel]` are `pages.flatten(0, 1).transpose(0, 1)`, and
    its slot mapping is `slots`.

    Raises:
        Unsupported: as `encode`.
        CodecError: a scale that is negative or not finite.
    """
    _check(out, menu)
    rows, half, tokens = _Rows.of(tier_of, menu, out.device), out.shape[2] // 2, tier_of.shape[1]
    slots = torch.arange(tokens, device=out.device) if slots is None else slots
    if Plane.NATIVE in planes:
        native = planes[Plane.NATIVE].view(out.dtype).view(-1, 2 * half)
        out[rows.native // tokens, slots[rows.native % tokens]] = native
    if not rows.n:
        return
    scale = planes[Plane.SCALE].view(torch.float16)
    if not bool((scale.isfinite() & (scale >= 0)).all()):
        raise CodecError(UNSOUND_SCALE)
    _decode_kernel[(triton.cdiv(rows.n, ROWS),)](
        out,
        rows.quantised,
        rows.residual_of,
        scale,
        planes[Plane.ANCHOR],
        planes.get(Plane.RESIDUAL, planes[Plane.ANCHOR]),
        slots,
        rows.n,
        tokens,
        out.stride(0),
        out.stride(1),
        half,
        **_launch(half),
    )


def _check(x: torch.Tensor, menu: Sequence[Tier]) -> None:
    if quantised_codec(menu) != NESTED_CODEC:
        raise Unsupported(f"GPU kernels are built for {NESTED_CODEC}, not {quantised_codec(menu)}")
    if x.stride(-1) != 1:
        raise Unsupported(f"the channels of a row must lie side by side, strides {x.stride()}")


def _launch(half: int) -> dict[str, Any]:
    return {"ROWS": ROWS, "HALF": triton.next_power_of_2(half), "enable_fp_fusion": False}


@dataclass(frozen=True, eq=False)
class _Rows:
    """Which rows stand where: int64 numbers of rows, head by head, on the device.

    residual_of: the row of the residual plane of each quantised row, -1 for those of 4 bits.
    """

    native: torch.Tensor
    quantised: torch.Tensor
    residual_of: torch.Tensor
    n_eight: int

    @classmethod
    def of(cls, tier_of: TierArray, menu: Sequence[Tier], device: torch.device) -> "_Rows":
        tiers = torch.from_numpy(np.ascontiguousarray(tier_of)).to(device).view(-1).long()

        def in_plane(plane: Plane) -> torch.Tensor:
            return torch.tensor([plane in planes_of(t) for t in menu], device=device)[tiers]

        quantised = in_plane(Plane.SCALE).nonzero().view(-1)
        eight = in_plane(Plane.RESIDUAL)[quantised]
        residual_of = torch.where(eight, eight.cumsum(0) - 1, -1)
        native = in_plane(Plane.NATIVE).nonzero().view(-1)
        return cls(native, quantised, residual_of, int(eight.sum()))

    @property
    def n(self) -> int:
        """How many are quantised."""
        return len(self.quantised)


@triton.jit
def _encode_kernel(
    x,
    quantised,
    residual_of,
    scale,
    anchor,
    residual,
    unfit,
    n,
    tokens,
    head_stride,
    token_stride,
    half,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, HALF)
    there = at < n
    inside = there[:, None] & (channel < half)[None, :]
    row = tl.load(quantised + at, mask=there, other=0)
    source = x + (row // tokens * head_stride + row % tokens * token_stride)[:, None] + channel
    low = tl.load(source, mask=inside, other=0).to(tl.float32)
    high = tl.load(source + half, mask=inside, other=0).to(tl.float32)
    # Bit patterns are ordered like sizes, those of inf and NaN above all.
    sizes = tl.maximum(
        low.to(tl.int32, bitcast=True) & 0x7FFFFFFF, high.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    )
    least = tl.math.div_rn(tl.max(sizes, axis=1).to(tl.float32, bitcast=True), 119.0)
    fits = least <= 65504.0
    tl.store(unfit + at, (fits == 0).to(tl.uint8), mask=there)
    least = tl.where(fits, least, 0.0)
    nearest = least.to(tl.float16)
    above = (nearest.to(tl.float32) < least).to(tl.int16)
    rounded_up = (nearest.to(tl.int16, bitcast=True) + above).to(tl.float16, bitcast=True)
    tl.store(scale + at, rounded_up, mask=there)
    divisor = rounded_up.to(tl.float32)
    inverse = tl.where(divisor > 0, tl.math.div_rn(1.0, tl.where(divisor > 0, divisor, 1.0)), 0.0)
    # At 1.5 * 2^23 a float32 step is 1: adding it rounds, and the low byte is q + 136.
    low = tl.where(fits[:, None], low, 0.0) * inverse[:, None] + 12583048.0
    high = tl.where(fits[:, None], high, 0.0) * inverse[:, None] + 12583048.0
    low_code = low.to(tl.int32, bitcast=True) & 0xFF
    high_code = high.to(tl.int32, bitcast=True) & 0xFF
    anchors = ((low_code >> 4) | (high_code & 0xF0)) ^ 0x88
    tl.store(anchor + at[:, None] * half + channel, anchors.to(tl.uint8), mask=inside)
    residual_row = tl.load(residual_of + at, mask=there, other=-1)[:, None]
    residuals = (low_code & 15) | ((high_code & 15) << 4)
    place = residual + residual_row * half + channel
    tl.store(place, residuals.to(tl.uint8), mask=inside & (residual_row >= 0))


@triton.jit
def _narrowed(x, dtype: tl.constexpr):
    if dtype == tl.bfloat16:
        # By hand: a GPU rounds to the nearest, Triton's interpreter cuts.
        bits = x.to(tl.int32, bitcast=True)
        upper = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return upper.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def _decode_kernel(
    out,
    quantised,
    residual_of,
    scale,
    anchor,
    residual,
    slots,
    n,
    tokens,
    head_stride,
    token_stride,
    half,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, HALF)
    there = at < n
    inside = there[:, None] & (channel < half)[None, :]
    row = tl.load(quantised + at, mask=there, other=0)
    slot = tl.load(slots + row % tokens, mask=there, other=0)
    s = tl.load(scale + at, mask=there, other=0).to(tl.float32)[:, None]
    both = tl.load(anchor + at[:, None] * half + channel, mask=inside, other=0).to(tl.int32)
    residual_row = tl.load(residual_of + at, mask=there, other=-1)[:, None]
    eight = residual_row >= 0
    place = residual + residual_row * half + channel
    rest = tl.load(place, mask=inside & eight, other=0).to(tl.int32)
    both = both ^ 0x88
    low = ((both & 15) - 8).to(tl.float32) * 16 + tl.where(eight, (rest & 15) - 8.0, -0.5)
    high = ((both >> 4) - 8).to(tl.float32) * 16 + tl.where(eight, (rest >> 4) - 8.0, -0.5)
    target = out + (row // tokens * head_stride + slot * token_stride)[:, None] + channel
    tl.store(target, _narrowed(low * s, out.dtype.element_ty), mask=inside)
    tl.store(target + half, _narrowed(high * s, out.dtype.element_ty), mask=inside)
