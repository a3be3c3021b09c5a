"""Merging policies: what becomes of kept rows when others are dropped, before they are encoded.

A rewrite is a pure function from (LayerView, LayerPlan) to the layer's tensors. It changes kept
rows only, all of them from what they were before, so that positions and sizes stay as planned.
Sums are float64; a row that would leave its dtype's range stays as it was.
"""

import math

import torch

from kvprism.plans import LayerPlan
from kvprism.score.attention import WINDOW, window_weights
from kvprism.solve import DROP_INDEX
from kvprism.tensors import LayerKV, LayerView

# CaM's m: over how many kept tokens a dropped value is spread, as in its published code.
MERGE_BUDGET = 32
# Dropped tokens whose similarities exist at once: memory is O(chunk * token), not token squared.
CHUNK = 512


def cam(view: LayerView, planned: LayerPlan) -> LayerKV:
    """CaM (ICML 2024, "Cache Merging for Memory-efficient LLMs Inference"): values only.

    A dropped token i is merged with probability min(1, a_i / max a_j), a the mean attention of the
    window's queries, j the last 32 tokens: v_i / m is added to the values of the m = 32 kept tokens
    after it (of as many as there are). Heads draw for themselves. The draws are seeded by the
    layer's number and last position, so that a plan has one rewrite and every step its own draws.

    The paper merges while it decodes, one token a step, and so may pass on what was merged into a
    token before; here all are merged at once, each with its own value.

    Raises:
        MissingSignal: the capture recorded no queries.
    """
    kept, dropped = _rows(view, planned)
    seed = int(view.kv.positions[-1]) * 2**16 + view.kv.layer_id
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(kept.shape, generator=generator).to(kept.device)
    values = view.kv.components["v"].double()
    merged = dropped & (drawn < merge_chances(view)) & values.isfinite().all(dim=-1)
    added = [_spread(*head) for head in zip(values, kept, merged, strict=True)]
    return _rewritten(view.kv, {"v": values + torch.stack(added)}, kept)


def merge_chances(view: LayerView) -> torch.Tensor:
    """CaM's probability that a token is merged when it is dropped, float32 `[head, token]`."""
    attention = window_weights(view).mean(dim=(1, 2))
    highest = attention[:, -WINDOW:].amax(dim=-1, keepdim=True)
    return (attention / highest.clamp_min(torch.finfo(attention.dtype).tiny)).clamp(max=1)


def _spread(values: torch.Tensor, kept: torch.Tensor, merged: torch.Tensor) -> torch.Tensor:
    """What each token of one head `[token, channel]` gets from the merged ones before it."""
    first = kept.cumsum(dim=0)[merged]  # the number of the next kept token
    last = (first + MERGE_BUDGET).clamp(max=int(kept.sum()))
    share = values[merged] / (last - first).clamp_min(1)[:, None]
    steps = values.new_zeros(int(kept.sum()) + 1, values.shape[1])
    steps.index_add_(0, first, share).index_add_(0, last, -share)
    added = torch.zeros_like(values)
    added[kept] = steps.cumsum(dim=0)[:-1]
    return added


def d2o(view: LayerView, planned: LayerPlan) -> LayerKV:
    """D2O's compensation (arXiv 2406.13035): keys and values, into the most similar kept token.

    A dropped token i goes with the kept token j whose key (as cached, after RoPE) has the highest
    cosine u_i to its own, if u_i is at least the mean of all u of its head: the paper's threshold
    where it begins, before it becomes a running mean of decode steps. With all i that go with j,

        x_j <- (e x_j + sum exp(u_i) x_i) / (e + sum exp(u_i)).
    """
    kept, dropped = _rows(view, planned)
    components = {name: view.kv.components[name].double() for name in ("k", "v")}
    for x in components.values():
        dropped = dropped & x.isfinite().all(dim=-1)
    heads = [_compensated(*head) for head in zip(*components.values(), kept, dropped, strict=True)]
    k, v = (torch.stack(rows) for rows in zip(*heads, strict=True))
    return _rewritten(view.kv, {"k": k, "v": v}, kept)


def _compensated(
    k: torch.Tensor, v: torch.Tensor, kept: torch.Tensor, dropped: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values `[token, channel]` of one head with the dropped rows merged in."""
    if not kept.any() or not dropped.any():
        return k, v
    directions = torch.nan_to_num(torch.nn.functional.normalize(k, dim=-1))
    nearest = [
        (chunk @ directions[kept].mT).max(dim=-1)
        for chunk in torch.split(directions[dropped], CHUNK)
    ]
    similarity, target = (torch.cat(parts) for parts in zip(*nearest, strict=True))
    close = similarity >= similarity.mean()
    weight, target = similarity[close].exp()[:, None], target[close]
    total = weight.new_full((int(kept.sum()), 1), math.e).index_add_(0, target, weight)
    merged = []
    for x in (k, v):
        x = x.clone()
        x[kept] = (math.e * x[kept]).index_add_(0, target, weight * x[dropped][close]) / total
        merged.append(x)
    return merged[0], merged[1]


def _rows(view: LayerView, planned: LayerPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """Kept and dropped rows, bool `[head, token]`; padding of heads is neither."""
    tiers = torch.from_numpy(planned.tier_of["k"].copy()).to(view.kv.positions.device)
    held = torch.ones_like(tiers, dtype=torch.bool) if view.kv.held is None else view.kv.held
    return (tiers != DROP_INDEX) & held, (tiers == DROP_INDEX) & held


def _rewritten(kv: LayerKV, rows: dict[str, torch.Tensor], kept: torch.Tensor) -> LayerKV:
    """The layer with `rows` where it is kept and they are finite in all of these components."""
    cast = {name: x.to(kv.dtype) for name, x in rows.items()}
    for x in cast.values():
        kept = kept & x.isfinite().all(dim=-1)
    new = {name: torch.where(kept[..., None], x, kv.components[name]) for name, x in cast.items()}
    return LayerKV(kv.layer_id, {**kv.components, **new}, kv.positions, kv.held)
