"""ExpectedAttention: what queries to come will make of each key, from statistics of past ones."""

import torch

from kvprism.errors import MissingSignal
from kvprism.score.importance import SINKS
from kvprism.tensors import LayerView, QueryStatistics

# Positions after the prompt over which RoPE is averaged, as published.
FUTURE = 512


def expected_attention(view: LayerView) -> torch.Tensor:
    """ExpectedAttention (arXiv 2510.00636): a Gaussian query's attention, times ||v||.

    1. z_j = s mu.k_j + s^2 k_j.Sigma.k_j / 2: the logarithm of the expected exponential of the
       logit under a query of mean mu and covariance Sigma, s the softmax scale.
    2. softmax of z over the tokens, without the 4 sinks of the prompt.
    3. mean over the query heads of a KV head, times the length of the value.

    Sinks get the highest score. A logit soft cap is left out: the closed form has none. The paper's
    constant that is added before the product is 0, as in its code's default.

    Raises:
        MissingSignal: the capture was not asked for query statistics.
    """
    if view.future_queries is None:
        raise MissingSignal(
            f"layer {view.kv.layer_id}: expected-attention needs statistics of the queries, which "
            "were not captured; capture with signals={'future_queries'}, or choose keydiff, which "
            "needs the cache only"
        )
    keys = torch.nan_to_num(view.kv.components["k"].float()) * view.softmax_scale
    logits = torch.nan_to_num(_expected_logits(keys, view.future_queries))
    sinks = view.kv.positions < SINKS
    weights = logits.masked_fill(sinks, torch.finfo(logits.dtype).min).softmax(dim=-1).mean(dim=1)
    score = torch.nan_to_num(weights * view.kv.components["v"].float().norm(dim=-1))
    return torch.where(sinks, score.max(), score)


def _expected_logits(keys: torch.Tensor, statistics: QueryStatistics) -> torch.Tensor:
    """`[head, q_head of it, token]` from keys `[head, token, channel]` that carry the scale."""
    heads, _, channels = keys.shape
    mean = statistics.mean.reshape(heads, -1, channels)
    covariance = statistics.covariance.reshape(heads, -1, channels, channels)
    linear = mean @ keys.mT
    # One query head at a time: all of them would hold a copy of the keys each.
    spread = [((keys @ one) * keys).sum(dim=-1) for one in covariance.unbind(dim=1)]
    return linear + torch.stack(spread, dim=1) / 2


def query_statistics(
    queries: torch.Tensor, inverse_frequencies: torch.Tensor, future: int = FUTURE
) -> QueryStatistics:
    """Statistics of post-RoPE queries `[q_head, token, channel]` of the positions 0, 1, 2, ...

    RoPE is undone; mean and (population) covariance are over all positions of the prompt but its 4
    sinks, whose queries are outliers; then the rotation, averaged over the next `future` positions,
    is applied to both, as in the published code.
    """
    n = queries.shape[1]
    first = SINKS if n > SINKS else 0
    frequencies = inverse_frequencies.double().to(queries.device)
    past = torch.arange(first, n, device=queries.device)[:, None] * frequencies
    plain = _turn(queries[:, first:].float(), past.cos().float(), -past.sin().float())
    mean = plain.mean(dim=1)
    centred = plain - mean[:, None]
    covariance = centred.mT @ centred / centred.shape[1]
    ahead = torch.arange(n, n + future, device=queries.device)[:, None] * frequencies
    cos, sin = ahead.cos().mean(dim=0).float(), ahead.sin().mean(dim=0).float()
    turned = _turn(_turn(covariance, cos, sin).mT, cos, sin)
    return QueryStatistics(_turn(mean, cos, sin), turned)


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Channel i goes with channel i + half; the last axis of cos and sin is the pairs."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
