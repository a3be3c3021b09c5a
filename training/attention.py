"""Attention with a soft cap in blocks: eager attention writes the scores of all pairs of tokens."""

from typing import Any

import torch
from transformers import AttentionInterface

NAME = "softcap-blocks"
QUERIES = 128


def softcap_blocks(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    scaling: float,
    softcap: float,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention over whole sequences: a block of queries at a time, and the keys it sees.

    `query` [batch, heads, tokens, dim], `key` and `value` [batch, KV heads, tokens, dim]; the
    result is [batch, tokens, heads, dim], as transformers' attention functions return it.
    """
    batch, heads, tokens, dim = query.shape
    shared = heads // key.shape[1]
    grouped = (query * (scaling / softcap)).view(batch, heads // shared, shared, tokens, dim)
    transposed = key.transpose(2, 3).unsqueeze(2)
    blocks = []
    for start in range(0, tokens, QUERIES):
        stop = min(start + QUERIES, tokens)
        first = 0 if sliding_window is None else max(0, start - sliding_window + 1)
        scores = (grouped[..., start:stop, :] @ transposed[..., first:stop]).tanh()
        back = torch.arange(start, stop)[:, None] - torch.arange(first, stop)
        hidden = back < 0 if sliding_window is None else (back < 0) | (back >= sliding_window)
        unseen = torch.zeros(hidden.shape).masked_fill(hidden, float("-inf"))
        weights = torch.add(unseen, scores, alpha=softcap).softmax(dim=-1)
        blocks.append(weights @ value.unsqueeze(2)[..., first:stop, :])
    return torch.cat(blocks, dim=3).flatten(1, 2).transpose(1, 2).contiguous(), None


def register() -> None:
    """Make `softcap-blocks` an attention implementation that a recipe may name."""
    # It has no mask function there, so transformers hands over no mask.
    AttentionInterface.register(NAME, softcap_blocks)
