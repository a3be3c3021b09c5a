"""Published formulas again, in float64 and one number at a time."""

import math

import numpy as np
import torch
from strategies import cache, view_of

from kvprism.tensors import LayerView

EPSILON = 2.0**-23


def attention(view: LayerView, window: int = 32) -> np.ndarray:
    """`[q_head, query, token]` of the last `window` queries, at most; zero after a query."""
    assert view.queries is not None
    keys = view.kv.components["k"].double().numpy()
    queries = view.queries[:, -window:].double().numpy()
    heads, tokens, _ = keys.shape
    q_heads, n, _ = queries.shape
    weights = np.zeros((q_heads, n, tokens))
    for q_head in range(q_heads):
        for w in range(n):
            visible = range(tokens - n + w + 1)
            head = q_head // (q_heads // heads)
            logits = [
                cap(view.softmax_scale * float(np.dot(queries[q_head, w], keys[head, j])), view)
                for j in visible
            ]
            exps = [math.exp(x - max(logits)) for x in logits]
            for j in visible:
                weights[q_head, w, j] = exps[j] / sum(exps)
    return weights


def cap(x: float, view: LayerView) -> float:
    return x if view.softcap is None else view.softcap * math.tanh(x / view.softcap)


def group_of(view: LayerView, head: int) -> range:
    """The query heads that share a KV head."""
    assert view.queries is not None
    group = view.queries.shape[0] // view.kv.components["k"].shape[0]
    return range(head * group, (head + 1) * group)


def averaged(row: list[float], kernel: int) -> list[float]:
    """Average pooling; beyond the ends there are zeros."""
    half, n = kernel // 2, len(row)
    return [sum(row[max(0, j - half) : min(n, j + half + 1)]) / kernel for j in range(n)]


def highest(row: list[float], kernel: int) -> list[float]:
    half = kernel // 2
    return [max(row[max(0, j - half) : j + half + 1]) for j in range(len(row))]


def relative_error(view: LayerView) -> float:
    """What float32 may add to a probability: each logit is a sum of `channels` rounded products."""
    assert view.queries is not None
    channels = view.queries.shape[-1]
    largest = float(
        view.queries.norm(dim=-1).max() * view.kv.components["k"].float().norm(dim=-1).max()
    )
    return EPSILON * (2 * (channels + 4) * largest * view.softmax_scale + 32)


def made(tokens: int, window: int, group: int = 2, softcap: float | None = None) -> LayerView:
    """A layer of two KV heads, its values as uneven as its keys."""
    kv = cache(layers=1, heads=2, tokens=tokens, channels=8)
    [view] = view_of(kv, window=window, group=group)
    norms = view.output_norms
    return LayerView(view.kv, view.queries, view.softmax_scale, softcap, output_norms=norms)


def as_array(score: torch.Tensor) -> np.ndarray:
    assert score.dtype == torch.float32 and bool(score.isfinite().all())
    return score.double().numpy()
