"""Another forward pass of Llama and Qwen3: plain torch, one mask per layer, no cache."""

from typing import Any

import torch


def rms_norm(x: torch.Tensor, norm: Any) -> torch.Tensor:
    return norm.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)


def rotate(x: torch.Tensor, positions: torch.Tensor, theta: float) -> torch.Tensor:
    """RoPE on `[head, token, channel]`: pair (p, p + half) turns by position * theta^(-p/half)."""
    half = x.shape[-1] // 2
    angles = positions[:, None].double() * theta ** (-torch.arange(half).double() / half)
    cos, sin = angles.cos().float(), angles.sin().float()
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def project(attention: Any, x: torch.Tensor, name: str) -> torch.Tensor:
    """Rows of `[token, width]` as heads `[head, token, channel]`, normed where Qwen3 norms them."""
    heads = getattr(attention, f"{name}_proj")(x).unflatten(-1, (-1, attention.head_dim))
    norm = getattr(attention, f"{name}_norm", None)
    return (heads if norm is None else rms_norm(heads, norm)).transpose(0, 1)


def queries_keys_values(
    model: Any, layer: Any, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of one layer whose input is `x` `[token, width]`; queries and keys after RoPE."""
    positions, theta = torch.arange(len(x)), model.config.rope_parameters["rope_theta"]
    h = rms_norm(x, layer.input_layernorm)
    q, k, v = (project(layer.self_attn, h, name) for name in "qkv")
    return rotate(q, positions, theta), rotate(k, positions, theta), v


def logits(model: Any, ids: torch.Tensor, masks: list[torch.Tensor]) -> torch.Tensor:
    """Logits `[token, vocabulary]` when layer i attends through `masks[i]`, bool `[query, key]`."""
    x = model.model.embed_tokens(ids)
    for layer, mask in zip(model.model.layers, masks, strict=True):
        q, k, v = queries_keys_values(model, layer, x)
        group = len(q) // len(k)
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        scores = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf)
        attended = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
        x = x + layer.self_attn.o_proj(attended)
        x = x + layer.mlp(rms_norm(x, layer.post_attention_layernorm))
    return model.lm_head(rms_norm(x, model.model.norm))


def masks_after_dropping(
    kept: list[torch.Tensor], n_prompt: int, n_tokens: int
) -> list[torch.Tensor]:
    """Causal masks; only rows from `n_prompt` on miss dropped tokens: the prefill saw them all."""
    masks = []
    for positions in kept:
        mask = torch.ones(n_tokens, n_tokens, dtype=torch.bool).tril()
        dropped = torch.ones(n_prompt, dtype=torch.bool)
        dropped[positions] = False
        mask[n_prompt:, :n_prompt] &= ~dropped
        masks.append(mask)
    return masks
