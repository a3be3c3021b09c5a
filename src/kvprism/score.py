"""Pure scorers: LayerView -> float32 `[head, token]`, higher = keep, finite."""

import math

import torch

from kvprism.errors import BadInput, MissingSignal
from kvprism.registry import Registry
from kvprism.tensors import LayerView

SINKS = 4
DECAY = 0.01


def window_attention(view: LayerView) -> torch.Tensor:
    """Mean attention that the last window's queries pay to each token, per KV head (SpectrumKV A_j).

    Memory is O(q_head * window * token); the causal mask holds inside the window.

    Raises:
        MissingSignal: the capture recorded no queries.
    """
    if view.queries is None:
        raise MissingSignal(
            f"layer {view.kv.layer_id}: window attention needs the queries of the last window; "
            "capture with window >= 1, or choose importance 'position' or 'norm'"
        )
    keys = view.kv.components["k"].float()
    heads, tokens, channels = keys.shape
    queries = view.queries.float()
    window = queries.shape[1]
    logits = queries.reshape(heads, -1, channels) @ keys.transpose(1, 2) * view.softmax_scale
    logits = logits.view(heads, -1, window, tokens)
    if view.softcap is not None:
        logits = torch.tanh(logits / view.softcap) * view.softcap
    future = torch.ones(window, tokens, dtype=torch.bool).triu(tokens - window + 1)
    return logits.masked_fill(future, -math.inf).softmax(dim=-1).mean(dim=(1, 2))


def position(view: LayerView) -> torch.Tensor:
    """The content-free heuristic that SpectrumKV's experiments ran (compute_importance_heuristic).

    Sinks 1, then exp(-0.01 (i - 4)) from the start of the text; the last fifth is at least a ramp
    from 0.3 to 0.8; min-max normalised.
    """
    heads, tokens = view.kv.components["k"].shape[:2]
    i = torch.arange(tokens, dtype=torch.float32)
    score = torch.where(i < SINKS, 1.0, torch.exp(-0.01 * (i - SINKS)))
    recent = tokens - int(0.8 * tokens)
    score[tokens - recent :] = score[tokens - recent :].maximum(torch.linspace(0.3, 0.8, recent))
    span = score.max() - score.min()
    return ((score - score.min()) / span.clamp_min(1e-12)).expand(heads, tokens)


def norm(view: LayerView) -> torch.Tensor:
    """SpectrumKV's fall-back without attention: key norm plus value norm (the paper gives no formula)."""
    k, v = view.kv.components["k"].float(), view.kv.components["v"].float()
    return torch.nan_to_num(k.norm(dim=-1) + v.norm(dim=-1))


SCORERS = Registry(
    "importance", [("attention", window_attention), ("position", position), ("norm", norm)]
)


def importance(view: LayerView, kind: str = "attention", decay: float = DECAY) -> torch.Tensor:
    """SpectrumKV's I_j = A_j exp(-lambda Delta_j), Delta_j = n - j, as float32 `[head, token]`.

    `position` is itself a function of the distance, so no decay is applied to it.

    Raises:
        MissingSignal, UnknownName, BadInput: no queries; no such kind; a negative decay.
    """
    if decay < 0:
        raise BadInput(f"decay must not be negative, got {decay}")
    score = SCORERS[kind](view)
    if kind == "position":
        return score
    distance = score.shape[1] - torch.arange(score.shape[1], dtype=torch.float32)
    return score * torch.exp(-decay * distance)
