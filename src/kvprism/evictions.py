"""Eviction policies as rows: a scorer, a split between layers, a split between heads, protection.

All that a row says is about one layer, but for the split between layers, so that a later policy can
take each layer's problem from another row and give the layers weights of its own.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from kvprism.core import Capability, KVShape, LayerShape, Tier
from kvprism.errors import BadInput
from kvprism.evict import EvictionProblem, Heads, LayerProblem, grants
from kvprism.layout import Split
from kvprism.merge import cam, d2o
from kvprism.plans import LayerPlan
from kvprism.registry import Registry
from kvprism.score import SINKS
from kvprism.score.accumulated import h2o
from kvprism.score.attention import WINDOW
from kvprism.score.expected import expected_attention
from kvprism.score.keys import keydiff, knorm, recency
from kvprism.score.window import (
    cake,
    defensivekv,
    lava,
    max_pooled,
    scissorhands,
    snapkv,
    tova,
    votes,
)
from kvprism.split import LayerSplit, cake_preference, lava_entropy, pooled, pyramid, uniform
from kvprism.tensors import LayerKV, LayerView, Signal

Scorer = Callable[[LayerView], torch.Tensor]
Rewrite = Callable[[LayerView, LayerPlan], LayerKV]


@dataclass(frozen=True)
class Protection:
    """How many of a prompt's first and last tokens every eviction policy keeps in any case.

    Raises:
        BadInput: a negative number.

    Example:
        >>> Protection.parse("4+32"), str(Protection(0, 1))
        (Protection(sinks=4, recent=32), '0+1')
    """

    sinks: int
    recent: int

    def __post_init__(self) -> None:
        if min(self.sinks, self.recent) < 0:
            raise BadInput(f"protected tokens must not be negative, got {self}")

    def __str__(self) -> str:
        return f"{self.sinks}+{self.recent}"

    @classmethod
    def parse(cls, text: str) -> "Protection":
        """From `4+32`; `BadInput` for anything else."""
        match = re.fullmatch(r"\s*([0-9]+)\s*\+\s*([0-9]+)\s*", text)
        if match is None:
            raise BadInput(
                f"protected tokens are the first and the last of a prompt, such as 4+32: {text!r}"
            )
        return cls(int(match[1]), int(match[2]))


@dataclass(frozen=True)
class Eviction:
    """One row: what a token is worth, who shares the budget how, and what is kept in any case.

    heads: the split that the paper has; a receiver that holds one set of tokens per layer gets
    `shared` instead. sinks, recent: how many of the first and last tokens of the prompt are kept;
    signals: what the scorer needs beyond cache and window; rewrite: what is made of kept rows out
    of dropped ones; once: it makes sense for many tokens at once only, not token by token.
    """

    summary: str
    scorer: Scorer
    layers: LayerSplit = uniform
    heads: Heads = "even"
    sinks: int = 0
    recent: int = WINDOW
    signals: frozenset[Signal] = frozenset()
    rewrite: Rewrite | None = None
    once: bool = False

    def protecting(self, protection: Protection | None) -> "Eviction":
        """The row with other tokens kept in any case; None: its own."""
        if protection is None:
            return self
        return replace(self, sinks=protection.sinks, recent=protection.recent)


EVICTIONS = Registry(
    "eviction policy",
    [
        (
            "streaming-llm",
            Eviction("4 sinks and the most recent tokens", recency, heads="shared", sinks=4),
        ),
        (
            "h2o",
            Eviction("heavy hitters of all queries", h2o, signals=frozenset({"mass"})),
        ),
        ("tova", Eviction("attention of the last query", tova, heads="shared", recent=1)),
        ("snapkv", Eviction("pooled attention of the last window", snapkv)),
        ("pyramidkv", Eviction("snapkv, fewer tokens the later the layer", snapkv, pyramid)),
        (
            "cake",
            Eviction("mean and variance of attention, layers by preference", cake, cake_preference),
        ),
        ("scissorhands", Eviction("how often attention was above average", scissorhands)),
        ("cam", Eviction("votes of the last window; dropped values merged", votes, rewrite=cam)),
        (
            "d2o",
            Eviction(
                "heavy hitters; dropped rows merged into the most similar",
                h2o,
                signals=frozenset({"mass"}),
                rewrite=d2o,
                once=True,  # of one token alone, the mean similarity is its own
            ),
        ),
        ("keydiff", Eviction("keys unlike the mean key", keydiff, recent=1)),
        ("knorm", Eviction("keys of low norm", knorm, recent=1)),
        (
            "expected-attention",
            Eviction(
                "expected attention of queries to come, times the value's norm",
                expected_attention,
                sinks=SINKS,
                recent=1,
                signals=frozenset({"future_queries"}),
            ),
        ),
        ("ada-kv", Eviction("snapkv with a budget for each head", max_pooled, heads="adaptive")),
        (
            "lava",
            Eviction("attention times value, layers by entropy", lava, lava_entropy, heads="flat"),
        ),
        (
            "defensivekv",
            Eviction(
                "worst case over window and group, times the projected value",
                defensivekv,
                heads="adaptive",
                signals=frozenset({"output_norms"}),
            ),
        ),
        (
            "layer-defensivekv",
            Eviction(
                "the same with one top-k over all layers",
                defensivekv,
                pooled,
                heads="flat",
                signals=frozenset({"output_norms"}),
            ),
        ),
    ],
)


def eviction_problem(
    policy: str,
    shape: KVShape,
    view: Sequence[LayerView],
    menu: tuple[Tier, ...],
    cut: Split,
    capability: Capability,
    protection: Protection | None,
) -> EvictionProblem:
    """What `evict` solves for a policy; without a view it is a dry run.

    A dry run ranks by recency and, where the split between layers follows the data, takes the
    uniform one: such a plan has other tokens, and other bytes only by what padding makes of it.

    Raises:
        MissingSignal: the capture lacks what the scorer needs.
        Unsupported: heads choose for themselves and components have other numbers of them.
    """
    row = EVICTIONS[policy].protecting(protection)
    views: Sequence[LayerView | None] = view or [None] * len(shape.layers)
    layers = [
        layer_problem(row, layer, capability, seen)
        for layer, seen in zip(shape.layers, views, strict=True)
    ]
    scores = [score_of(row, layer) for layer in view]
    granted = grants(layers, row.layers(len(layers), view, scores))
    return EvictionProblem(policy, layers, granted, menu, cut)


def score_of(row: Eviction, view: LayerView) -> torch.Tensor:
    """What the row's scorer gives of a layer, found once; `MissingSignal` as the scorer."""
    return view.once(("eviction", row.scorer), partial(row.scorer, view))


