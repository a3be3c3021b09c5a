"""The C kernels of the affine codes against the reference, bit for bit; skipped without them."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import DROP, INT4, INT8, NATIVE, same_bits

from codec.kernels import COMPILED, Planes, as_bytes, buffers
from kvprism.codec import cpu, reference
from kvprism.core import MENUS, ONE_WIDTH_MENUS
from kvprism.errors import CodecError
from kvprism.layout import Plane, TierArray
from kvprism.tensors import DTYPES

pytestmark = COMPILED

# Rows whose groups lie in one half of a row, in both and across; rows beside the vectors' lengths.
CHANNELS = {
    "grouped": [32, 64, 96, 128, 160, 256],
    "affine": [2, 6, 16, 32, 34, 64, 100, 128, 256],
    "hadamard": [2, 4, 8, 16, 32, 64, 128, 256],
    # Without a tier of 8 bits, in whose place tokens are dropped.
    "kivi": [32, 96, 128],
    "kivi's keys": [32, 96, 256],
}
ALL = MENUS | ONE_WIDTH_MENUS | {"kivi's keys": ONE_WIDTH_MENUS["kivi"]}
CASES = [(name, channels) for name, widths in CHANNELS.items() for channels in widths]


def component_of(name: str) -> str:
    return "k" if name.endswith("keys") else "v"


def buffers_of(tier_of: TierArray, name: str, x: torch.Tensor) -> Planes:
    return buffers(tier_of, ALL[name], x, component_of(name))


def done(codec: Any, work: str, name: str, *given: Any, **own: Any) -> str:
    """What `work` refuses with, if it does."""
    try:
        getattr(codec, work)(*given, component=component_of(name), **own)
    except CodecError as error:
        return str(error)
    return ""


def check_encode(x: torch.Tensor, tier_of: TierArray, name: str, threads: int = 1) -> Planes:
    """Both codecs write the same planes or say the same; the planes of the kernels."""
    assert cpu.suits(x, ALL[name], None, component_of(name))
    ours, theirs = buffers_of(tier_of, name, x), buffers_of(tier_of, name, x)
    given = (x, tier_of, ALL[name])
    expected = done(reference, "encode_into", name, *given, theirs, (5, 70))
    assert done(cpu, "encode_into", name, *given, ours, (5, 70), threads=threads) == expected
    if not expected:
        assert as_bytes(ours) == as_bytes(theirs)
    return ours


def check_decode(
    planes: Planes, tier_of: TierArray, name: str, like: torch.Tensor, threads: int = 1
) -> None:
    """Both codecs restore the same bits or say the same."""
    ours, theirs = torch.full_like(like, 7.0), torch.full_like(like, 7.0)
    given = (planes, tier_of, ALL[name])
    expected = done(reference, "decode_into", name, *given, theirs)
    assert done(cpu, "decode_into", name, *given, ours, threads=threads) == expected
    if not expected:
        assert same_bits(ours, theirs)


@st.composite
def blocks(draw: st.DrawFn) -> tuple[torch.Tensor, TierArray, str]:
    """Rows of any magnitude, on either side of zero or both; rows without a spread; -0."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    name, channels = draw(st.sampled_from(CASES))
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 70)), channels)
    palette = draw(st.lists(st.sampled_from([NATIVE, INT8, INT4, DROP]), min_size=1, unique=True))
    sizes = 10.0 ** rng.uniform(*draw(st.sampled_from([(-44, -6), (-8, -3), (-2, 2), (2, 4)])))
    values = rng.standard_normal(shape) * sizes + draw(st.sampled_from([0.0, 0.0, 5.0, -3e3]))
    if draw(st.booleans()):  # halves of codes, at a scale that is a power of two
        values = rng.integers(0, 511, shape) / 2.0 * 2.0 ** rng.integers(-18, 4)
        values[..., :2] = 0.0, 255 * 2.0 ** np.floor(np.log2(values.max() / 255 + 1e-30))
    values *= rng.random((*shape[:2], 1)) < 0.9
    values *= rng.random(shape) < draw(st.sampled_from([0.1, 1.0]))  # -0, where it was negative
    x = torch.from_numpy(values).to(DTYPES[draw(st.sampled_from(list(DTYPES)))])
    return x, rng.choice(np.array(palette, np.uint8), shape[:2]), name


@given(blocks(), st.integers(1, 3))
def test_planes_and_restored_values_are_the_references(
    block: tuple[torch.Tensor, TierArray, str], threads: int
) -> None:
    x, tier_of, name = block
    check_decode(check_encode(x, tier_of, name, threads), tier_of, name, x, threads)


