"""The C kernels against the reference, bit for bit; skipped where they were not compiled."""

import os
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import DROP, INT4, INT8, NATIVE, same_bits

from codec.kernels import COMPILED, Planes, as_bytes, buffers
from kvprism.codec import backend, cpu, reference
from kvprism.core import CONDITIONED_MENU, MENU, PUBLISHED_MENU
from kvprism.errors import CodecError, UnknownName
from kvprism.layout import Plane, TierArray
from kvprism.tensors import DTYPES, KeyConditioning

pytestmark = COMPILED

CHANNELS = [*range(2, 42, 2), 62, 64, 66, 96, 126, 128, 130, 192, 256]
LARGEST_ROW = 119 * 65504.0


def check_encode(x: torch.Tensor, tier_of: TierArray, threads: int = 1) -> Planes:
    """Both codecs write the same planes or say the same; the planes of the kernels."""
    ours, theirs = buffers(tier_of, MENU, x), buffers(tier_of, MENU, x)
    try:
        reference.encode_into(x, tier_of, MENU, theirs, (5, 70))
    except CodecError as error:
        with pytest.raises(CodecError) as refused:
            cpu.encode_into(x, tier_of, MENU, ours, (5, 70), threads=threads)
        assert str(refused.value) == str(error)
    else:
        cpu.encode_into(x, tier_of, MENU, ours, (5, 70), threads=threads)
        assert as_bytes(ours) == as_bytes(theirs)
    return ours


def check_decode(planes: Planes, tier_of: TierArray, like: torch.Tensor, threads: int = 1) -> None:
    """Both codecs restore the same bits or say the same."""
    ours, theirs = torch.full_like(like, 7.0), torch.full_like(like, 7.0)
    try:
        reference.decode_into(planes, tier_of, MENU, theirs)
    except CodecError as error:
        with pytest.raises(CodecError) as refused:
            cpu.decode_into(planes, tier_of, MENU, ours, threads=threads)
        assert str(refused.value) == str(error)
    else:
        cpu.decode_into(planes, tier_of, MENU, ours, threads=threads)
        assert same_bits(ours, theirs)


