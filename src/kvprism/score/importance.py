"""SpectrumKV's importance: its three statistics, and the ranking of a prompt's tokens by them."""

import math
from collections.abc import Sequence

import torch

from kvprism.errors import BadInput, MissingSignal
from kvprism.registry import Registry
from kvprism.score.attention import attention_logits
from kvprism.tensors import LayerView

SINKS = 4
DECAY = 0.01


def window_attention(view: LayerView) -> torch.Tensor:
    """SpectrumKV's A_j: the mean attention that the last window pays to each token, per KV head.

    Memory is O(q_head * window * token); the causal mask holds inside the window. Attention is over
    the view's own tokens: what has left a layer's sliding window will not be attended to again.

    Raises:
        MissingSignal: the capture recorded no queries.
    """
    if view.queries is None:
        raise MissingSignal(
            f"layer {view.kv.layer_id}: window attention needs the queries of the last window; "
            "capture with window >= 1, or choose importance 'position' or 'norm'"
        )
    # One key that is not finite would otherwise make the attention to every token NaN.
    logits = torch.nan_to_num(attention_logits(view, view.kv.components["k"].float()))
    return logits.softmax(dim=-1).mean(dim=(1, 2))


def position(view: LayerView) -> torch.Tensor:
    """The content-free heuristic that SpectrumKV's experiments ran (compute_importance_heuristic).

    Sinks 1, then exp(-0.01 (i - 4)) from the start of the text; the last fifth is at least a ramp
    from 0.3 to 0.8; min-max normalised.
    """
    heads, tokens = view.kv.components["k"].shape[:2]
    i = view.kv.positions.float()
    score = torch.where(i < SINKS, 1.0, torch.exp(-0.01 * (i - SINKS)))
    recent = tokens - int(0.8 * tokens)
    ramp = torch.linspace(0.3, 0.8, recent, device=i.device)
    score[tokens - recent :] = score[tokens - recent :].maximum(ramp)
    span = score.max() - score.min()
    return ((score - score.min()) / span.clamp_min(1e-12)).expand(heads, tokens)


def norm(view: LayerView) -> torch.Tensor:
    """SpectrumKV's fall-back without attention: key norm plus value norm (it gives no formula)."""
    k, v = view.kv.components["k"].float(), view.kv.components["v"].float()
    return torch.nan_to_num(k.norm(dim=-1) + v.norm(dim=-1))


SCORERS = Registry(
    "importance", [("attention", window_attention), ("position", position), ("norm", norm)]
)


def ranking(
    views: Sequence[LayerView], kind: str = "attention", decay: float = DECAY
) -> torch.Tensor:
    """SpectrumKV's importance I_j = A_j exp(-lambda Delta_j), Delta_j = n - j, in logarithms.

    A_j is the mean over the heads of all views; the result is float64 `[token]`. In logarithms,
    because exp(-lambda Delta_j) is 0 in float32 beyond 10,000 tokens (lambda = 0.01), and those
    tokens would all rank as one. `position` is a function of the distance, so it has no decay.

    Raises:
        MissingSignal: the scorer needs something that was not captured.
        UnknownName: no such kind.
        BadInput: a decay that is negative or not finite.
    """
    check_decay(decay)
    score = torch.stack([_mean_over_heads(view, kind) for view in views]).mean(dim=0)
    if kind == "position":
        return score
    distance = torch.arange(len(score), 0, -1, dtype=score.dtype, device=score.device)
    return score.clamp_min(torch.finfo(score.dtype).tiny).log() - decay * distance


def _mean_over_heads(view: LayerView, kind: str) -> torch.Tensor:
    return view.once(("importance", kind), lambda: SCORERS[kind](view).double().mean(dim=0))


def check_decay(decay: float) -> None:
    """Raises `BadInput` for a decay that is negative or not finite."""
    if not 0 <= decay < math.inf:
        raise BadInput(f"decay must be finite and not negative, got {decay}")
