"""Layer splits: how a budget of tokens is shared between layers, as a weight for each.

Weights say who gets the next token beyond the protected ones (`evict.py` grants them one by one);
None means that tokens of all layers compete by score. A later split may come from a profile.
"""

import math
from collections.abc import Callable, Sequence

import torch

from kvprism.score.attention import prefix_weights, query_variance
from kvprism.tensors import LayerView

Scores = Sequence[torch.Tensor]
# (number of layers, their views and their scores) -> a weight per layer. In a dry run there are no
# views: a split that follows the data is uniform then.
LayerSplit = Callable[[int, Sequence[LayerView], Scores], Sequence[float] | None]

# PyramidKV's beta: the last layer gets 1 / beta of the mean.
BETA = 20.0
# CAKE's temperatures, as published for Llama-3.1-8B at 1,024 tokens; they differ between models.
DISPERSION_TEMPERATURE, SHIFT_TEMPERATURE = 1.6, 0.4
# The smallest weight, so that a layer without any claim still gets tokens once all others are full.
LEAST = 1e-30


def uniform(n: int, views: Sequence[LayerView], scores: Scores) -> list[float]:
    """Every layer the same number of tokens."""
    return [1.0] * n


def pyramid(n: int, views: Sequence[LayerView], scores: Scores) -> list[float]:
    """PyramidKV (arXiv 2406.02069): from 2 - 1/beta times the mean down to 1/beta, in equal steps.

    A layer that is full passes on what is left to all others by their weights; the published code
    flattens the whole pyramid instead.
    """
    first, step = 2 - 1 / BETA, 2 - 2 / BETA
    return [first - step * i / (n - 1) for i in range(n)] if n > 1 else [1.0]


def cake_preference(n: int, views: Sequence[LayerView], scores: Scores) -> list[float]:
    """CAKE's layer preference (arXiv 2503.12491): H^(1/tau1) V^(1/tau2).

    From the window's attention to the prefix: H is its entropy, summed over heads and queries, V
    its variance over the queries (the population's), summed over heads and tokens.
    """
    if not views:
        return uniform(n, views, scores)
    logs = torch.stack([_preference(prefix_weights(view).double()) for view in views])
    weights: list[float] = (logs - logs.max()).exp().clamp_min(LEAST).tolist()
    return weights


def _preference(prefix: torch.Tensor) -> torch.Tensor:
    """The logarithm of a layer's preference; in float64, because V^2.5 leaves float32's range."""
    entropy = -torch.special.xlogy(prefix, prefix).sum()
    variance = query_variance(prefix).sum()
    tiny = torch.finfo(prefix.dtype).tiny
    dispersion, shift = (x.clamp_min(tiny).log() for x in (entropy, variance))
    return dispersion / DISPERSION_TEMPERATURE + shift / SHIFT_TEMPERATURE


def lava_entropy(n: int, views: Sequence[LayerView], scores: Scores) -> list[float]:
    """LAVa (arXiv 2509.09754): the entropy of a layer's scores over its largest possible entropy.

    Scores of all heads and prefix tokens of a layer are one distribution.
    """
    if not views:
        return uniform(n, views, scores)
    return [
        _evenness(score[:, : prefix_weights(view).shape[-1]].double())
        for view, score in zip(views, scores, strict=True)
    ]


def _evenness(score: torch.Tensor) -> float:
    flat = score.flatten()
    if len(flat) < 2:
        return LEAST
    share = flat / flat.sum().clamp_min(torch.finfo(flat.dtype).tiny)
    entropy = -torch.special.xlogy(share, share).sum()
    return max(LEAST, float(entropy) / math.log(len(flat)))


def pooled(n: int, views: Sequence[LayerView], scores: Scores) -> list[float] | None:
    """Layer-DefensiveKV (arXiv 2510.13334): one top-k over the scores of all layers."""
    return None if views else uniform(n, views, scores)