def layer_problem(
    row: Eviction,
    layer: LayerShape,
    capability: Capability,
    view: LayerView | None,
    score: torch.Tensor | None = None,
) -> LayerProblem:
    """One layer as a row sees it; score: in place of what its scorer gives of the view.

    Without either it is a dry run. A merging row's plan keeps the view, for the rewrite.
    """
    if score is None and view is not None:
        score = score_of(row, view)
    if score is None:
        array: NDArray[np.floating] = np.tile(np.arange(float(layer.n_tokens)), (_heads(layer), 1))
    else:
        array = score.float().cpu().numpy()
    heads = row.heads if capability.drop == "per_head" else "shared"
    rewrite = None if row.rewrite is None or view is None else partial(_merge, row.rewrite, view)
    return LayerProblem(layer, array, protected(row.sinks, row.recent, layer), heads, rewrite)


def _merge(rewrite: Rewrite, view: LayerView, planned: LayerPlan, kv: LayerKV) -> LayerKV:
    """What is encoded in the place of `kv`, which is what `view` is of."""
    return rewrite(replace(view, kv=kv), planned)


def _heads(layer: LayerShape) -> int:
    return max(component.heads for component in layer.components)


def protected(sinks: int, recent: int, layer: LayerShape) -> NDArray[np.bool_]:
    """`[token]`: what is kept in any case; sinks are the first of the prompt, not of a part."""
    positions = np.arange(*layer.token_range)
    kept: NDArray[np.bool_] = (positions < sinks) | (positions >= layer.token_range[1] - recent)
    return kept
