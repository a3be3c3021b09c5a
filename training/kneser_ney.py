"""Interpolated Kneser-Ney: what counting words can do, for a trained model to be compared with.

Chen & Goodman, An Empirical Study of Smoothing Techniques (1998), section 2.8 with interpolation
and one discount per order, D = n1 / (n1 + 2 n2).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvprism.evaluate.texts import Ids

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Level:
    """Counts of one order: of n-grams by sorted key, and of their contexts.

    totals: of a context, the sum of its counts; kinds: how many different tokens follow it.
    """

    keys: Ids
    counts: Ids
    contexts: Ids
    totals: Ids
    kinds: Ids
    discount: float

    @classmethod
    def of(cls, keys: Ids, counts: Ids, vocabulary: int) -> "Level":
        contexts, first = np.unique(keys // vocabulary, return_index=True)
        once, twice = (int((counts == n).sum()) for n in (1, 2))
        return cls(
            keys,
            counts,
            contexts,
            np.add.reduceat(counts, first),
            np.diff(np.append(first, len(keys))),
            # Where nothing occurs once there is nothing to estimate it from.
            once / (once + 2 * twice) if once else 0.5,
        )

    def interpolate(self, context: Ids, key: Ids, lower: Floats) -> Floats:
        """Probability of `key` after `context`, given the lower order's."""
        count = _look_up(self.keys, self.counts, key)
        total = _look_up(self.contexts, self.totals, context)
        kinds = _look_up(self.contexts, self.kinds, context)
        seen = np.maximum(total, 1)
        found = (np.maximum(count - self.discount, 0) + self.discount * kinds * lower) / seen
        return np.where(total > 0, found, lower)


@dataclass(frozen=True, eq=False)
class Trigram:
    """Orders 3, 2 and 1 over token ids below `vocabulary`."""

    vocabulary: int
    levels: tuple[Level, Level, Level]

    @classmethod
    def fit(cls, ids: Ids, vocabulary: int) -> "Trigram":
        """Count `ids`, int64 `[token]`; the lower orders count contexts, not occurrences."""
        v = vocabulary
        keys, counts = np.unique((ids[:-2] * v + ids[1:-1]) * v + ids[2:], return_counts=True)
        pairs, pair_kinds = np.unique(keys % v**2, return_counts=True)
        singles, single_kinds = np.unique(pairs % v, return_counts=True)
        three, two, one = (
            Level.of(key, count.astype(np.int64), v)
            for key, count in ((keys, counts), (pairs, pair_kinds), (singles, single_kinds))
        )
        return cls(v, (three, two, one))

    def probabilities(self, first: Ids, second: Ids, token: Ids) -> Floats:
        """P(token | first second), elementwise."""
        v = self.vocabulary
        three, two, one = self.levels
        uniform = np.full(len(token), 1 / v)
        unigram = one.interpolate(np.zeros_like(token), token, uniform)
        bigram = two.interpolate(second, second * v + token, unigram)
        pair = first * v + second
        return three.interpolate(pair, pair * v + token, bigram)

    def perplexity(self, ids: Ids) -> float:
        """Of every token of `ids` after the first two; the two before each are always seen."""
        found = self.probabilities(ids[:-2], ids[1:-1], ids[2:])
        return float(np.exp(-np.log(found).mean()))


def _look_up(keys: Ids, values: Ids, wanted: Ids) -> Ids:
    """`values` at `wanted`, 0 where a key is missing; `keys` ascend."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)
