"""Attention of all queries of a prompt, added up as it is prefilled."""

import torch

from kvprism.errors import MissingSignal
from kvprism.tensors import LayerView

# Queries whose attention exists at once: memory is O(q_head * chunk * token), not token squared.
CHUNK = 128


def h2o(view: LayerView) -> torch.Tensor:
    """H2O (arXiv 2306.14048, algorithm 1): accumulated attention, the column sums of the softmax.

    Over all queries of the prompt, mean over the query heads of a KV head, no pooling. The paper
    halves its budget between these heavy hitters and the most recent tokens; here the recent ones
    are a fixed window, as in later papers' comparisons, so that policies differ in their scores.

    Raises:
        MissingSignal: the capture was not asked for the attention mass.
    """
    if view.mass is None:
        raise MissingSignal(
            f"layer {view.kv.layer_id}: h2o needs the attention mass of all queries, which was not "
            "captured; capture with signals={'mass'}, or choose snapkv, which needs the last "
            "window only"
        )
    return torch.nan_to_num(view.mass)


def attention_mass(
    queries: torch.Tensor,
    keys: torch.Tensor,
    softmax_scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """Column sums of the causal softmax, float32 `[head, token]`, mean over query heads.

    queries: `[q_head, token, channel]`, keys: `[head, token, channel]`, of the same positions;
    window: how many positions a query sees, itself included. The matrix never exists whole.
    """
    heads, tokens, channels = keys.shape
    grouped = queries.reshape(heads, -1, tokens, channels)
    mass = torch.zeros(heads, tokens, device=keys.device)
    for start in range(0, tokens, CHUNK):
        stop = min(start + CHUNK, tokens)
        low = 0 if window is None else max(0, start - window + 1)
        logits = grouped[:, :, start:stop].float() @ keys[:, None, low:stop].float().mT
        # In place throughout: a new block of this size for each step costs more than the step.
        logits = logits.mul_(softmax_scale).nan_to_num_()
        if softcap is not None:
            logits.div_(softcap).tanh_().mul_(softcap)
        first = start if window is None else low  # without a window all see what was before
        hidden = _hidden(range(start, stop), range(first, stop), window, keys.device)
        logits[..., first - low :].masked_fill_(hidden, -torch.inf)
        weights = torch.softmax(logits, dim=-1, out=logits)
        mass[:, low:stop] += weights.sum(dim=2).mean(dim=1)
    return mass


def attention_paid(
    queries: torch.Tensor,
    keys: torch.Tensor,
    softmax_scale: float,
    softcap: float | None,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """The mass that one call adds while tokens are generated, float32 `[head, token]`.

    queries: `[q_head, query, channel]`, keys: `[head, token, channel]`; mask: the call's own
    `[1 or q_head, query, token]`, bool or added to the logits, or None: causal, the queries last.
    """
    q_heads, n_queries, channels = queries.shape
    heads, tokens, _ = keys.shape
    grouped = queries.float().reshape(heads, -1, channels) @ keys.float().mT * softmax_scale
    logits = torch.nan_to_num(grouped).view(q_heads, n_queries, tokens)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if mask is None:
        seen = torch.ones(n_queries, tokens, dtype=torch.bool, device=logits.device)
        mask = seen.tril(tokens - n_queries)
    if mask.dtype == torch.bool:
        logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    else:
        logits = logits + mask.float()
    weights = logits.softmax(dim=-1).sum(dim=1)
    return weights.view(heads, -1, tokens).mean(dim=1)


def _hidden(queries: range, keys: range, window: int | None, device: torch.device) -> torch.Tensor:
    """`[query, key]`: what a query does not see, the future and what has left its window."""
    at = torch.arange(queries.start, queries.stop, device=device)[:, None]
    key = torch.arange(keys.start, keys.stop, device=device)
    return (key > at) if window is None else (key > at) | (key <= at - window)
