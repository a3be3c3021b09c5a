"""Scores from the cache alone: no query, no attention, so any prefill can give them."""

import torch

from kvprism.tensors import LayerView


def recency(view: LayerView) -> torch.Tensor:
    """StreamingLLM (arXiv 2309.17453, section 3.2): the later the better; its sinks are protected.

    Float32 positions, distinct up to 2^24 tokens.
    """
    heads = view.kv.components["k"].shape[0]
    return view.kv.positions.float().expand(heads, -1)


def keydiff(view: LayerView) -> torch.Tensor:
    """KeyDiff (arXiv 2504.15364): keys that differ most from the mean direction.

    Minus the cosine between a key and the anchor, the mean of all normalised keys of its head. Keys
    are as cached, after RoPE, and all at once (the paper works through blocks of a long prompt).
    """
    keys = torch.nan_to_num(view.kv.components["k"].float())
    directions = torch.nan_to_num(torch.nn.functional.normalize(keys, dim=-1))
    anchor = torch.nn.functional.normalize(directions.mean(dim=1, keepdim=True), dim=-1)
    return -(directions * anchor).sum(dim=-1)


def knorm(view: LayerView) -> torch.Tensor:
    """L2 norm of keys (arXiv 2406.11430): low norms attract attention, so keep those.

    The paper leaves the first two layers whole in one of its experiments; here every layer is cut.
    """
    return -torch.nan_to_num(view.kv.components["k"].float().norm(dim=-1))
