"""The codes of others against a transcription of docs/format.md, and their bounds."""

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from strategies import cache, plan_of, same_bits

from kvprism.codec.reference import decode_into, encode_into, quantisable
from kvprism.codec.stream import decode, encode
from kvprism.core import MENUS, ONE_WIDTH_MENUS, Tier
from kvprism.errors import BadInput, CodecError
from kvprism.layout import Plane, Split, TierArray, check_menu, plane_nbytes
from kvprism.tensors import LayerKV, RequestKV

GOLDEN = Path(__file__).parent / "golden"
F16, F32 = np.float16, np.float32
ALL = MENUS | ONE_WIDTH_MENUS
AFFINE = ["affine", "hadamard", "grouped", "kivi"]
COMPARED = [*AFFINE, "fp8"]
GROUP = 32
CHANNELS = 64
# Half a unit in the last place of a bfloat16.
BFLOAT16 = 2.0**-8


def up(x: np.float32) -> np.float16:
    near = F16(x)
    return near if F32(near) >= x else np.nextafter(near, F16(np.inf))


def down(x: np.float32) -> np.float16:
    return F16(-up(F32(-x)))


def tiers(name: str, heads: int, tokens: int) -> TierArray:
    """Every tier that the code has, native too, otherwise in each head."""
    legal = [i for i, tier in enumerate(ALL[name]) if tier.bits]
    return np.random.default_rng(5).choice(legal, (heads, tokens)).astype(np.uint8)


