"""Key conditioning is what it says, and can be undone."""

import pytest
import torch

from kvprism.codec.condition import condition, restore
from kvprism.errors import BadInput, ShapeMismatch
from kvprism.tensors import KeyConditioning

HEADS, TOKENS, CHANNELS = 2, 40, 16
FREQUENCIES = 10000.0 ** (-torch.arange(0, CHANNELS, 2).float() / CHANNELS)
POSITIONS = torch.arange(0, 3 * TOKENS, 3)


def conditioning(rotate: bool = False, **fields: torch.Tensor) -> KeyConditioning:
    neutral = {
        "offset": torch.zeros(HEADS, CHANNELS),
        "scale": torch.ones(HEADS, CHANNELS // 2),
        "inverse_frequencies": FREQUENCIES,
    }
    return KeyConditioning(**{**neutral, **fields}, rotate=rotate)


def rope(x: torch.Tensor) -> torch.Tensor:
    """As `apply_rotary_pos_emb` of transformers' Llama."""
    angles = torch.outer(POSITIONS.float(), FREQUENCIES)
    cos, sin = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()
    half = CHANNELS // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin


@pytest.fixture
def before_rope() -> torch.Tensor:
    return torch.randn(HEADS, TOKENS, CHANNELS, generator=torch.Generator().manual_seed(0))


def test_a_neutral_conditioning_gives_the_keys_before_rope(before_rope):
    found = condition(rope(before_rope), POSITIONS, conditioning())
    # Angles up to 117 in float32 are off by 117 * 2^-24; values are below 5.
    assert torch.allclose(found, before_rope, atol=5 * 117 * 2**-22)


def test_what_all_keys_share_before_rope_is_gone(before_rope):
    offset = 100 * torch.randn(HEADS, CHANNELS, generator=torch.Generator().manual_seed(1))
    scale = 2.0 ** torch.arange(HEADS * CHANNELS // 2).view(HEADS, -1).remainder(5)
    large = before_rope * scale.repeat(1, 2)[:, None] + offset[:, None]
    found = condition(rope(large), POSITIONS, conditioning(offset=offset, scale=scale))
    assert torch.allclose(found, before_rope, atol=400 * 117 * 2**-22)


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_can_be_undone(before_rope, rotate, dtype):
    given = conditioning(
        rotate,
        offset=torch.full((HEADS, CHANNELS), 3.0),
        scale=torch.full((HEADS, CHANNELS // 2), 8.0),
    )
    keys = rope(before_rope).to(dtype)
    again = restore(condition(keys, POSITIONS, given), POSITIONS, given)
    # A dozen float32 roundings of numbers below 20.
    assert torch.allclose(again, keys.float(), atol=12 * 20 * 2**-24)


def test_a_rotation_spreads_one_channel_over_all_and_keeps_lengths(before_rope):
    spike = torch.zeros(HEADS, TOKENS, CHANNELS)
    spike[..., 5] = 4.0
    found = condition(rope(spike), POSITIONS, conditioning(rotate=True))
    assert torch.allclose(found.abs(), torch.full_like(found, 1.0), atol=1e-4)
    turned = condition(rope(before_rope), POSITIONS, conditioning(rotate=True))
    assert torch.allclose(turned.norm(dim=-1), before_rope.norm(dim=-1), rtol=1e-4)


@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        ({"offset": torch.zeros(HEADS, CHANNELS, 1)}, ShapeMismatch, "offset"),
        ({"scale": torch.ones(HEADS, CHANNELS)}, ShapeMismatch, r"scale: expected .*\[2, 8\]"),
        ({"scale": torch.zeros(HEADS, CHANNELS // 2)}, BadInput, "positive"),
        ({"offset": torch.full((HEADS, CHANNELS), torch.inf)}, BadInput, "not finite"),
        ({"inverse_frequencies": FREQUENCIES.double()}, ShapeMismatch, "float32"),
    ],
)
def test_parameters_that_do_not_go_together_are_refused(fields, error, says):
    with pytest.raises(error, match=says):
        conditioning(**fields)


def test_a_rotation_needs_a_power_of_two():
    with pytest.raises(BadInput, match="got 12"):
        KeyConditioning(torch.zeros(1, 12), torch.ones(1, 6), FREQUENCIES[:6], rotate=True)
