"""The codec against a transcription of docs/format.md in scalar Python, and its bounds."""

import math
import struct
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from strategies import DROP, INT4, INT8, NATIVE, same_bits

from kvprism.codec.reference import decode_into, encode_into, nested_scale, quantisable
from kvprism.core import MENU, PUBLISHED_MENU, Tier
from kvprism.errors import CodecError
from kvprism.layout import Plane, TierArray, plane_nbytes
from kvprism.tensors import DTYPE_NAMES, DTYPES

F16 = np.float16
F32 = np.float32
LARGEST_SCALE = 65504.0
# Half a unit in the last place, relative, and half the smallest step, absolute.
ROUNDING = {
    torch.bfloat16: (2.0**-8, 2.0**-134),
    torch.float16: (2.0**-11, 2.0**-25),
    torch.float32: (2.0**-24, 2.0**-150),
}


def scale_rounded_up(absmax: np.float32) -> np.float16:
    quotient = absmax / F32(119)
    scale = F16(quotient)
    return scale if F32(scale) >= quotient else np.nextafter(scale, F16(math.inf))


def code_of(value: np.float32, scale: np.float16) -> int:
    if scale == 0:
        return 0
    return round(float(value * (F32(1) / F32(scale))))  # Python rounds halves to even


def nibbles(values: Sequence[int]) -> bytes:
    half = len(values) // 2
    return bytes((values[i] & 15) | (values[i + half] & 15) << 4 for i in range(half))


