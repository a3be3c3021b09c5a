"""Scores from the attention of the last window: SnapKV and what came after it.

Softmax is over all visible keys; what is scored is the prefix, the tokens before the window. The
window's own tokens get the prefix's highest score: the policies keep them in any case. Query heads
that share a KV head (GQA) are averaged unless it says otherwise. Equations are named by what they
define, not by number: numbers change between versions of a paper.
"""

import torch
from torch.nn import functional

from kvprism.score.attention import prefix_weights, query_variance, window_weights
from kvprism.score.output import relative_output_norms
from kvprism.tensors import LayerView

# CAKE's gamma, as in its published code: how much fluctuation counts.
GAMMA = 200.0


def snapkv(view: LayerView) -> torch.Tensor:
    """SnapKV (arXiv 2404.14469): the window's votes, clustered by pooling.

    The sum over the window's queries of their attention to each prefix token, average-pooled over 5
    neighbours. The paper leaves the window to the experiment (16 to 64) and pools by 5 or 7; this
    is 32 and 5. Query heads are averaged before pooling, so that what is kept is one KV row.
    """
    return _whole(_average(prefix_weights(view).sum(dim=2).mean(dim=1)), view)


def votes(view: LayerView) -> torch.Tensor:
    """`snapkv` without its pooling, as CaM's published comparisons rank tokens."""
    return _whole(prefix_weights(view).sum(dim=2).mean(dim=1), view)


def max_pooled(view: LayerView) -> torch.Tensor:
    """SnapKV's score as Ada-KV and LAVa take it: mean over the window, max-pooled over 7."""
    return _whole(_maximum(prefix_weights(view).mean(dim=(1, 2))), view)


def tova(view: LayerView) -> torch.Tensor:
    """TOVA (arXiv 2401.06104): the last query's attention, mean over all heads of the layer.

    One score per token, the same for every KV head.
    """
    weights = window_weights(view, 1)
    return weights.mean(dim=(0, 1, 2)).expand(weights.shape[0], -1)


def scissorhands(view: LayerView) -> torch.Tensor:
    """Scissorhands (arXiv 2305.17118, algorithm 2): how often a token was important.

    A token is important to a query when it gets more than 1/t, the average attention of the t
    tokens that the query sees. The count is over the window's queries and the query heads of a KV
    head; the paper's history is longer (it runs while it decodes). Its counts tie often and it does
    not say what then: ties go to the higher mean attention, which is below one count.
    """
    weights = window_weights(view)
    window, tokens = weights.shape[2:]
    visible = torch.arange(tokens - window + 1, tokens + 1, device=weights.device)
    important = weights > (1.0 / visible)[:, None]
    return important.sum(dim=(1, 2)) + weights.mean(dim=(1, 2))


def cake(view: LayerView) -> torch.Tensor:
    """CAKE's eviction indicator (arXiv 2503.12491): mean attention plus gamma times its variance.

    Over the window's queries, gamma = 200, average-pooled over 5, mean over the query heads of a KV
    head. The variance is the population's; with one query it is 0.
    """
    prefix = prefix_weights(view)
    score = prefix.mean(dim=2) + GAMMA * query_variance(prefix)
    return _whole(_average(score).mean(dim=1), view)


def lava(view: LayerView) -> torch.Tensor:
    """LAVa (arXiv 2509.09754): attention times the head's largest value, to compare heads.

    The mean over the window, max-pooled over 7, times max_j ||v_j||_1 over the prefix; of the query
    heads of a KV head the largest counts.
    """
    pooled = _maximum(prefix_weights(view).mean(dim=2))
    values = torch.nan_to_num(view.kv.components["v"].float())[:, : pooled.shape[-1]]
    norms = values.abs().sum(dim=-1)
    largest = norms.amax(dim=-1) if norms.shape[-1] else norms.sum(dim=-1)
    return _whole(torch.nan_to_num(pooled * largest[:, None, None]).amax(dim=1), view)


def defensivekv(view: LayerView) -> torch.Tensor:
    """DefensiveKV (arXiv 2510.13334): the worst case over window and group, never below the mean.

    Each query's attention is average-pooled over 5 and scaled back to the mass that it had on the
    prefix; then the maximum over the query heads of a KV head and over the window, clamped from
    below by its mean over the prefix, times CriticalKV's ||v W_o||_1 over the layer's mean of it.

    The factor is normalised, and its source does not say how: the layer's mean leaves heads as they
    are to each other and makes layers comparable. The first stage, which protects what has 90 % of
    the attention mass before the factor acts, is left out.

    Raises:
        MissingSignal: no queries, or the capture was not asked for the projected values' norms.
    """
    prefix = prefix_weights(view)
    pooled = _average(prefix)
    mass = prefix.sum(dim=-1, keepdim=True) / pooled.sum(dim=-1, keepdim=True).clamp_min(1e-30)
    worst = (pooled * mass).amax(dim=(1, 2))
    floored = worst.maximum(worst.mean(dim=-1, keepdim=True))
    return _whole(floored * relative_output_norms(view)[:, : floored.shape[-1]], view)


def _average(score: torch.Tensor, kernel: int = 5) -> torch.Tensor:
    """Average pooling over the last axis; beyond its ends there are zeros."""
    if not score.shape[-1]:
        return score
    flat = score.reshape(-1, 1, score.shape[-1])
    return functional.avg_pool1d(flat, kernel, 1, kernel // 2).reshape(score.shape)


def _maximum(score: torch.Tensor, kernel: int = 7) -> torch.Tensor:
    if not score.shape[-1]:
        return score
    flat = score.reshape(-1, 1, score.shape[-1])
    return functional.max_pool1d(flat, kernel, 1, kernel // 2).reshape(score.shape)


def _whole(score: torch.Tensor, view: LayerView) -> torch.Tensor:
    """Scores of the prefix `[head, prefix]` and, with its highest, of the window."""
    missing = len(view.kv.positions) - score.shape[-1]
    highest = float(score.max()) if score.shape[-1] else 0.0
    return functional.pad(score, (0, missing), value=highest)
