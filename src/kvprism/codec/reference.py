"""The definition of the codes, in plain torch; every faster backend matches it bit for bit.

`kvp.nested/1` (docs/format.md, "Planes of the codecs"), per (head, token) row x of a component:
1. s = absmax(x) / 119 in float32, rounded *up* to float16; 0 only for an all-zero row.
2. q = round_half_even(float32(x * (1 / s))) in [-119, 119].
3. u = q + 8; anchor a = u >> 4 in [-7, 7], residual r = u & 15.
4. INT8 decodes to q * s = (16 a + r - 8) * s, INT4 to (16 a - 1/2) * s, the mean over r.

`kvp.conditioned/1` is the same code, but step 1 takes keys as `condition` leaves them, and what
step 4 gives is put back by `restore`, before it is rounded to the cache's dtype.

`kvp.absmax/1` is the papers' code (SpectrumKV section 3: scale = absmax / qmax, qmax 127 or 7).
What others send stands in `affine.py` and `fp8.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kvprism.codec import affine
from kvprism.codec.affine import Affine
from kvprism.codec.condition import condition, restore
from kvprism.codec.fp8 import Fp8
from kvprism.codec.planes import (
    FLOAT16_MAX,
    inverse_of,
    pack_nibbles,
    read,
    read_scales,
    round_up,
    unpack_nibbles,
    write,
)
from kvprism.core import ABSMAX_CODEC, DROP_CODEC, FP8_CODEC, KEYS, NATIVE_CODEC, Tier
from kvprism.errors import CodecError
from kvprism.layout import Plane, TierArray, rows_in
from kvprism.tensors import KeyConditioning

NESTED_LEVELS = 119
ABSMAX_LEVELS = {8: 127, 4: 7}
_ANCHOR_SHIFT, _RESIDUAL_MASK, _BIAS = 4, 15, 8


@dataclass(frozen=True, eq=False)
class Conditioned:
    """The key conditioning of one block: of its heads, at its tokens' int64 `[token]` positions."""

    conditioning: KeyConditioning
    positions: torch.Tensor

    def condition(self, x: torch.Tensor) -> torch.Tensor:
        """`[head, token, channel]` keys -> what is quantised, float32."""
        return condition(x, self.positions, self.conditioning)

    def restore(self, x: torch.Tensor) -> torch.Tensor:
        """What was dequantised -> `[head, token, channel]` keys, float32."""
        return restore(x, self.positions, self.conditioning)

    def come_back(self, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """bool `[head, token]`: rows of these scales that are within `dtype` when restored."""
        # float32 rounding, far below 2^-16 of the largest value on the way back.
        largest = self._largest_restored(NESTED_LEVELS * scale.double()) * (1 + 2**-16)
        return largest <= torch.finfo(dtype).max

    def _largest_restored(self, absmax: torch.Tensor) -> torch.Tensor:
        """float64 `[head, token]`: no restored value exceeds it when no dequantised one `absmax`.

        A rotation may gather a row in one channel, sqrt(channels) times as large; RoPE may gather a
        pair in one of its channels, sqrt(2) times as large.
        """
        given = self.conditioning
        gathered = given.offset.shape[-1] ** 0.5 if given.rotate else 1.0
        scale, offset = (x.double().abs().amax(dim=-1) for x in (given.scale, given.offset))
        return 2**0.5 * (absmax * gathered * scale[:, None] + offset[:, None])


def quantisable(
    x: torch.Tensor, menu: Sequence[Tier], conditioned: Conditioned | None = None
) -> NDArray[np.bool_]:
    """`[head, token]`: rows that a quantised tier may hold.

    What is quantised is finite, its scale is within float16, and what is restored is within the
    dtype of `x`; conditioned: how the rows are conditioned before they are quantised, if they are.
    """
    quantised = x if conditioned is None else conditioned.condition(x.cpu())
    return _fits(quantised, x.dtype, menu, conditioned)


def _fits(
    quantised: torch.Tensor,
    dtype: torch.dtype,
    menu: Sequence[Tier],
    conditioned: Conditioned | None,
) -> NDArray[np.bool_]:
    """`quantisable` of rows that are conditioned already; dtype: the cache's."""
    largest = torch.finfo(dtype).max
    absmax = _absmax(quantised).float().cpu()
    other = _other(menu)
    if other is not None:
        fits = other.fits(absmax, quantised.shape[-1], dtype)
    elif quantised_codec(menu) != ABSMAX_CODEC:
        fits = absmax / NESTED_LEVELS <= FLOAT16_MAX
        if conditioned is not None:
            fits &= conditioned.come_back(nested_scale(absmax), dtype)
    else:
        # A scale rounded to nearest may be half a float16 ulp more: 65504 would come back infinite.
        fits = (absmax / ABSMAX_LEVELS[4] <= FLOAT16_MAX) & (absmax * (1 + 2**-11) <= largest)
    result: NDArray[np.bool_] = fits.numpy()
    return result


def _absmax(x: torch.Tensor) -> torch.Tensor:
    """max|x| of every row; NaN where a row holds one."""
    if x.dtype.itemsize != 2:
        return x.abs().amax(dim=-1)
    # Bit patterns without their sign are ordered like sizes, NaN last, and torch reduces integers
    # three times as fast as 16-bit floats.
    return (x.view(torch.int16) & 0x7FFF).amax(dim=-1).view(x.dtype)


def encode_into(
    x: torch.Tensor,
    tier_of: TierArray,
    menu: Sequence[Tier],
    planes: Mapping[Plane, memoryview],
    first: tuple[int, int] = (0, 0),
    conditioned: Conditioned | None = None,
    component: str = KEYS,
) -> None:
    """Write every plane of one block.

    x: `[head, token, channel]`; tier_of: uint8 `[head, token]`; planes: writable buffers of exactly
    the sizes that `layout.plane_nbytes` gives; first: the numbers of the first head and token, for
    errors; conditioned: how quantised rows are conditioned, if they are; component: the block's,
    since `kvp.kivi/1` cuts keys in another way.

    Raises:
        CodecError: a non-finite value or a scale beyond float16 in a quantised tier.
    """
    x = x.cpu()
    rows = x.reshape(-1, x.shape[-1])
    if Plane.NATIVE in planes:
        write(planes[Plane.NATIVE], rows[_rows(Plane.NATIVE, tier_of, menu)])
    if Plane.SCALE not in planes:
        return
    quantised = x if conditioned is None else conditioned.condition(x)
    _refuse(~_fits(quantised, x.dtype, menu, conditioned), tier_of, menu, first)
    rows = quantised.reshape(rows.shape)
    chosen = _rows(Plane.SCALE, tier_of, menu)
    bits, values = _bits(tier_of, menu)[chosen], rows[chosen].float()
    other = _other(menu, component)
    if other is not None:
        other.encode(values, bits, _per_head(tier_of, menu), planes)
    elif quantised_codec(menu) == ABSMAX_CODEC:
        _encode_absmax(values, bits, planes)
    else:
        _encode_nested(values, bits, planes)


def decode_into(
    planes: Mapping[Plane, memoryview],
    tier_of: TierArray,
    menu: Sequence[Tier],
    out: torch.Tensor,
    conditioned: Conditioned | None = None,
    component: str = KEYS,
) -> None:
    """Restore every row of one block that was not dropped into `out` `[head, token, channel]`.

    Rows of dropped tokens are left as they are. conditioned, component: as in `encode_into`.

    Raises:
        CodecError: a scale that is negative or not finite, or a restored value that is not finite.
    """
    rows = out.view(-1, out.shape[-1])
    channels = out.shape[-1]
    if Plane.NATIVE in planes:
        native = read(planes[Plane.NATIVE], out.dtype).view(-1, channels)
        rows[_rows(Plane.NATIVE, tier_of, menu)] = native
    if Plane.SCALE not in planes:
        return
    chosen = _rows(Plane.SCALE, tier_of, menu)
    bits = _bits(tier_of, menu)[chosen]
    other = _other(menu, component)
    if other is not None:
        values = other.decode(planes, bits, _per_head(tier_of, menu), channels)
        _require_within(values, out.dtype, "a restored value")
    else:
        decode = _decode_absmax if quantised_codec(menu) == ABSMAX_CODEC else _decode_nested
        values = decode(planes, bits, channels) * read_scales(planes)[:, None]
    if conditioned is not None:
        values = _restored(values, chosen, out, conditioned)
    rows[chosen] = values.to(out.dtype)


def _restored(
    values: torch.Tensor, chosen: torch.Tensor, out: torch.Tensor, conditioned: Conditioned
) -> torch.Tensor:
    """Dequantised rows, those of `chosen`, back as keys."""
    block = torch.zeros(len(chosen), values.shape[-1])
    block[chosen] = values
    rows = conditioned.restore(block.view(out.shape)).view(block.shape)[chosen]
    _require_within(rows, out.dtype, "a restored key", " with this profile")
    return rows


def _require_within(rows: torch.Tensor, dtype: torch.dtype, what: str, given: str = "") -> None:
    if not bool((rows.abs() <= torch.finfo(dtype).max).all()):
        raise CodecError(f"{what} is beyond {dtype}: the planes were not made by this codec{given}")


def _other(menu: Sequence[Tier], component: str = KEYS) -> Affine | Fp8 | None:
    """The code of a menu that is for comparison alone, if it is one."""
    codec = quantised_codec(menu)
    if codec == FP8_CODEC:
        return Fp8()
    return Affine.of(codec, component) if codec in affine.CODECS else None


def _per_head(tier_of: TierArray, menu: Sequence[Tier]) -> list[int]:
    """How many quantised rows each head has."""
    counts: list[int] = rows_in(Plane.SCALE, tier_of, menu).sum(axis=1).tolist()
    return counts


def quantised_codec(menu: Sequence[Tier]) -> str:
    """The one quantised codec of a menu."""
    return next(t.codec for t in menu if t.codec not in (NATIVE_CODEC, DROP_CODEC))


def nested_scale(absmax: torch.Tensor) -> torch.Tensor:
    """float32 absmax -> float16 absmax / 119, rounded up: every code stays in [-119, 119]."""
    return round_up(absmax / NESTED_LEVELS)


def nested_codes(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """float32 rows and their float16 scales -> integer codes in [-119, 119]."""
    inverse = inverse_of(scale)
    return torch.round(x * inverse[:, None]).to(torch.int16)


def _encode_nested(x: torch.Tensor, bits: torch.Tensor, planes: Mapping[Plane, memoryview]) -> None:
    scale = nested_scale(x.abs().amax(dim=-1))
    biased = nested_codes(x, scale) + _BIAS
    write(planes[Plane.SCALE], scale)
    write(planes[Plane.ANCHOR], pack_nibbles(biased >> _ANCHOR_SHIFT))
    if Plane.RESIDUAL in planes:
        write(planes[Plane.RESIDUAL], pack_nibbles(biased[bits == 8] & _RESIDUAL_MASK))


def _decode_nested(
    planes: Mapping[Plane, memoryview], bits: torch.Tensor, channels: int
) -> torch.Tensor:
    anchor = unpack_nibbles(read(planes[Plane.ANCHOR], torch.uint8).view(-1, channels // 2))
    codes = _signed(anchor).float() * 16 - 0.5
    if Plane.RESIDUAL in planes:
        residual = unpack_nibbles(read(planes[Plane.RESIDUAL], torch.uint8).view(-1, channels // 2))
        codes[bits == 8] += residual.float() - (_BIAS - 0.5)
    return codes


def _encode_absmax(x: torch.Tensor, bits: torch.Tensor, planes: Mapping[Plane, memoryview]) -> None:
    levels = torch.where(bits == 8, float(ABSMAX_LEVELS[8]), float(ABSMAX_LEVELS[4]))
    scale = (x.abs().amax(dim=-1) / levels).to(torch.float16)
    # A float16 scale rounded to zero would lose a non-zero row: the smallest positive one keeps it.
    scale = torch.where((scale == 0) & (x != 0).any(dim=-1), 2.0**-24, scale.float()).half()
    inverse = inverse_of(scale)
    codes = torch.round(x * inverse[:, None]).clamp(-levels[:, None], levels[:, None])
    codes = codes.to(torch.int8)
    write(planes[Plane.SCALE], scale)
    if Plane.ANCHOR in planes:
        write(planes[Plane.ANCHOR], pack_nibbles(codes[bits == 4]))
    if Plane.BYTE in planes:
        write(planes[Plane.BYTE], codes[bits == 8])


def _decode_absmax(
    planes: Mapping[Plane, memoryview], bits: torch.Tensor, channels: int
) -> torch.Tensor:
    codes = torch.empty(len(bits), channels)
    if Plane.ANCHOR in planes:
        anchor = read(planes[Plane.ANCHOR], torch.uint8).view(-1, channels // 2)
        codes[bits == 4] = _signed(unpack_nibbles(anchor)).float()
    if Plane.BYTE in planes:
        codes[bits == 8] = read(planes[Plane.BYTE], torch.int8).view(-1, channels).float()
    return codes


def _signed(nibble: torch.Tensor) -> torch.Tensor:
    return (nibble ^ 8) - 8


def _rows(plane: Plane, tier_of: TierArray, menu: Sequence[Tier]) -> torch.Tensor:
    return torch.from_numpy(rows_in(plane, tier_of, menu).reshape(-1))


def _bits(tier_of: TierArray, menu: Sequence[Tier]) -> torch.Tensor:
    return torch.from_numpy(np.array([tier.bits for tier in menu], np.uint8)[tier_of].reshape(-1))


def _refuse(
    unfit: NDArray[np.bool_], tier_of: TierArray, menu: Sequence[Tier], first: tuple[int, int]
) -> None:
    bad = rows_in(Plane.SCALE, tier_of, menu) & unfit
    if bad.any():
        head, token = np.argwhere(bad)[0]
        tier = menu[tier_of[head, token]]
        raise CodecError(
            f"head {first[0] + head} token {first[1] + token} has a value that tier {tier.name!r} "
            "cannot hold (not finite, or a scale beyond float16); plan it as native"
        )