@given(st.integers(0, 2**32 - 1), st.sampled_from(CASES), st.sampled_from(list(DTYPES)))
def test_any_bits_are_encoded_or_refused_as_by_the_reference(
    seed: int, case: tuple[str, int], dtype: str
) -> None:
    """NaN, inf and whatever else a pattern may mean; half of the time none that is too large."""
    rng, (name, channels) = np.random.default_rng(seed), case
    raw = rng.integers(0, 256, (2, 3, channels * DTYPES[dtype].itemsize)).astype(np.uint8)
    x = torch.from_numpy(raw).view(DTYPES[dtype])
    if seed % 2:
        x = torch.where(x.float().abs() <= 65504 / channels, x, torch.zeros_like(x))
    check_encode(x, rng.integers(0, 4, (2, 3)).astype(np.uint8), name)


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(CASES),
    st.sampled_from(list(DTYPES)),
    st.sampled_from([0x8000, 0x7C00, 0x5800, 0x2000]),
)
def test_any_planes_are_decoded_or_refused_as_by_the_reference(
    seed: int, case: tuple[str, int], dtype: str, largest: int
) -> None:
    """largest: the pattern below which scales and offsets lie, so that more or fewer fail."""
    rng, (name, channels) = np.random.default_rng(seed), case
    tier_of = rng.integers(0, 4, (2, 5)).astype(np.uint8)
    like = torch.zeros(2, 5, channels, dtype=DTYPES[dtype])
    planes = buffers_of(tier_of, name, like)
    for plane, data in planes.items():
        data[:] = rng.bytes(len(data))
        if plane == Plane.SCALE:
            numbers = rng.integers(0, largest, (len(data) // 4, 2))
            numbers[:, 1] += 0x8000 * rng.integers(0, 2, len(numbers))  # offsets of either sign
            numbers[rng.random(len(numbers)) < 0.1, 0] = rng.choice([0x8000, 0x8001, 0, 0])
            data[:] = numbers.astype("<u2").tobytes()
    check_decode(planes, tier_of, name, like)


@pytest.mark.parametrize("name", CHANNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tier", [INT8, INT4])
def test_every_sixteen_bit_value_is_coded_as_by_the_reference(
    name: str, dtype: torch.dtype, tier: int
) -> None:
    """All that fit, 32 neighbours to a row and strangers to another."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    x = x[x.float().abs() <= 65504 / 32]
    x = x[: len(x) // 32 * 32]
    rows = torch.cat([x.view(-1, 32), x.view(32, -1).T])[None].contiguous()
    tier_of = np.full(rows.shape[:2], tier, np.uint8)
    check_decode(check_encode(rows, tier_of, name), tier_of, name, rows)


@pytest.mark.parametrize("name", CHANNELS)
def test_the_sign_of_a_zero_is_not_on_the_wire(name: str) -> None:
    """A least value of -0 or of 0: which of them is found first changes no byte."""
    x = torch.rand(1, 2, 64).where(torch.rand(1, 2, 64) < 0.5, torch.tensor(0.0))
    tier_of = np.array([[INT8, INT4]], np.uint8)
    planes = check_encode(x, tier_of, name)
    assert planes == check_encode(torch.where(x == 0, -x, x), tier_of, name)
    mixed = torch.where((x == 0) & (torch.rand(x.shape) < 0.5), -x, x)
    assert planes == check_encode(mixed, tier_of, name)


@pytest.mark.parametrize("name", CHANNELS)
@pytest.mark.parametrize("streamed", [False, True])
def test_a_part_of_a_larger_tensor_is_read_and_written_in_place(
    name: str, streamed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "MIN_NBYTES_STREAMED", 1 if streamed else 2**40)
    whole = torch.randn(4, 90, 64).bfloat16()
    part = whole[1:3, 5:85]
    shared = np.broadcast_to(np.array([[INT8, INT4, NATIVE, DROP] * 20], np.uint8), (2, 80))
    planes = check_encode(part, shared, name)
    decoded, expected = torch.full((2, 80, 64), 7.0).bfloat16(), torch.full_like(whole, 7.0)
    given = (planes, shared, ALL[name])
    assert not done(reference, "decode_into", name, *given, decoded)
    expected[1:3, 5:85] = decoded
    out = torch.full_like(whole, 7.0)
    assert not done(cpu, "decode_into", name, *given, out[1:3, 5:85], threads=2)
    assert same_bits(out, expected)


@pytest.mark.parametrize("name", sorted(MENUS.keys() & CHANNELS))
@pytest.mark.parametrize("plane", [Plane.NATIVE, Plane.SCALE, Plane.ANCHOR, Plane.BYTE])
@pytest.mark.parametrize("change", [-1, 1, None])
def test_planes_of_another_size_are_never_touched(
    name: str, plane: Plane, change: int | None
) -> None:
    x = torch.randn(2, 5, 32)
    tier_of = np.array([[INT8, DROP, NATIVE, INT4, INT4]] * 2, np.uint8)
    planes = buffers_of(tier_of, name, x)
    if change is None:
        del planes[plane]
    else:
        planes[plane] = memoryview(bytearray(len(planes[plane]) + change))
    for said in (
        done(cpu, "encode_into", name, x, tier_of, ALL[name], planes),
        done(cpu, "decode_into", name, planes, tier_of, ALL[name], x),
    ):
        assert "need planes" in said


def test_what_the_kernels_cannot_cut_is_left_to_the_reference() -> None:
    for name, channels in (("grouped", 48), ("hadamard", 48), ("affine", cpu.WIDEST + 2)):
        assert not cpu.suits(torch.zeros(1, 1, channels), MENUS[name])
    for name in ("published", "fp8"):
        assert not cpu.suits(torch.zeros(1, 1, 64), ALL[name])