def slow_planes(x: torch.Tensor, tier_of: TierArray, menu: Sequence[Tier]) -> dict[int, bytes]:
    planes: dict[int, bytes] = {}

    def append(plane: int, data: bytes) -> None:
        planes[plane] = planes.get(plane, b"") + data

    for head in range(x.shape[0]):
        for token in range(x.shape[1]):
            tier, row = menu[tier_of[head, token]], x[head, token]
            values = [F32(value) for value in row.float().tolist()]
            absmax = max(abs(value) for value in values)
            if tier.codec == "kvp.native/1":
                append(0, native_bytes(row))
            elif tier.codec == "kvp.nested/1":
                scale = scale_rounded_up(absmax)
                biased = [code_of(value, scale) + 8 for value in values]
                append(1, struct.pack("<e", scale))
                append(2, nibbles([u // 16 for u in biased]))
                if tier.bits == 8:
                    append(3, nibbles([u % 16 for u in biased]))
            elif tier.codec == "kvp.absmax/1":
                levels = 127 if tier.bits == 8 else 7
                scale = published_scale(absmax, levels)
                codes = [max(-levels, min(levels, code_of(value, scale))) for value in values]
                append(1, struct.pack("<e", scale))
                if tier.bits == 8:
                    append(4, struct.pack(f"<{len(codes)}b", *codes))
                else:
                    append(2, nibbles(codes))
    return planes


def published_scale(absmax: np.float32, levels: int) -> np.float16:
    scale = F16(absmax / F32(levels))
    return F16(2.0**-24) if scale == 0 and absmax > 0 else scale


def native_bytes(row: torch.Tensor) -> bytes:
    if row.dtype == torch.float32:
        return struct.pack(f"<{len(row)}f", *row.tolist())
    return struct.pack(f"<{len(row)}h", *row.view(torch.int16).tolist())


def slow_decoded(
    planes: dict[int, bytes], tier_of: TierArray, menu: Sequence[Tier], channels: int, dtype: Any
) -> torch.Tensor:
    """float32 values, rounded to `dtype` at the end; dropped rows are zero."""
    at = dict.fromkeys(range(5), 0)

    def take(plane: int, nbytes: int) -> bytes:
        data = planes[plane][at[plane] : at[plane] + nbytes]
        at[plane] += nbytes
        return data

    def signed(nibble: int) -> int:
        return nibble - 16 if nibble > 7 else nibble

    def split(data: bytes) -> list[int]:
        return [byte & 15 for byte in data] + [byte >> 4 for byte in data]

    itemsize = torch.empty(0, dtype=dtype).element_size()
    out = torch.zeros(*tier_of.shape, channels, dtype=dtype)
    for head, token in np.ndindex(*tier_of.shape):
        tier = menu[int(tier_of[head, token])]
        if tier.bits == 0:
            continue
        if tier.bits == 16:
            data = bytearray(take(0, channels * itemsize))
            out[head, token] = torch.frombuffer(data, dtype=dtype)
            continue
        scale = F32(struct.unpack("<e", take(1, 2))[0])
        if tier.codec == "kvp.absmax/1" and tier.bits == 8:
            codes = [float(q) for q in struct.unpack(f"<{channels}b", take(4, channels))]
        else:
            anchors = [signed(a) for a in split(take(2, channels // 2))]
            codes = [float(a) for a in anchors]
            if tier.codec == "kvp.nested/1" and tier.bits == 8:
                residuals = split(take(3, channels // 2))
                codes = [16.0 * a + r - 8 for a, r in zip(anchors, residuals, strict=True)]
            elif tier.codec == "kvp.nested/1":
                codes = [16.0 * a - 0.5 for a in anchors]
        values = torch.tensor([float(F32(code) * scale) for code in codes], dtype=torch.float32)
        out[head, token] = values.to(dtype)
    return out


def encoded(x: torch.Tensor, tier_of: TierArray, menu: Sequence[Tier]) -> dict[Plane, memoryview]:
    sizes = plane_nbytes(tier_of, menu, x.shape[-1], x.element_size())
    planes = {plane: memoryview(bytearray(size)) for plane, size in sizes.items()}
    encode_into(x, tier_of, menu, planes)
    return planes


def restored(x: torch.Tensor, tier: int, menu: Sequence[Tier] = MENU) -> torch.Tensor:
    tier_of = np.full(x.shape[:2], tier, np.uint8)
    out = torch.zeros(x.shape, dtype=x.dtype)
    decode_into(encoded(x, tier_of, menu), tier_of, menu, out)
    return out


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_zero_rows(x: torch.Tensor) -> torch.Tensor:
    x[0, ::2] = 0
    return x


def with_an_outlier(x: torch.Tensor) -> torch.Tensor:
    x[..., 1] = 3000.0
    return x


def halves() -> torch.Tensor:
    """Values that stand exactly between two codes: s = 1."""
    x = torch.arange(-118.5, 119.5, 1.0)[:236].reshape(1, 1, -1).clone()
    x[0, 0, 0] = 119.0
    return x


CASES = {
    "normal": normal(2, 5, 8),
    "one value": normal(1, 1, 2, seed=1),
    "odd": normal(3, 7, 6, seed=2),
    "zero rows": with_zero_rows(normal(2, 4, 10, seed=3)),
    "all zero": torch.zeros(2, 3, 4),
    "denormal": normal(2, 3, 4, seed=4) * 1e-39,
    "below the smallest scale": normal(2, 3, 4, seed=5) * 1e-7,
    "denormal scales": normal(2, 3, 8, seed=6) * 1e-4,
    "huge": normal(2, 3, 8, seed=7).clamp(-3, 3) * 2e4,
    "outlier channel": with_an_outlier(normal(2, 6, 8, seed=8)),
    "halves": halves(),
    "negative zero": -torch.zeros(1, 2, 4),
}


def mixed_tiers(shape: torch.Size, menu: Sequence[Tier]) -> TierArray:
    n = shape[0] * shape[1]
    return (np.arange(n, dtype=np.uint8) * 3 % len(menu)).reshape(shape[0], shape[1])


@pytest.mark.parametrize("menu", [MENU, PUBLISHED_MENU], ids=["nested", "published"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tier", [NATIVE, INT8, INT4, None])
def test_bytes_and_values_are_those_of_the_slow_transcription(
    menu: Sequence[Tier], dtype: str, case: str, tier: int | None
) -> None:
    x = CASES[case].to(DTYPES[dtype])
    tier_of = mixed_tiers(x.shape, menu)
    if tier is not None:
        tier_of = np.full(x.shape[:2], tier, np.uint8)
    planes = encoded(x, tier_of, menu)
    expected = slow_planes(x, tier_of, menu)
    assert {int(plane): bytes(data) for plane, data in planes.items()} == expected
    out = torch.zeros(x.shape, dtype=x.dtype)
    decode_into(planes, tier_of, menu, out)
    assert same_bits(out, slow_decoded(expected, tier_of, menu, x.shape[-1], x.dtype))


def rounding(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    relative, absolute = ROUNDING[dtype]
    return value.abs() * relative + absolute


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPE_NAMES.values())
@pytest.mark.parametrize("tier, steps", [(INT8, 0.5), (INT4, 8.0)])
@pytest.mark.parametrize("magnitude", [1e-7, 1e-3, 1.0, 500.0])
def test_the_nested_code_errs_by_at_most_its_bound(
    dtype: torch.dtype, tier: int, steps: float, magnitude: float
) -> None:
    x = (normal(4, 40, 16) * magnitude).to(dtype)
    scale = nested_scale(x.float().abs().amax(dim=-1, keepdim=True)).double()
    # The reciprocal and the product are rounded to float32 each: 119 codes by 2^-23.
    bound = scale * (steps + 119 * 2**-23)
    error = (restored(x, tier).double() - x.double()).abs()
    assert (error <= bound + rounding(x.double().abs() + bound, dtype)).all()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPE_NAMES.values())
@pytest.mark.parametrize("tier, levels", [(INT8, 127), (INT4, 7)])
@pytest.mark.parametrize("magnitude", [1e-7, 1e-3, 1.0, 500.0])
def test_the_published_code_errs_by_at_most_its_bound(
    dtype: torch.dtype, tier: int, levels: int, magnitude: float
) -> None:
    x = (normal(4, 40, 16) * magnitude).to(dtype)
    exact = x.double().abs().amax(dim=-1, keepdim=True) / levels
    scale = exact.half().double().clamp_min(2.0**-24)
    # Rounded to nearest, the scale may be too small by half a float16 step: the clamp loses that.
    half_step = torch.maximum(exact * 2**-11, torch.tensor(2.0**-25))
    bound = scale * (0.5 + levels * 2**-23) + levels * half_step
    error = (restored(x, tier, PUBLISHED_MENU).double() - x.double()).abs()
    assert (error <= bound + rounding(x.double().abs() + bound, dtype)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_nested_scale_is_the_smallest_float16_that_is_not_below(dtype: torch.dtype) -> None:
    x = torch.cat([normal(2000).abs() * 10.0**exponent for exponent in range(-8, 5)]).to(dtype)
    scales = nested_scale(x.float()).tolist()
    for absmax, scale in zip(x.tolist(), scales, strict=True):
        below = float(np.nextafter(F16(scale), F16(-1)))
        assert Fraction(below) < Fraction(absmax) / 119 <= Fraction(scale) or absmax == scale == 0


def test_the_four_bit_code_is_unbiased_over_uniform_codes() -> None:
    codes = torch.arange(-104.0, 120.0)  # fourteen whole anchors; the largest is 119, so s = 1
    x = codes.reshape(1, 1, -1)
    out = restored(x, INT4)
    assert float((out - x).sum()) == 0.0
    assert float((out - x).abs().max()) == 7.5


def test_the_four_bit_code_has_a_zero_level_within_half_a_code() -> None:
    x = torch.tensor([[[119.0, 0.0, 0.4, -0.4]]])
    assert restored(x, INT4)[0, 0, 1:].tolist() == [-0.5, -0.5, -0.5]


def test_the_four_bit_planes_are_a_part_of_the_eight_bit_planes() -> None:
    x = normal(2, 5, 8)
    eight = encoded(x, np.full((2, 5), INT8, np.uint8), MENU)
    four = encoded(x, np.full((2, 5), INT4, np.uint8), MENU)
    assert list(four) == [Plane.SCALE, Plane.ANCHOR]
    assert all(bytes(four[plane]) == bytes(eight[plane]) for plane in four)


@pytest.mark.parametrize("bits_of", [INT8, INT4])
@pytest.mark.parametrize("menu", [MENU, PUBLISHED_MENU], ids=["nested", "published"])
def test_an_all_zero_row_stays_zero(bits_of: int, menu: Sequence[Tier]) -> None:
    assert not restored(torch.zeros(1, 2, 4), bits_of, menu).any()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPE_NAMES.values())
@pytest.mark.parametrize("menu", [MENU, PUBLISHED_MENU], ids=["nested", "published"])
@pytest.mark.parametrize("tier", [INT8, INT4])
def test_whatever_may_be_quantised_comes_back_finite(
    dtype: torch.dtype, menu: Sequence[Tier], tier: int
) -> None:
    largest = torch.finfo(dtype).max
    x = torch.full((1, 40, 4), largest, dtype=dtype)
    x *= torch.linspace(1.0, 0.9, 40, dtype=dtype)[:, None]
    x = torch.cat([x, torch.full((1, 1, 4), LARGEST_SCALE, dtype=dtype)], dim=1)
    fits = torch.from_numpy(quantisable(x, menu))
    assert restored(x[fits][None], tier, menu).isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPE_NAMES.values())
def test_a_row_that_holds_no_number_may_not_be_quantised(dtype: torch.dtype) -> None:
    values = [math.inf, -math.inf, math.nan, -math.nan, -0.0, -1.0]
    x = torch.full((1, 4, len(values)), -2.0, dtype=dtype)
    x[0, 1] = torch.tensor(values, dtype=dtype)
    rows = x.transpose(1, 2)  # a view, one value in four
    assert quantisable(rows, MENU).tolist() == [[*[False] * 4, True, True]]


@pytest.mark.parametrize("menu, levels", [(MENU, 119), (PUBLISHED_MENU, 7)])
def test_a_row_may_be_quantised_up_to_the_largest_float16_scale(
    menu: Sequence[Tier], levels: int
) -> None:
    largest = np.float32(levels * LARGEST_SCALE)
    beyond = np.nextafter(largest, np.float32(math.inf)) * np.float32(1 + 2.0**-20)
    values = [largest, -largest, beyond, -beyond, math.inf, -math.inf, math.nan, 0.0]
    x = torch.tensor(values)[None, :, None].repeat(1, 1, 4)
    assert quantisable(x, menu).tolist() == [[True, True, *[False] * 5, True]]


@pytest.mark.parametrize("value", [math.nan, math.inf, 119 * 65504 * 1.01])
@pytest.mark.parametrize("tier", [INT8, INT4])
def test_a_value_that_no_code_holds_is_refused_by_name(value: float, tier: int) -> None:
    x = normal(3, 4, 8)
    x[2, 1, 5] = value
    tier_of = np.full((3, 4), tier, np.uint8)
    with pytest.raises(CodecError, match=f"head 2 token 1 .*{MENU[tier].name!r}.*native"):
        encoded(x, tier_of, MENU)
    tier_of[2, 1] = NATIVE
    encoded(x, tier_of, MENU)


@pytest.mark.parametrize("scale", [-1.0, math.nan, math.inf])
def test_a_scale_that_no_encoder_writes_is_refused(scale: float) -> None:
    tier_of = np.full((1, 1), INT4, np.uint8)
    planes = {
        Plane.SCALE: memoryview(struct.pack("<e", scale)),
        Plane.ANCHOR: memoryview(b"\x11\x22"),
    }
    with pytest.raises(CodecError, match="scale is negative or not finite"):
        decode_into(planes, tier_of, MENU, torch.zeros(1, 1, 4))


def test_rows_of_dropped_tokens_are_left_as_they_are() -> None:
    x = normal(2, 3, 4)
    tier_of = np.array([[NATIVE, DROP, INT8], [INT4, DROP, NATIVE]], np.uint8)
    out = torch.full_like(x, 7.0)
    decode_into(encoded(x, tier_of, MENU), tier_of, MENU, out)
    assert (out[:, 1] == 7.0).all() and not (out[:, [0, 2]] == 7.0).any()


def test_strides_and_gradients_do_not_matter() -> None:
    x = normal(4, 6, 3).permute(2, 1, 0)
    tier_of = mixed_tiers(x.shape, MENU)
    expected = encoded(x.contiguous(), tier_of, MENU)
    assert encoded(x.requires_grad_(), tier_of, MENU) == expected
