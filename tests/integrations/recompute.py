"""Another forward pass of all five families: plain torch, one mask per layer, no cache."""

import math
from typing import Any

import torch


def rms_norm(x: torch.Tensor, norm: Any) -> torch.Tensor:
    """Gemma's weights are counted from 1."""
    gemma = "Gemma" in type(norm).__name__
    weight, eps = (1 + norm.weight, norm.eps) if gemma else (norm.weight, norm.variance_epsilon)
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def frequencies(rope: dict[str, Any], half: int) -> torch.Tensor:
    """Radians per position of each channel pair, float64 `[half]`.

    Llama 3.1: pairs that turn less than once in the original context are slowed down by `factor`,
    those that turn more than `high_freq_factor` times are left, and what lies between is blended.
    """
    turning = rope["rope_theta"] ** (-torch.arange(half).double() / half)
    if rope.get("rope_type", "default") == "default":
        return turning
    assert rope["rope_type"] == "llama3"
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] * turning / (2 * math.pi)
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return blend * turning + (1 - blend) * turning / rope["factor"]


def rotate(x: torch.Tensor, positions: torch.Tensor, rope: dict[str, Any]) -> torch.Tensor:
    """RoPE on `[head, token, channel]`: pair (p, p + half) turns with the position."""
    half = x.shape[-1] // 2
    angles = positions[:, None].double() * frequencies(rope, half)
    cos, sin = angles.cos().float(), angles.sin().float()
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def project(attention: Any, x: torch.Tensor, name: str) -> torch.Tensor:
    """Rows of `[token, width]` as heads `[head, token, channel]`, normed where Qwen3 norms them."""
    linear = getattr(attention, f"{name}_proj")
    rows = x @ linear.weight.T + (0 if linear.bias is None else linear.bias)
    heads = rows.unflatten(-1, (-1, attention.head_dim))
    norm = getattr(attention, f"{name}_norm", None)
    return (heads if norm is None else rms_norm(heads, norm)).transpose(0, 1)


def queries_keys_values(
    model: Any, layer: Any, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of one layer whose input is `x` `[token, width]`; queries and keys after RoPE."""
    positions, rope = torch.arange(len(x)), model.config.rope_parameters
    h = rms_norm(x, layer.input_layernorm)
    q, k, v = (project(layer.self_attn, h, name) for name in "qkv")
    return rotate(q, positions, rope), rotate(k, positions, rope), v


def softmax_scale(model: Any) -> float:
    scalar = getattr(model.config, "query_pre_attn_scalar", None)
    return float(scalar or model.model.layers[0].self_attn.head_dim) ** -0.5


def capped(x: torch.Tensor, cap: float | None) -> torch.Tensor:
    return x if cap is None else cap * torch.tanh(x / cap)


def logits(model: Any, ids: torch.Tensor, masks: list[torch.Tensor]) -> torch.Tensor:
    """Logits `[token, vocabulary]` when layer i attends through `masks[i]`, bool `[query, key]`."""
    config, gemma = model.config, model.config.model_type == "gemma2"
    x = model.model.embed_tokens.weight[ids] * (config.hidden_size**0.5 if gemma else 1)
    for layer, mask in zip(model.model.layers, masks, strict=True):
        q, k, v = queries_keys_values(model, layer, x)
        group = len(q) // len(k)
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        scores = q @ k.transpose(1, 2) * softmax_scale(model)
        scores = capped(scores, getattr(config, "attn_logit_softcapping", None))
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        attended = layer.self_attn.o_proj((weights @ v).transpose(0, 1).flatten(1))
        x = x + (rms_norm(attended, layer.post_attention_layernorm) if gemma else attended)
        if gemma:
            h = layer.mlp(rms_norm(x, layer.pre_feedforward_layernorm))
            x = x + rms_norm(h, layer.post_feedforward_layernorm)
        else:
            x = x + layer.mlp(rms_norm(x, layer.post_attention_layernorm))
    out = model.lm_head(rms_norm(x, model.model.norm))
    return capped(out, getattr(config, "final_logit_softcapping", None))


def windows(model: Any) -> list[int | None]:
    """Each layer's sliding window, by the families' own rules."""
    config, n = model.config, model.config.num_hidden_layers
    match config.model_type:
        case "mistral":
            return [config.sliding_window] * n
        case "gemma2":
            return [None if i % 2 else config.sliding_window for i in range(n)]
        case "qwen2" | "qwen3" if config.use_sliding_window:
            return [
                config.sliding_window if i >= config.max_window_layers else None for i in range(n)
            ]
    return [None] * n


def masks_after_dropping(
    model: Any, kept: list[torch.Tensor], n_prompt: int, n_tokens: int
) -> list[torch.Tensor]:
    """Each layer's mask; only rows from `n_prompt` on miss dropped tokens: the prefill saw all."""
    masks = []
    for positions, window in zip(kept, windows(model), strict=True):
        mask = torch.ones(n_tokens, n_tokens, dtype=torch.bool).tril()
        if window is not None:
            mask = mask.triu(1 - window)
        dropped = torch.ones(n_prompt, dtype=torch.bool)
        dropped[positions] = False
        mask[n_prompt:, :n_prompt] &= ~dropped
        masks.append(mask)
    return masks


def after_dropping(
    model: Any, kept: list[torch.Tensor], prompt: torch.Tensor, after: torch.Tensor
) -> torch.Tensor:
    """Logits `[1, after, vocabulary]` of a full recompute, without what each layer dropped."""
    ids = torch.cat([prompt, after], dim=1)[0]
    masks = masks_after_dropping(model, kept, prompt.shape[1], len(ids))
    return logits(model, ids, masks)[None, prompt.shape[1] :]
