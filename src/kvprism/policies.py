"""Policies as rows: name -> order of tokens x curve of tier counts x protected tokens x tempo."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Literal

from kvprism.evictions import EVICTIONS, Eviction
from kvprism.profiles import Profile
from kvprism.registry import Registry
from kvprism.routes import FULL
from kvprism.score import SINKS
from kvprism.solve import (
    ALL_INT4,
    ALL_INT8,
    ALL_NATIVE,
    BALANCED,
    EVICT,
    GREEDY,
    TWO_TIER,
    Family,
)
from kvprism.tensors import Signal

Order = Literal["importance", "random", "recency", "ends", "scores"]
RECENT = 128
# PolyKV's preference x sharing signals (`docs/polykv.md`): a route's name -> what it is made from.
VARIANTS = {
    f"polykv-{preference}-{sharing}": (preference, sharing)
    for preference, sharing in product(
        ("perplexity", "cosine"), ("uniform", "entropy", "perplexity")
    )
}


@dataclass(frozen=True)
class Policy:
    """One row: which tokens go first, how counts follow the budget, what stays native, and when.

    tempo `whole_prompt` plans after prefill; `per_layer` plans each layer as soon as it exists.
    remedy: against what INT4 does to some models' keys: `conditioned` takes the conditioned code,
    `adaptive` what the profile's probe recommends for each layer. code: of a policy that is about
    one code, in `MENUS` or `ONE_WIDTH_MENUS`. eviction: a row of `evictions.py` that ranks and
    splits in order's and family's place; routed: the profile's route names one for every layer.
    """

    summary: str
    family: Family
    order: Order = "importance"
    sinks: int = 0
    recent: int = 0
    tempo: Literal["whole_prompt", "per_layer"] = "whole_prompt"
    remedy: Literal["none", "conditioned", "adaptive"] = "none"
    code: str | None = None
    eviction: Eviction | None = None
    routed: bool = False

    @property
    def evicts(self) -> bool:
        """True where scores of the policy's own rank tokens, and `evict` solves."""
        return self.eviction is not None or self.routed

    @property
    def budgeted(self) -> bool:
        """False for the fixed-rate arms, which have one size and ignore the budget."""
        return self.family.floor < 1


def _routed(summary: str) -> Policy:
    return Policy(summary, EVICT, "scores", routed=True)


def _evicting(row: Eviction) -> Policy:
    return Policy(row.summary, EVICT, "scores", row.sinks, row.recent, eviction=row)


POLICIES = Registry(
    "policy",
    [
        ("raw", Policy("every token in the cache's own dtype", ALL_NATIVE)),
        ("int8", Policy("every token INT8", ALL_INT8)),
        ("int4", Policy("every token INT4", ALL_INT4)),
        (
            "int4-sinks-recent",
            Policy("INT4, sinks and last 128 native", ALL_INT4, sinks=SINKS, recent=RECENT),
        ),
        (
            "int4-affine",
            Policy("INT4, a scale and an offset per token and head", ALL_INT4, code="affine"),
        ),
        (
            "int4-hadamard",
            Policy("the same after a Hadamard rotation, as vLLM's", ALL_INT4, code="hadamard"),
        ),
        (
            "int4-grouped",
            Policy("a scale and an offset per 32 channels", ALL_INT4, code="grouped"),
        ),
        (
            "int4-kivi",
            Policy("KIVI: per-channel keys; last 128 native", ALL_INT4, recent=RECENT, code="kivi"),
        ),
        ("fp8", Policy("every token FP8 (e4m3), a scale per token and head", ALL_INT8, code="fp8")),
        ("spectrum", Policy("SpectrumKV SinkProtect: sinks, then greedy", GREEDY, sinks=SINKS)),
        (
            "spectrum-layer",
            Policy(
                "the same from each layer's own attention", GREEDY, sinks=SINKS, tempo="per_layer"
            ),
        ),
        ("spectrum-greedy", Policy("SpectrumKV Greedy: no protected sinks", GREEDY)),
        ("spectrum-balanced", Policy("SpectrumKV Balanced: 1 : 2 : rest", BALANCED)),
        ("spectrum-2tier", Policy("INT8 is the lowest tier, below it drop", TWO_TIER, sinks=SINKS)),
        (
            "spectrum-conditioned",
            Policy(
                "spectrum with the profile's key conditioning",
                GREEDY,
                sinks=SINKS,
                remedy="conditioned",
            ),
        ),
        (
            "spectrum-adaptive",
            Policy(
                "plain, conditioned or 2-tier: as the profile says of each layer",
                GREEDY,
                sinks=SINKS,
                remedy="adaptive",
            ),
        ),
        (
            "random-tiers",
            Policy("spectrum's tier counts, tokens at random", GREEDY, order="random", sinks=SINKS),
        ),
        (
            "random-drop",
            Policy("sinks and random tokens native", EVICT, order="random", sinks=SINKS),
        ),
        (
            "sinks-recent",
            Policy("sinks and the most recent tokens native", EVICT, order="recency", sinks=SINKS),
        ),
        ("pdtrim", Policy("first and last halves native, in all layers", EVICT, order="ends")),
        ("full", Policy("FullKV: every token native, the name in papers on eviction", ALL_NATIVE)),
        *((name, _evicting(row)) for name, row in EVICTIONS.items()),
        ("polykv", _routed("PolyKV: every layer the policy of its signals, from the profile")),
        ("polykv-best", _routed("every layer by measured marginal loss, from the profile")),
        *(
            (name, _routed(f"PolyKV: policies by {preference}, budgets by {sharing}"))
            for name, (preference, sharing) in VARIANTS.items()
        ),
    ],
)


def signals_of(policies: Iterable[str], profile: Profile | None = None) -> frozenset[Signal]:
    """What a capture must be asked for so that these policies can plan; `UnknownName` as there.

    profile: says which rows a routed policy takes; without it, all signals that a row may need.
    """
    return frozenset(
        signal for policy in policies for row in _rows(policy, profile) for signal in row.signals
    )


def _rows(policy: str, profile: Profile | None) -> Iterator[Eviction]:
    """The eviction rows that a policy may rank by."""
    row = POLICIES[policy]
    if row.eviction is not None:
        yield row.eviction
    elif row.routed and profile is None:
        yield from (each for _, each in EVICTIONS.items())
    elif row.routed and profile is not None:
        for route in profile.routes:
            names = {layer.policy for layer in route.layers} - {FULL}
            yield from (EVICTIONS[name] for name in names if route.policy == policy)
