"""Pure scorers: LayerView -> float32 `[head, token]`, higher = keep, finite.

One file per source of evidence: `importance` is SpectrumKV's; the eviction policies read the
attention of the last window (`window`), of all queries (`accumulated`), of queries to come
(`expected`), what values become in the layer's output (`output`), or the cache alone (`keys`).
"""

from kvprism.score.attention import attention_logits
from kvprism.score.importance import (
    DECAY,
    SCORERS,
    SINKS,
    check_decay,
    norm,
    position,
    ranking,
    window_attention,
)

__all__ = [
    "DECAY",
    "SCORERS",
    "SINKS",
    "attention_logits",
    "check_decay",
    "norm",
    "position",
    "ranking",
    "window_attention",
]