def rows(heads: int = 2, tokens: int = 70, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    x = torch.randn(heads, tokens, CHANNELS, generator=torch.Generator().manual_seed(3))
    x[:, :, 3] += 40.0  # a channel far from zero, which an offset takes away
    x[0, 0] = 0.0
    x[0, 1] = 7.0  # a row without any spread
    return x.to(dtype)


def coded(
    x: torch.Tensor, tier_of: TierArray, menu: Sequence[Tier], component: str = "k"
) -> dict[Plane, memoryview]:
    sizes = plane_nbytes(tier_of, menu, x.shape[-1], x.element_size(), component)
    planes = {plane: memoryview(bytearray(size)) for plane, size in sizes.items()}
    encode_into(x, tier_of, menu, planes, component=component)
    return planes


def restored(
    x: torch.Tensor, tier_of: TierArray, menu: Sequence[Tier], component: str = "k"
) -> torch.Tensor:
    out = torch.zeros_like(x)
    decode_into(coded(x, tier_of, menu, component), tier_of, menu, out, component=component)
    return out


def nibbles(values: Sequence[int]) -> bytes:
    half = len(values) // 2
    return bytes(values[i] | values[i + half] << 4 for i in range(half))


def groups_of(
    x: torch.Tensor, tier_of: TierArray, menu: Sequence[Tier], name: str, component: str
) -> Iterator[tuple[list[tuple[int, int, int]], int]]:
    """The (head, token, channel) places that share a scale, and the bits of their codes."""
    quantised = np.array([tier.bits in (4, 8) for tier in menu])
    for head in range(x.shape[0]):
        tokens = np.flatnonzero(quantised[tier_of[head]])
        if (name, component) == ("kivi", "k"):
            for start in range(0, len(tokens), GROUP):
                for channel in range(CHANNELS):
                    yield [(head, int(t), channel) for t in tokens[start : start + GROUP]], 4
            continue
        size = GROUP if name in ("grouped", "kivi") else CHANNELS
        for token in tokens.tolist():
            for start in range(0, CHANNELS, size):
                places = [(head, token, channel) for channel in range(start, start + size)]
                yield places, menu[tier_of[head, token]].bits


def mixed(row: np.ndarray) -> np.ndarray:
    """The Walsh-Hadamard transform by butterflies, in float32."""
    row, width = row.astype(F32), 1
    while width < len(row):
        for start in range(0, len(row), 2 * width):
            a = row[start : start + width].copy()
            b = row[start + width : start + 2 * width].copy()
            row[start : start + width], row[start + width : start + 2 * width] = a + b, a - b
        width *= 2
    return row * F32(len(row) ** -0.5)


def slow_affine(
    x: torch.Tensor, tier_of: TierArray, menu: Sequence[Tier], name: str, component: str
) -> dict[Plane, bytes]:
    values = x.float().numpy()
    if name == "hadamard":
        values = np.apply_along_axis(mixed, -1, values)
    codes, scales = np.zeros(values.shape, int), b""
    for places, bits in groups_of(x, tier_of, menu, name, component):
        found = [values[place] for place in places]
        levels = 15 if bits == 4 else 255
        low = down(min(found))
        scale = up(F32(F32(max(found) - F32(low)) / F32(levels)))
        scales += struct.pack("<ee", scale, low)
        for place, value in zip(places, found, strict=True):
            inverse = F32(1) / F32(scale) if scale else F32(0)
            codes[place] = min(levels, round(float(F32(value - F32(low)) * inverse)))
    planes = {Plane.SCALE: scales, Plane.ANCHOR: b"", Plane.BYTE: b""}
    for head, token in np.ndindex(*tier_of.shape):
        bits, row = menu[tier_of[head, token]].bits, codes[head, token].tolist()
        planes[Plane.ANCHOR] += nibbles(row) if bits == 4 else b""
        planes[Plane.BYTE] += bytes(row) if bits == 8 else b""
    return {plane: data for plane, data in planes.items() if data}


@pytest.mark.parametrize("name", AFFINE)
@pytest.mark.parametrize("component", ["k", "v"])
def test_planes_are_those_of_the_format(name: str, component: str) -> None:
    x, menu = rows(), ALL[name]
    tier_of = tiers(name, 2, 70)
    got = coded(x, tier_of, menu, component)
    expected = slow_affine(x, tier_of, menu, name, component)
    native = got.pop(Plane.NATIVE)
    assert {plane: bytes(data) for plane, data in got.items()} == expected
    assert bytes(native) == x[torch.from_numpy(tier_of == 0)].view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("name", ["affine", "grouped", "kivi"])
@pytest.mark.parametrize("component", ["k", "v"])
def test_a_restored_value_is_within_half_a_step(name: str, component: str) -> None:
    x, menu = rows(dtype=torch.float32), ALL[name]
    tier_of = tiers(name, 2, 70)
    got = restored(x, tier_of, menu, component)
    for places, bits in groups_of(x, tier_of, menu, name, component):
        found = torch.stack([x[place] for place in places])
        spread = float(found.max() - found.min())
        # low is at most one float16 step of 2^-10 below the minimum, or of 2^-24; so is the scale.
        step = (spread + 2.0**-10 * float(found.abs().max()) + 2.0**-24) / (2**bits - 1)
        step = step * (1 + 2.0**-10) + 2.0**-24
        error = max(abs(float(got[place] - x[place])) for place in places)
        assert error <= step / 2 + 2.0**-22 * float(found.abs().max())


def test_a_rotated_row_is_as_near_as_its_transform() -> None:
    """The transform keeps lengths, so the error's length is at most that of half steps."""
    x, menu = rows(dtype=torch.float32), MENUS["hadamard"]
    for tier, levels in ((1, 255), (2, 15)):
        tier_of = np.full((2, 70), tier, np.uint8)
        error = (restored(x, tier_of, menu) - x).norm(dim=-1)
        transformed = torch.from_numpy(np.apply_along_axis(mixed, -1, x.numpy()))
        spread = transformed.amax(dim=-1) - transformed.amin(dim=-1)
        largest = transformed.abs().amax(dim=-1)
        step = (spread + 2.0**-10 * largest + 2.0**-24) / levels * (1 + 2.0**-10) + 2.0**-24
        assert (error <= CHANNELS**0.5 * (step / 2 + 2.0**-20 * largest)).all()


def test_fp8_is_torchs_own_number_times_a_scale() -> None:
    x, menu = rows(), ALL["fp8"]
    tier_of = np.ones((2, 70), np.uint8)
    planes = coded(x, tier_of, menu)
    scales = np.frombuffer(planes[Plane.SCALE], F16).astype(F32)
    for scale, row in zip(scales, x.view(-1, CHANNELS).float().numpy(), strict=True):
        assert scale >= abs(row).max() / F32(448)
    inverse = np.divide(F32(1), scales, out=np.zeros_like(scales), where=scales > 0)
    wanted = torch.from_numpy(x.view(-1, CHANNELS).float().numpy() * inverse[:, None])
    wanted = wanted.to(torch.float8_e4m3fn).view(torch.uint8)
    assert bytes(planes[Plane.BYTE]) == wanted.numpy().tobytes()
    # e4m3 has 3 bits after the point: half a step is a sixteenth, below 2^-6 it is 2^-10.
    got, absmax = restored(x, tier_of, menu).float(), x.float().abs().amax(dim=-1, keepdim=True)
    bound = x.float().abs() * (2.0**-4 + BFLOAT16) + absmax / 448 * 2.0**-10 * (1 + 2.0**-9)
    assert ((got - x.float()).abs() <= bound).all()


@pytest.mark.parametrize("name", COMPARED)
@pytest.mark.parametrize("split", [Split(), Split(tokens=40), Split(heads=1)], ids=repr)
def test_streams_are_as_long_as_planned_and_come_back(name: str, split: Split) -> None:
    kv = cache(layers=2, heads=2, tokens=70, channels=CHANNELS)
    tier_of = tiers(name, 2, 70)
    plan = plan_of(kv, tier_of, ALL[name], split)
    stream = encode(kv, plan)
    assert len(stream) == plan.nbytes
    got = decode(stream)
    native = torch.from_numpy(tier_of == 0)
    for before, after in zip(kv.layers, got.layers, strict=True):
        for part in "kv":
            same = before.components[part][native], after.components[part][native]
            assert same_bits(*same)
            far = (before.components[part].float() - after.components[part].float()).abs().max()
            assert 0 < far < 0.5 * before.components[part].float().abs().max()


@pytest.mark.parametrize("name", COMPARED)
def test_head_ranges_give_the_same_bytes(name: str) -> None:
    x, tier_of = rows(), tiers(name, 2, 70)
    whole = coded(x, tier_of, ALL[name])
    parts = [coded(x[h : h + 1], tier_of[h : h + 1], ALL[name]) for h in (0, 1)]
    for plane, data in whole.items():
        assert bytes(data) == b"".join(bytes(part[plane]) for part in parts)


@pytest.mark.parametrize("name", COMPARED)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_what_cannot_be_coded_is_named_and_pinned(name: str, value: float) -> None:
    x = rows()
    x[1, 5, 2] = value
    tier_of = np.full((2, 70), 1 if name == "fp8" else 2, np.uint8)
    fits = quantisable(x, ALL[name])
    assert not fits[1, 5] and fits.sum() == fits.size - 1
    with pytest.raises(CodecError, match=r"head 1 token 5 .*plan it as native"):
        coded(x, tier_of, ALL[name])
    tier_of[1, 5] = 0
    assert bool(restored(x[:, :5], tier_of[:, :5], ALL[name]).isfinite().all())


@pytest.mark.parametrize("name", AFFINE)
def test_the_largest_rows_that_fit_come_back_finite(name: str) -> None:
    channels = CHANNELS if name == "hadamard" else 2
    x = torch.full((1, 4, CHANNELS), 65504.0 / channels, dtype=torch.float16)
    x[:, :, ::2] *= -1
    tier_of = np.full((1, 4), 2, np.uint8)
    assert quantisable(x, ALL[name]).all()
    assert bool(restored(x, tier_of, ALL[name]).isfinite().all())
    assert not quantisable(x * 2, ALL[name]).any()


@pytest.mark.parametrize("name", COMPARED)
@pytest.mark.parametrize("number", [float("inf"), float("nan"), -1.0])
def test_a_scale_that_no_encoder_writes_is_refused(name: str, number: float) -> None:
    tier_of = np.full((1, 40), 1 if name == "fp8" else 2, np.uint8)
    planes = coded(rows(1, 40), tier_of, ALL[name])
    planes[Plane.SCALE][:2] = struct.pack("<e", number)
    with pytest.raises(CodecError, match="negative"):
        decode_into(planes, tier_of, ALL[name], torch.zeros(1, 40, CHANNELS))


def test_a_restored_value_beyond_the_cache_is_refused() -> None:
    tier_of = np.full((1, 1), 2, np.uint8)
    planes = coded(rows(1)[:, 2:3], tier_of, ALL["affine"])
    planes[Plane.SCALE][:] = struct.pack("<ee", 60000.0, 0.0)
    planes[Plane.ANCHOR][:] = b"\xff" * len(planes[Plane.ANCHOR])
    with pytest.raises(CodecError, match=r"beyond torch\.float16"):
        decode_into(planes, tier_of, ALL["affine"], torch.zeros(1, 1, CHANNELS, dtype=torch.half))


@pytest.mark.parametrize(
    "name, channels, needed",
    [("grouped", 48, "groups of 32"), ("kivi", 80, "groups of 32"), ("hadamard", 96, "power of")],
)
def test_rows_that_a_code_cannot_cut_are_refused(name: str, channels: int, needed: str) -> None:
    with pytest.raises(BadInput, match=needed):
        check_menu(ALL[name], channels, 2)


@pytest.mark.parametrize(
    "name, four, eight",
    [
        ("affine", 0.281, 0.531),  # (32 + 4) / 128, (64 + 4) / 128
        ("hadamard", 0.281, 0.531),
        ("grouped", 0.3125, 0.5625),  # two groups, 4 bytes each
        ("kivi", 0.3125, None),  # keys: 64 scales of 4 bytes for 32 tokens, as much as the values'
        ("fp8", None, 0.516),
    ],
)
def test_sizes_of_a_row(name: str, four: float | None, eight: float | None) -> None:
    for tier, fraction in ((2, four), (1, eight)):
        if fraction is None:
            continue
        for component in "kv":
            sizes = plane_nbytes(np.full((1, 64), tier, np.uint8), ALL[name], 64, 2, component)
            assert sum(sizes.values()) / (64 * 64 * 2) == pytest.approx(fraction, abs=5e-4)


def golden_stream(name: str) -> bytes:
    """From integers alone: no generator of random numbers that could change."""

    def component(offset: int) -> torch.Tensor:
        values = [((i * 37 + offset) % 239 - 119) / 8 for i in range(2 * 6 * 32)]
        return torch.tensor(values).reshape(2, 6, 32).bfloat16()

    kv = RequestKV((LayerKV(3, {"k": component(0), "v": component(100)}, torch.arange(6)),), 6)
    return encode(kv, plan_of(kv, tiers(name, 2, 6), ALL[name], Split(tokens=4)))


@pytest.mark.parametrize("name", COMPARED)
def test_not_a_byte_of_the_golden_streams_changes(name: str) -> None:
    assert golden_stream(name) == (GOLDEN / f"{name}-1.0.kvp").read_bytes()
