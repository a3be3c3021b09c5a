"""Attention of captured queries to a layer's keys: what most scorers are made of."""

from dataclasses import replace

import torch

from kvprism.errors import MissingSignal
from kvprism.tensors import LayerView

WINDOW = 32  # queries that a scorer looks at, at most: what `capture` records by default


def last_queries(
    before: torch.Tensor | None, new: torch.Tensor, window: int = WINDOW
) -> torch.Tensor:
    """The last `window` of the queries `[q_head, token, channel]` of two calls, on their own."""
    new = new[:, -window:]
    parts = [new] if before is None else [before, new]
    return torch.cat(parts, dim=1)[:, -window:].clone()  # a view would keep all of them alive


def attention_logits(view: LayerView, keys: torch.Tensor) -> torch.Tensor:
    """What the captured queries make of `keys` `[head, token, channel]`, in their dtype.

    `[head, q_head of it, window, token]`; after a query, and where a head holds no row, stands the
    dtype's lowest number: its probability is 0, and 0 times its logarithm is 0 too.
    """
    assert view.queries is not None
    heads, tokens, channels = keys.shape
    window = view.queries.shape[1]
    queries = view.queries.to(keys.dtype).reshape(heads, -1, channels)
    logits = (queries @ keys.transpose(1, 2)).mul_(view.softmax_scale)
    if view.softcap is not None:
        logits = logits.div_(view.softcap).tanh_().mul_(view.softcap)
    logits = logits.view(heads, -1, window, tokens)
    if view.kv.held is not None:
        padding = ~view.kv.held[:, None, None]
        logits.masked_fill_(padding, torch.finfo(logits.dtype).min)
    # The window stands at the end: no query of it has a future before its own positions.
    future = torch.ones(window, window, dtype=torch.bool, device=logits.device).triu(1)
    logits[..., tokens - window :].masked_fill_(future, torch.finfo(logits.dtype).min)
    return logits


def window_weights(view: LayerView, window: int = WINDOW) -> torch.Tensor:
    """Attention probabilities of the last `window` queries (or as many as were captured).

    Float32 `[head, q_head of it, window, token]`, causal within the window. Memory is
    O(q_head * window * token). Attention is over the view's own tokens: what has left a layer's
    sliding window will not be attended to again.

    Raises:
        MissingSignal: the capture recorded no queries.
    """
    if view.queries is None:
        raise MissingSignal(
            f"layer {view.kv.layer_id}: this scorer needs the queries of the last window, and none "
            "were captured; capture with window >= 1, or choose streaming-llm, keydiff or knorm"
        )
    recent = replace(view, queries=view.queries[:, -window:])
    # One key that is not finite would otherwise make the attention to every token NaN.
    logits = torch.nan_to_num(attention_logits(recent, view.kv.components["k"].float()))
    return logits.softmax(dim=-1)


def prefix_weights(view: LayerView) -> torch.Tensor:
    """`window_weights` of the tokens before the window: `[head, q_head of it, window, prefix]`."""
    weights = window_weights(view)
    return weights[..., : weights.shape[-1] - weights.shape[2]]


def query_variance(weights: torch.Tensor) -> torch.Tensor:
    """The population variance over the window, axis 2; 0 where the window is one query."""
    return (weights - weights.mean(dim=2, keepdim=True)).square().mean(dim=2)
