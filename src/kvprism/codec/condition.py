"""Key conditioning: keys as they are before RoPE, centred, scaled by pairs, perhaps rotated.

A few huge channels swallow the scale that all channels of a quantised row share (the INT4 collapse
that SpectrumKV section 5 answers by switching INT4 off). Channels that RoPE turns together share
one divisor, so that scaling commutes with RoPE; an offset exists before RoPE only. Encoder and
decoder compute the same from the profile; the wire carries nothing of it.
"""

import torch

from kvprism.tensors import KeyConditioning


def condition(
    keys: torch.Tensor, positions: torch.Tensor, conditioning: KeyConditioning
) -> torch.Tensor:
    """Post-RoPE keys `[head, token, channel]` -> what is quantised, float32, of the same shape.

    positions: int64 `[token]`, the tokens' original positions.
    """
    x = _turn(keys.float(), *turns(positions, conditioning, undo=True))
    x = (x - conditioning.offset[:, None]) / _per_channel(conditioning)
    return hadamard(x) if conditioning.rotate else x


def restore(
    x: torch.Tensor, positions: torch.Tensor, conditioning: KeyConditioning
) -> torch.Tensor:
    """The inverse of `condition`, up to float32 rounding."""
    if conditioning.rotate:
        x = hadamard(x)
    x = x * _per_channel(conditioning) + conditioning.offset[:, None]
    return _turn(x, *turns(positions, conditioning, undo=False))


def _per_channel(conditioning: KeyConditioning) -> torch.Tensor:
    return conditioning.scale.repeat(1, 2)[:, None]


def turns(
    positions: torch.Tensor, conditioning: KeyConditioning, *, undo: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of RoPE's angles (undo: of the angles back), `[token, channel // 2]`."""
    # In float64: at position 10^5 a float32 angle is off by 0.01.
    angles = positions.double()[:, None] * conditioning.inverse_frequencies.double()
    angles = -angles if undo else angles
    return angles.cos().float(), angles.sin().float()


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE as Llama, Mistral, Qwen and Gemma have it: channel i goes with channel i + half."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """The normalised Walsh-Hadamard transform over the last axis; its own inverse."""
    channels = x.shape[-1]
    width = 1
    while width < channels:
        pairs = x.reshape(*x.shape[:-1], -1, 2, width)
        first, second = pairs.unbind(dim=-2)
        x = torch.stack([first + second, first - second], dim=-2).reshape(x.shape)
        width *= 2
    normalised: torch.Tensor = x * channels**-0.5
    return normalised
