"""PolyKV's layer signals (arXiv 2606.15157, section 3.2): what says which policy suits a layer, and
how much a layer needs.

A signal compares a run on the full cache with runs in which one layer alone was evicted. Who runs
the model is `evaluate/layers.py`; here are the formulas.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch.nn import functional

from kvprism.errors import BadInput


def cosine(full: torch.Tensor, evicted: torch.Tensor) -> float:
    """The cosine of a layer's activations with and without eviction, mean over tokens.

    full, evicted: `[token, channel]`. The paper's C is the mean of this over calibration examples;
    it ranks policies, highest first.
    """
    return float(functional.cosine_similarity(full.double(), evicted.double(), dim=-1).mean())


def perplexity(losses: Iterable[tuple[float, int]]) -> float:
    """Of a set of documents: (summed NLL in nats, scored tokens) each.

    Raises:
        BadInput: no scored token.
    """
    nll, tokens = map(sum, zip(*losses, strict=True))
    if not tokens:
        raise BadInput("perplexity needs at least one scored token")
    return math.exp(nll / tokens)


def perplexity_sensitivity(
    full: Sequence[tuple[float, int]], evicted: Sequence[tuple[float, int]]
) -> float:
    """PPL with the layer evicted less PPL without; it ranks policies, lowest first."""
    return perplexity(evicted) - perplexity(full)


def worst_case(sensitivities: Mapping[str, float]) -> float:
    """What the worst policy does to a layer: the more, the larger the layer's share."""
    return max(sensitivities.values())


def attention_entropy(masses: Sequence[torch.Tensor]) -> float:
    """The entropy in nats of a layer's mean attention: the higher, the larger its share.

    masses: `[head, token]` per example, the attention that each key got from all queries
    (`score.accumulated.attention_mass`). The distribution is averaged over examples, queries and
    heads before its entropy is taken: the entropy of the mean, not the mean of entropies. Examples
    of unequal length are cut to the shortest.
    """
    shortest = min(mass.shape[-1] for mass in masses)
    parts = [mass[:, :shortest].double() for mass in masses]
    mean = torch.stack([(part / part.sum()).sum(dim=0) for part in parts]).mean(dim=0)
    share = mean / mean.sum()
    return float(-torch.special.xlogy(share, share).sum())
