"""The GPU kernels against the reference, bit for bit; interpreted where there is no GPU."""

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DROP, INT4, INT8, NATIVE, same_bits

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="triton is not installed (extra gpu)")

from kvprism.codec import gpu, reference
from kvprism.core import CONDITIONED_MENU, MENU
from kvprism.errors import CodecError, Unsupported
from kvprism.layout import Plane, TierArray, plane_nbytes
from kvprism.tensors import DTYPES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def reference_planes(x: torch.Tensor, tier_of: TierArray) -> dict[Plane, memoryview]:
    sizes = plane_nbytes(tier_of, MENU, x.shape[-1], x.element_size())
    planes = {plane: memoryview(bytearray(size)) for plane, size in sizes.items()}
    reference.encode_into(x, tier_of, MENU, planes)
    return planes


def check(x: torch.Tensor, tier_of: TierArray) -> None:
    expected = reference_planes(x, tier_of)
    planes = gpu.encode(x.to(DEVICE), tier_of, MENU)
    assert {p: bytes(data.cpu().numpy()) for p, data in planes.items()} == {
        p: bytes(data) for p, data in expected.items()
    }
    ours, theirs = torch.full_like(x, 7.0).to(DEVICE), torch.full_like(x, 7.0)
    gpu.decode(planes, tier_of, MENU, ours)
    reference.decode_into(expected, tier_of, MENU, theirs)
    assert same_bits(ours.cpu(), theirs)


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([2, 6, 16, 40, 64, 128]),
    st.sampled_from(list(DTYPES)),
    st.sampled_from([(-46, -36), (-9, -3), (-2, 3), (3, 6.5)]),
    st.lists(st.sampled_from([NATIVE, INT8, INT4, DROP]), min_size=1, unique=True),
)
@settings(max_examples=20)
def test_planes_and_restored_values_are_the_references(
    seed: int, channels: int, dtype: str, exponents: tuple[float, float], palette: list[int]
) -> None:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((2, 19, channels)) * 10.0 ** rng.uniform(*exponents)
    values *= rng.random((2, 19, 1)) < 0.9
    x = torch.from_numpy(values.clip(-6e4, 6e4)).to(DTYPES[dtype])
    check(x, rng.choice(np.array(palette, np.uint8), (2, 19)))


@pytest.mark.parametrize("tier", [INT8, INT4])
def test_halves_of_codes_are_rounded_to_even(tier: int) -> None:
    values = np.arange(-238, 239)[None, :, None] / 2.0
    x = torch.from_numpy(np.concatenate([values, np.full_like(values, 119.0)], axis=-1)).float()
    check(x, np.full(x.shape[:2], tier, np.uint8))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e8])
def test_a_row_that_cannot_be_coded_is_refused(value: float) -> None:
    x = torch.ones(2, 5, 8, device=DEVICE)
    x[1, 3, 7] = value
    tier_of = np.full((2, 5), INT4, np.uint8)
    with pytest.raises(CodecError, match="its tier cannot hold"):
        gpu.encode(x, tier_of, MENU)
    tier_of[1, 3] = NATIVE
    assert gpu.encode(x, tier_of, MENU)[Plane.NATIVE].numel() == 32


def test_an_unsound_scale_is_refused() -> None:
    x, tier_of = torch.ones(1, 1, 8, device=DEVICE), np.full((1, 1), INT4, np.uint8)
    planes = gpu.encode(x, tier_of, MENU)
    planes[Plane.SCALE][1] = 0xFC
    with pytest.raises(CodecError, match="negative or not finite"):
        gpu.decode(planes, tier_of, MENU, x)


def test_rows_are_scattered_into_pages_and_nothing_else_is_touched() -> None:
    """vLLM's layout: blocks of 4 tokens, in an order that the block table gives."""
    x = torch.randn(3, 10, 16).bfloat16().to(DEVICE)
    tier_of = np.random.default_rng(0).integers(0, 4, (3, 10)).astype(np.uint8)
    planes, contiguous = gpu.encode(x, tier_of, MENU), torch.full_like(x, 7.0)
    gpu.decode(planes, tier_of, MENU, contiguous)
    pages = torch.full((6, 4, 3, 16), 7.0, device=DEVICE).bfloat16()
    table = torch.tensor([5, 0, 3], device=DEVICE)
    token = torch.arange(10, device=DEVICE)
    slots = table[token // 4] * 4 + token % 4
    by_head = pages.flatten(0, 1).transpose(0, 1)
    gpu.decode(planes, tier_of, MENU, by_head, slots)
    assert same_bits(by_head[:, slots], contiguous)
    untouched = torch.ones(24, dtype=torch.bool, device=DEVICE)
    untouched[slots] = False
    assert (by_head[:, untouched] == 7.0).all()


def test_layers_that_lie_together_go_in_one_launch() -> None:
    layers = torch.randn(2, 3, 7, 16).bfloat16().to(DEVICE)
    tier_of = np.random.default_rng(1).integers(0, 3, (6, 7)).astype(np.uint8)
    together = gpu.encode(layers.flatten(0, 1), tier_of, MENU)
    apart = [gpu.encode(x, tier_of[3 * i :][:3], MENU) for i, x in enumerate(layers)]
    for plane, data in together.items():
        assert torch.equal(data, torch.cat([planes[plane] for planes in apart]))


def test_other_codes_and_layouts_are_refused() -> None:
    x, tier_of = torch.ones(2, 8, 8), np.full((2, 8), INT4, np.uint8)
    with pytest.raises(Unsupported, match=r"kvp\.nested/1"):
        gpu.encode(x, tier_of, CONDITIONED_MENU)
    with pytest.raises(Unsupported, match="side by side"):
        gpu.encode(x.transpose(1, 2), tier_of, MENU)