@st.composite
def blocks(draw: st.DrawFn) -> tuple[torch.Tensor, TierArray]:
    """Rows of any magnitude, zero rows and values on the edges of codes among them; any tiers."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    heads, tokens = draw(st.integers(1, 4)), draw(st.integers(1, 40))
    channels = draw(st.sampled_from(CHANNELS))
    palette = draw(st.lists(st.sampled_from([NATIVE, INT8, INT4, DROP]), min_size=1, unique=True))
    exponents = rng.uniform(*draw(st.sampled_from([(-46, -36), (-9, -3), (-2, 3), (3, 6.5)])))
    values = rng.standard_normal((heads, tokens, channels)) * 10.0**exponents
    if draw(st.booleans()):  # halves of codes at a scale that is a power of two
        values = rng.integers(-238, 239, values.shape) / 2.0 * 2.0 ** rng.integers(-20, 8)
        values[..., 0] = 119 * 2.0 ** np.floor(np.log2(np.abs(values).max() / 119 + 1e-30))
    values *= rng.random((heads, tokens, 1)) < 0.9
    x = torch.from_numpy(values.clip(-3e38, 3e38)).to(DTYPES[draw(st.sampled_from(list(DTYPES)))])
    return x, rng.choice(np.array(palette, np.uint8), (heads, tokens))


@given(blocks(), st.integers(1, 3))
def test_planes_and_restored_values_are_the_references(
    block: tuple[torch.Tensor, TierArray], threads: int
) -> None:
    x, tier_of = block
    planes = check_encode(x, tier_of, threads)
    check_decode(planes, tier_of, x, threads)


@given(st.integers(0, 2**32 - 1), st.sampled_from(CHANNELS), st.sampled_from(list(DTYPES)))
def test_any_bits_are_encoded_or_refused_as_by_the_reference(
    seed: int, channels: int, dtype: str
) -> None:
    """NaN, inf and whatever else a pattern may mean; most such rows are refused, so few at once."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (2, 3, channels * torch.empty(0, dtype=DTYPES[dtype]).itemsize))
    x = torch.from_numpy(raw.astype(np.uint8)).view(DTYPES[dtype])
    if seed % 2:
        x = torch.where(x.float().abs() <= LARGEST_ROW, x, torch.zeros_like(x))
    check_encode(x, rng.integers(0, 4, (2, 3)).astype(np.uint8))


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(CHANNELS),
    st.sampled_from(list(DTYPES)),
    st.booleans(),
)
def test_any_planes_are_decoded_or_refused_as_by_the_reference(
    seed: int, channels: int, dtype: str, sound: bool
) -> None:
    rng = np.random.default_rng(seed)
    tier_of = rng.integers(0, 4, (3, 5)).astype(np.uint8)
    like = torch.zeros(3, 5, channels, dtype=DTYPES[dtype])
    planes = buffers(tier_of, MENU, like)
    for plane, data in planes.items():
        data[:] = rng.bytes(len(data))
        if plane == Plane.SCALE and sound:
            scales = rng.integers(0, 0x7C00, len(data) // 2).astype("<u2")
            data[:] = (
                np.where(rng.random(scales.shape) < 0.1, 0x8000, scales).astype("<u2").tobytes()
            )
    check_decode(planes, tier_of, like)


def test_every_float16_scale_is_read_and_refused_as_by_the_reference() -> None:
    """All 65,536 patterns, finite ones at once and the others one by one (a few of them)."""
    patterns = np.arange(2**16, dtype="<u2")
    sound = patterns[(patterns < 0x7C00) | (patterns == 0x8000)]
    tier_of = np.full((1, len(sound)), INT8, np.uint8)
    for dtype in DTYPES.values():
        like = torch.zeros(1, len(sound), 4, dtype=dtype)
        planes = buffers(tier_of, MENU, like)
        planes[Plane.SCALE][:] = sound.tobytes()
        for plane in (Plane.ANCHOR, Plane.RESIDUAL):
            planes[plane][:] = np.random.default_rng(1).bytes(len(planes[plane]))
        check_decode(planes, tier_of, like)
    for pattern in (0x7C00, 0x7C01, 0x7FFF, 0x8001, 0xBC00, 0xFC00, 0xFFFF):
        one = np.full((1, 1), INT4, np.uint8)
        planes = buffers(one, MENU, like[:, :1])
        planes[Plane.SCALE][:] = np.array([pattern], "<u2").tobytes()
        with pytest.raises(CodecError, match="negative or not finite"):
            cpu.decode_into(planes, one, MENU, like[:, :1].clone())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tier", [INT8, INT4])
def test_every_sixteen_bit_value_is_encoded_as_by_the_reference(
    dtype: torch.dtype, tier: int
) -> None:
    """Each of the 65,536 patterns beside a largest value of its row; those that fit at once."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    x = x[x.float().abs() <= LARGEST_ROW]
    rows = torch.stack([x, x.flip(0), (x.float() / 3).to(dtype), -x], dim=-1)[None]
    planes = check_encode(rows, np.full(rows.shape[:2], tier, np.uint8))
    check_decode(planes, np.full(rows.shape[:2], tier, np.uint8), rows)


@pytest.mark.parametrize("offset", [0, 1, 7, 63, 1000])
def test_scales_are_rounded_up_as_by_the_reference(offset: int) -> None:
    """Largest values at, just below and just above 119 times every float16: where s rounds."""
    scale = np.arange(offset, 0x7C00, 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    exact = scale * np.float32(119)
    near = np.concatenate([np.nextafter(exact, np.float32(0)), exact, np.nextafter(exact, 1e30)])
    x = torch.from_numpy(np.stack([near, -near / 3], axis=-1))[None]
    x = x[:, x[0, :, 0] / 119 <= 65504]
    check_encode(x, np.full(x.shape[:2], INT8, np.uint8))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("tier", [INT8, INT4])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_the_first_row_that_cannot_be_coded_is_named(
    dtype: torch.dtype, tier: int, value: float
) -> None:
    x = torch.ones(2, 50, 128, dtype=dtype)
    x[1, 7, 127] = x[1, 40, 0] = value
    tier_of = np.full((2, 50), tier, np.uint8)
    with pytest.raises(CodecError, match="head 6 token 77 has a value that tier"):
        cpu.encode_into(x, tier_of, MENU, buffers(tier_of, MENU, x), (5, 70), threads=2)
    tier_of[1, [7, 40]] = NATIVE, DROP
    check_encode(x, tier_of)


def test_rows_that_are_dropped_stay_as_they_are() -> None:
    x = torch.randn(2, 9, 8)
    tier_of = np.array([[INT8, DROP, NATIVE, INT4, DROP, DROP, INT4, INT8, DROP]] * 2, np.uint8)
    planes = check_encode(x, tier_of)
    out = torch.full_like(x, 7.0)
    cpu.decode_into(planes, tier_of, MENU, out)
    assert (out[:, tier_of[0] == DROP] == 7.0).all()


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([2, 16, 32, 48, 64, 96, 128, 160, 256, 512, 544]),
    st.sampled_from(list(DTYPES)),
    st.sampled_from([0, 0, 0, 1, 8, 16]),
    st.integers(1, 3),
)
def test_rows_written_around_the_caches_are_the_references(
    seed: int, channels: int, dtype: str, offset: int, threads: int
) -> None:
    """Rows of whole lines or not, narrow or beyond the stage, on the edge of a line or off it."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    tier_of = rng.integers(0, 4, (2, 7)).astype(np.uint8)
    x = torch.randn(2, 7, channels).to(DTYPES[dtype])
    planes = check_encode(x, tier_of)
    ours, theirs = (torch.full((offset + 2 * 9 * channels + 1,), 7.0).to(x.dtype) for _ in "ab")
    parts = [whole[offset:-1].view(2, 9, channels)[:, 1:8] for whole in (ours, theirs)]
    decoded = torch.full_like(x, 7.0)
    reference.decode_into(planes, tier_of, MENU, decoded)
    parts[1][:] = decoded
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "MIN_NBYTES_STREAMED", 1)
        cpu.decode_into(planes, tier_of, MENU, parts[0], threads=threads)
    assert same_bits(ours, theirs)


