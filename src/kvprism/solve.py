"""Budget solvers: an order of tokens, a family of tier counts and a budget -> an exact plan. No torch.

SpectrumKV states its planners as tier fractions of a *nominal* budget b = mean_j c(q_j) with
c(16) = 1, c(8) = 1/2, c(4) = 1/4, blind to scales, maps and headers. A `Family` is one such curve;
the exact planners find the largest b whose plan, to the last wire byte, fits the budget.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvprism.core import Budget, KVShape, LayerShape, Tier
from kvprism.errors import BadInput, BudgetTooSmall, Unsupported
from kvprism.layout import WHOLE, Split, TierArray
from kvprism.plans import LayerPlan, Plan, end_of, layer_nbytes, offer_of, stream_nbytes
from kvprism.wire import frames

Pinned = Mapping[int, Mapping[str, NDArray[np.bool_]]]
NATIVE_INDEX, INT8_INDEX, INT4_INDEX, DROP_INDEX = range(4)


class TierCounts(NamedTuple):
    """Tokens per tier; the rest of the prompt is dropped."""

    native: int
    int8: int
    int4: int


@dataclass(frozen=True)
class Family:
    """Tier counts as a function of the nominal budget b; `floor` is the smallest b it reaches.

    A family whose floor is 1 has one member: the fixed-rate arms, which ignore the budget.
    """

    name: str
    floor: float
    counts: Callable[[float, int], TierCounts]


def _floor(share: float, n: int) -> int:
    # 4b - 1 at b = 0.3 is 0.19999999999999996: without the slack a token would be lost to rounding.
    return int(share * n + 1e-9)


def greedy(b: float, n: int) -> TierCounts:
    """SpectrumKV Greedy: INT4 + INT8 up to b = 0.5, then INT8 + native."""
    if b <= 0.5:
        int8 = _floor(4 * b - 1, n)
        return TierCounts(0, int8, n - int8)
    native = _floor(2 * b - 1, n)
    return TierCounts(native, n - native, 0)


def balanced(b: float, n: int) -> TierCounts:
    """SpectrumKV Balanced: R = 4b - 1; R/5 native, 2R/5 INT8, the rest INT4 until that is used up."""
    surplus = 4 * b - 1
    native, int8 = surplus / 5, 2 * surplus / 5
    if native + int8 > 1:
        native = 2 * b - 1
        int8 = 1 - native
    n_native = _floor(native, n)
    n_int8 = min(_floor(int8, n), n - n_native)
    return TierCounts(n_native, n_int8, n - n_native - n_int8)


def two_tier(b: float, n: int) -> TierCounts:
    """SpectrumKV 2-tier: INT8 is the lowest precision; below b = 0.5 the rest is dropped."""
    if b <= 0.5:
        return TierCounts(0, _floor(2 * b, n), 0)
    return greedy(b, n)


def native_or_drop(b: float, n: int) -> TierCounts:
    """Eviction: a share b of the tokens native, the rest dropped."""
    return TierCounts(_floor(b, n), 0, 0)


GREEDY = Family("greedy", 0.25, greedy)
BALANCED = Family("balanced", 0.25, balanced)
TWO_TIER = Family("two-tier", 0.0, two_tier)
EVICT = Family("native-or-drop", 0.0, native_or_drop)
ALL_NATIVE = Family("all native", 1.0, lambda b, n: TierCounts(n, 0, 0))
ALL_INT8 = Family("all INT8", 1.0, lambda b, n: TierCounts(0, n, 0))
ALL_INT4 = Family("all INT4", 1.0, lambda b, n: TierCounts(0, 0, n))


@dataclass(frozen=True, eq=False)
class TokenProblem:
    """What a token solver needs: who goes first, on which curve, and what must stay native.

    order: token indices, most important first, protected tokens left out; protected: token indices
    that are always native; pinned: layer -> component -> bool `[head, token]` rows that no quantised
    tier can hold.
    """

    policy: str
    family: Family
    order: NDArray[np.intp]
    protected: NDArray[np.intp]
    menu: tuple[Tier, ...]
    pinned: Pinned
    split: Split = WHOLE

    def tiers(self, b: float) -> TierArray:
        """uint8 `[token]` at nominal budget b."""
        counts = self.family.counts(b, len(self.order))
        tiers = np.full(len(self.order) + len(self.protected), DROP_INDEX, np.uint8)
        bounds = np.cumsum([0, *counts])
        for tier, (low, high) in enumerate(zip(bounds, bounds[1:], strict=False)):
            tiers[self.order[low:high]] = tier
        tiers[self.protected] = NATIVE_INDEX
        return tiers

    def layer(self, shape: LayerShape, tiers: TierArray) -> LayerPlan:
        """The same `[token]` tiers for every component and head of a layer, pinned rows native."""
        pinned = self.pinned.get(shape.layer_id, {})
        tier_of = {}
        for name, heads, _ in shape.components:
            rows = np.broadcast_to(tiers, (heads, len(tiers)))
            if name in pinned:
                quantised = (rows == INT8_INDEX) | (rows == INT4_INDEX)
                rows = np.where(pinned[name] & quantised, np.uint8(NATIVE_INDEX), rows)
            tier_of[name] = rows
        return LayerPlan(shape, tier_of)

    def layers(self, shape: KVShape, b: float) -> tuple[LayerPlan, ...]:
        tiers = self.tiers(b)
        return tuple(self.layer(layer, tiers) for layer in shape.layers)


def solve_prompt(problem: TokenProblem, shape: KVShape, budget: Budget | None) -> Plan:
    """One tier per token for all layers: the largest b that fits the exact budget.

    Raises:
        BudgetTooSmall: even the family's floor does not fit; carries the minimum.
        Unsupported: layers of different token ranges.
    """
    if len({layer.token_range for layer in shape.layers}) > 1:
        raise Unsupported("one tier map for all layers needs layers of one token range")

    def nbytes(b: float) -> int:
        return stream_nbytes(problem.layers(shape, b), problem.menu, problem.split)

    b = (
        1.0
        if budget is None
        else _largest_b(problem, nbytes, budget.nbytes, shape.reference_nbytes)
    )
    return Plan(problem.layers(shape, b), problem.menu, problem.split, problem.policy)


def solve_nominal(problem: TokenProblem, shape: KVShape, b: float) -> Plan:
    """The paper's plan at nominal budget b: payload only, whatever the wire bytes come to.

    Raises:
        BadInput: b below the family's floor or above 1.
    """
    if not problem.family.floor <= b <= 1:
        raise BadInput(
            f"nominal budget {b} for {problem.family.name}: expected {problem.family.floor} to 1"
        )
    return Plan(problem.layers(shape, b), problem.menu, problem.split, problem.policy)


def solve_layers(
    problems: Sequence[TokenProblem], shape: KVShape, budget: Budget, shares: Sequence[float]
) -> Plan:
    """Each layer alone within its share of the budget, so that it can leave before the next exists.

    Raises:
        BudgetTooSmall: a layer's share is below its floor.
        BadInput: not one share per layer.
    """
    if len(shares) != len(shape.layers):
        raise BadInput(f"{len(shape.layers)} layers need one share each, got {len(shares)}")
    menu, split, policy = problems[0].menu, problems[0].split, problems[0].policy
    frame_nbytes = len(frames.pack(offer_of(shape, menu)))
    frame_nbytes += len(frames.pack(end_of(2**31, 2**47)))
    if budget.nbytes <= frame_nbytes:
        raise BudgetTooSmall(policy, frame_nbytes, budget.nbytes, shape.reference_nbytes)
    layers: list[LayerPlan] = []
    sequence = 0
    parts = Budget(budget.nbytes - frame_nbytes).split(shares)
    for problem, layer, part in zip(problems, shape.layers, parts, strict=True):
        plan, count = _solve_layer(problem, layer, part, sequence)
        layers.append(plan)
        sequence += count
    return Plan(tuple(layers), menu, split, policy)


def _solve_layer(
    problem: TokenProblem, shape: LayerShape, budget: Budget, sequence: int
) -> tuple[LayerPlan, int]:
    def cost(b: float) -> tuple[int, int]:
        layer = problem.layer(shape, problem.tiers(b))
        return layer_nbytes(layer, problem.menu, problem.split, sequence)

    b = _largest_b(problem, lambda b: cost(b)[0], budget.nbytes, shape.reference_nbytes)
    return problem.layer(shape, problem.tiers(b)), cost(b)[1]


def _largest_b(
    problem: TokenProblem, nbytes: Callable[[float], int], given: int, reference: int
) -> float:
    floor = problem.family.floor
    needed = nbytes(floor)
    if needed > given:
        raise BudgetTooSmall(problem.policy, needed, given, reference)
    # Eight steps a token: the finest curve (Balanced) changes a count every fifth of a step of 1/4n.
    steps = 8 * max(1, len(problem.order))
    low, high = 0, steps
    while low < high:
        middle = (low + high + 1) // 2
        fits = nbytes(floor + (1 - floor) * middle / steps) <= given
        low, high = (middle, high) if fits else (low, middle - 1)
    return floor + (1 - floor) * low / steps