def test_a_part_of_a_larger_tensor_is_read_and_written_in_place() -> None:
    whole = torch.randn(4, 30, 16).bfloat16()
    part = whole[1:3, 5:25]
    shared = np.broadcast_to(np.array([[INT8, INT4, NATIVE, DROP] * 5], np.uint8), (2, 20))
    planes = check_encode(part, shared)
    expected = torch.full_like(whole, 7.0)
    decoded = torch.full((2, 20, 16), 7.0).bfloat16()
    reference.decode_into(planes, shared, MENU, decoded)
    expected[1:3, 5:25] = decoded
    out = torch.full_like(whole, 7.0)
    cpu.decode_into(planes, shared, MENU, out[1:3, 5:25])
    assert same_bits(out, expected)


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_threads_write_the_same_planes(threads: int) -> None:
    x = torch.randn(3, 101, 64).bfloat16()
    tier_of = np.random.default_rng(0).integers(0, 4, (3, 101)).astype(np.uint8)
    check_decode(check_encode(x, tier_of, threads), tier_of, x, threads)
    x[2, 100, 5] = float("nan")
    tier_of[2, 100] = INT8
    check_encode(x, tier_of, threads)


def drawn_conditioning(heads: int, channels: int, *, rotate: bool) -> KeyConditioning:
    return KeyConditioning(
        offset=3 * torch.randn(heads, channels),
        scale=torch.rand(heads, channels // 2) + 0.5,
        inverse_frequencies=10000.0 ** (-torch.arange(channels // 2).float() / channels * 2),
        rotate=rotate,
    )


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("palette", [[NATIVE, INT8, INT4, DROP], [INT4], [NATIVE], [INT8, DROP]])
def test_conditioned_keys_are_coded_as_by_the_reference(
    dtype: torch.dtype, rotate: bool, palette: list[int]
) -> None:
    x = torch.randn(2, 33, 32).to(dtype)
    tier_of = np.random.default_rng(0).choice(np.array(palette, np.uint8), (2, 33))
    conditioned = reference.Conditioned(
        drawn_conditioning(2, 32, rotate=rotate), torch.arange(100, 133)
    )
    results: list[Any] = []
    for codec in (reference, cpu):
        planes, out = buffers(tier_of, CONDITIONED_MENU, x), torch.full_like(x, 7.0)
        codec.encode_into(x, tier_of, CONDITIONED_MENU, planes, (0, 0), conditioned)
        codec.decode_into(planes, tier_of, CONDITIONED_MENU, out, conditioned)
        results.append((as_bytes(planes), out))
    assert results[0][0] == results[1][0]
    assert same_bits(results[0][1], results[1][1])


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([2, 4, 8, 16, 64, 128, 256]),
    st.sampled_from(list(DTYPES)),
    st.booleans(),
    st.sampled_from([1.0, 1e-4, 1e4, 1e37]),
    st.integers(1, 3),
)
def test_any_conditioned_keys_are_coded_or_refused_as_by_the_reference(
    seed: int, channels: int, dtype: str, rotate: bool, size: float, threads: int
) -> None:
    """Any planes are decoded too: what is beyond the dtype then is refused alike."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    x = (size * torch.randn(2, 9, channels)).to(DTYPES[dtype])
    tier_of = rng.integers(0, 4, (2, 9)).astype(np.uint8)
    conditioned = reference.Conditioned(
        drawn_conditioning(2, channels, rotate=rotate), torch.arange(seed % 10**5, seed % 10**5 + 9)
    )
    results: list[tuple[str, Any, str, Any]] = []
    for codec, own in ((reference, {}), (cpu, {"threads": threads})):
        planes, out = buffers(tier_of, CONDITIONED_MENU, x), torch.full_like(x, 7.0)
        encoded = said(
            codec.encode_into, x, tier_of, CONDITIONED_MENU, planes, (0, 0), conditioned, **own
        )
        written = None if encoded else as_bytes(planes)
        if encoded:
            rng = np.random.default_rng(seed)
            for plane, data in planes.items():
                scales = rng.integers(0, 0x7C00, len(data) // 2).astype("<u2").tobytes()
                data[:] = scales if plane == Plane.SCALE else rng.bytes(len(data))
        decoded = said(
            codec.decode_into, planes, tier_of, CONDITIONED_MENU, out, conditioned, **own
        )
        results.append((encoded, written, decoded, None if decoded else out))
    (*ours, restored), (*theirs, expected) = results
    assert ours == theirs
    assert expected is None or same_bits(restored, expected)


def said(work: Any, *given: Any, **named: Any) -> str:
    """What `work` refuses with, if it does."""
    try:
        work(*given, **named)
    except CodecError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("conditioned_too", [False, True])
def test_a_conditioned_row_that_cannot_be_coded_is_refused_alike(conditioned_too: bool) -> None:
    x = torch.randn(1, 5, 8)
    x[0, 3, 2] = float("nan")
    tier_of = np.full((1, 5), INT4, np.uint8)
    conditioned = reference.Conditioned(drawn_conditioning(1, 8, rotate=True), torch.arange(5))
    said = set()
    for codec in (reference, cpu):
        with pytest.raises(CodecError) as refused:
            planes = buffers(tier_of, CONDITIONED_MENU, x)
            codec.encode_into(
                x,
                tier_of,
                CONDITIONED_MENU,
                planes,
                (2, 9),
                conditioned if conditioned_too else None,
            )
        said.add(str(refused.value))
    assert len(said) == 1 and "head 2 token 12" in said.pop()


@pytest.mark.parametrize("plane", [Plane.NATIVE, Plane.SCALE, Plane.ANCHOR, Plane.RESIDUAL])
@pytest.mark.parametrize("change", [-1, 1, None])
def test_planes_of_another_size_are_never_touched(plane: Plane, change: int | None) -> None:
    x = torch.randn(2, 9, 8)
    tier_of = np.array([[INT8, DROP, NATIVE, INT4, DROP, DROP, INT4, INT8, DROP]] * 2, np.uint8)
    planes = buffers(tier_of, MENU, x)
    if change is None:
        del planes[plane]
    else:
        planes[plane] = memoryview(bytearray(len(planes[plane]) + change))
    for call in (
        lambda: cpu.encode_into(x, tier_of, MENU, planes),
        lambda: cpu.decode_into(planes, tier_of, MENU, x),
    ):
        with pytest.raises(CodecError, match="need planes"):
            call()


def test_what_the_kernels_rely_on_is_checked() -> None:
    x = torch.randn(2, 3, 8)
    tier_of = np.full((2, 3), INT4, np.uint8)
    planes = buffers(tier_of, MENU, x)
    with pytest.raises(CodecError, match="beyond the menu"):
        cpu.encode_into(x, np.full((2, 3), 4, np.uint8), MENU, planes)
    with pytest.raises(CodecError, match="do not fit rows"):
        cpu.encode_into(x, tier_of[:1], MENU, planes)
    with pytest.raises(CodecError, match="read-only"):
        cpu.encode_into(x, tier_of, MENU, {p: data.toreadonly() for p, data in planes.items()})


def test_what_the_kernels_cannot_do_is_left_to_the_reference() -> None:
    x = torch.randn(2, 3, 8)
    assert cpu.suits(x, MENU) and cpu.suits(x, CONDITIONED_MENU)
    assert not cpu.suits(x, PUBLISHED_MENU)
    assert not cpu.suits(x.double(), MENU)
    assert not cpu.suits(x.transpose(1, 2), MENU)
    assert not cpu.suits(x.to("meta"), MENU)
    tier_of = np.full((2, 3), INT8, np.uint8)
    transposed = torch.zeros(2, 8, 3).transpose(1, 2)
    planes = buffers(tier_of, MENU, x)
    backend.encode_into(x.transpose(1, 2).contiguous().transpose(1, 2), tier_of, MENU, planes)
    backend.decode_into(planes, tier_of, MENU, transposed)
    assert float((transposed - x).abs().max()) < 0.05


def test_the_variable_selects_the_codec(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    assert backend.selected() == "cpu"
    monkeypatch.setenv(backend.VARIABLE, "reference")
    assert backend.selected() == "reference"
    monkeypatch.setenv(backend.VARIABLE, "fast")
    with pytest.raises(UnknownName, match="auto, cpu, reference"):
        backend.selected()


def test_without_kernels_the_reference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "library", lambda: None)
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    assert backend.selected() == "reference"
    monkeypatch.setenv(backend.VARIABLE, "cpu")
    with pytest.raises(CodecError, match="was not compiled"):
        backend.selected()


def test_who_serves_is_not_slow_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    backend.refuse_slow()
    monkeypatch.setattr(cpu, "library", lambda: None)
    with pytest.raises(CodecError, match=r"far slower.*KVPRISM_CODEC=reference"):
        backend.refuse_slow()
    monkeypatch.setenv(backend.VARIABLE, "reference")
    backend.refuse_slow()


def test_kernels_that_are_broken_or_old_say_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    fresh = cpu.library.__wrapped__
    assert fresh() is not None
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(cpu, "LIBRARY", broken)
    with pytest.raises(CodecError, match=r"cannot be loaded.*KVPRISM_CODEC=reference"):
        fresh()
    monkeypatch.undo()
    monkeypatch.setattr(cpu, "source_hash", lambda: "another")
    with pytest.raises(CodecError, match=r"made from another cpu\*"):
        fresh()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_has_threads_of_its_own() -> None:
    assert cpu._pool(os.getpid(), 2) is cpu._pool(os.getpid(), 2)
    assert cpu._pool(os.getpid() + 1, 2) is not cpu._pool(os.getpid(), 2)
