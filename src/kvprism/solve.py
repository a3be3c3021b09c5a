"""Budget solvers: an order of tokens, a family of tier counts, a budget -> an exact plan. No torch.

SpectrumKV states its planners as tier fractions of a *nominal* budget b = mean_j c(q_j) with
c(16) = 1, c(8) = 1/2, c(4) = 1/4, blind to scales, maps and headers. A `Family` is one such curve;
the exact planners find the largest b whose plan, to the last wire byte, fits the budget.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import accumulate, groupby, pairwise
from math import inf
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvprism.core import Budget, KVShape, LayerShape, Tier, apportion, least_total
from kvprism.errors import BadInput, BudgetTooSmall
from kvprism.layout import WHOLE, Split, TierArray, row_nbytes
from kvprism.plans import (
    LayerCounts,
    LayerPlan,
    Plan,
    RangeCounts,
    end_of,
    layer_nbytes,
    n_manifests,
    offer_of,
    stream_nbytes,
)
from kvprism.wire.frames import frame_nbytes

Pinned = Mapping[int, Mapping[str, NDArray[np.bool_]]]
NATIVE_INDEX, INT8_INDEX, INT4_INDEX, DROP_INDEX = range(4)
MAX_NBYTES = 2**48  # the largest number that END may hold


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

    @property
    def drops(self) -> bool:
        """Whether some member keeps fewer tokens than there are."""
        return sum(self.counts(self.floor, 1)) < 1


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
    """SpectrumKV Balanced: R = 4b - 1; R/5 native, 2R/5 INT8, the rest INT4 while there is any."""
    surplus = 4 * b - 1
    if surplus > 5 / 3:  # no INT4 is left: as Greedy
        return greedy(b, n)
    native, int8 = _floor(surplus / 5, n), _floor(2 * surplus / 5, n)
    return TierCounts(native, int8, n - native - int8)


def two_tier(b: float, n: int) -> TierCounts:
    """SpectrumKV 2-tier: INT8 is the lowest precision; below b = 0.5 the rest is dropped."""
    if b <= 0.5:
        return TierCounts(0, _floor(2 * b, n), 0)
    return greedy(b, n)


def int8_first(b: float, n: int) -> TierCounts:
    """2-tier beside `int4_waits`: it takes more of their budget first, until it drops nothing."""
    return two_tier(max(b, min(2 * b - 0.25, 0.5)), n)


def int4_waits(b: float, n: int) -> TierCounts:
    """Greedy beside `int8_first`: all INT4 while that has tokens left to keep."""
    return greedy(min(b, max(0.25, 2 * b - 0.5)), n)


def native_or_drop(b: float, n: int) -> TierCounts:
    """Eviction: a share b of the tokens native, the rest dropped."""
    return TierCounts(_floor(b, n), 0, 0)


GREEDY = Family("greedy", 0.25, greedy)
BALANCED = Family("balanced", 0.25, balanced)
TWO_TIER = Family("two-tier", 0.0, two_tier)
INT8_FIRST = Family("two-tier first", 0.25, int8_first)
INT4_WAITS = Family("greedy after two-tier", 0.25, int4_waits)
EVICT = Family("native-or-drop", 0.0, native_or_drop)
ALL_NATIVE = Family("all native", 1.0, lambda b, n: TierCounts(n, 0, 0))
ALL_INT8 = Family("all INT8", 1.0, lambda b, n: TierCounts(0, n, 0))
ALL_INT4 = Family("all INT4", 1.0, lambda b, n: TierCounts(0, 0, n))


@dataclass(frozen=True, eq=False)
class TokenProblem:
    """What a token solver needs: who goes first, on which curve, and what must stay native.

    order: token indices, most important first, protected tokens left out; protected: token indices
    that are always native; pinned: layer -> component -> bool `[head, token]` rows that no
    quantised tier can hold.
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
        return self._assigned(self.family.counts(b, len(self.order)))

    def _assigned(self, counts: TierCounts) -> TierArray:
        tiers = np.full(len(self.order) + len(self.protected), DROP_INDEX, np.uint8)
        bounds = np.cumsum([0, *counts])
        for tier, (low, high) in enumerate(pairwise(bounds)):
            tiers[self.order[low:high]] = tier
        tiers[self.protected] = NATIVE_INDEX
        return tiers

    def counted(
        self, shape: LayerShape, counts: TierCounts, counter: Callable[[int, int], RangeCounts]
    ) -> LayerPlan | LayerCounts:
        """A layer with so many tokens of `order` in each tier, for its size alone.

        counter: `counter(counts)`; layers of one size then share what it gives, and are sized once.
        """
        if shape.layer_id in self.pinned:
            return self.layer(shape, self._assigned(counts))
        step = self.split.tokens or shape.n_tokens
        return LayerCounts(shape, counter(shape.token_range[0], step))

    def counter(self, counts: TierCounts) -> Callable[[int, int], RangeCounts]:
        """(first token, tokens of a range) -> how many tokens each tier takes in a token range."""
        bounds = [0, *accumulate(counts), len(self.order)]
        more = (0,) * (len(self.menu) - DROP_INDEX - 1)

        @cache
        def in_range(number: int) -> tuple[int, ...]:
            ranks, native = self._ranges[number]
            at = bounds if len(self._ranges) == 1 else [bisect_left(ranks, b) for b in bounds]
            first, *others = (high - low for low, high in pairwise(at))
            return (first + native, *others, *more)

        return cache(lambda start, step: lambda tokens: in_range((tokens[0] - start) // step))

    @cached_property
    def _ranges(self) -> list[tuple[Sequence[int], int]]:
        """Of each token range that the split makes: ranks in `order`, and protected tokens."""
        n = len(self.order) + len(self.protected)
        if self.split.tokens is None or self.split.tokens >= n:
            return [((), len(self.protected))]
        ends = np.arange(self.split.tokens, n + self.split.tokens, self.split.tokens)
        of_rank = np.searchsorted(ends, self.order, "right")
        of_native = np.searchsorted(ends, self.protected, "right")
        ranks = np.argsort(of_rank, kind="stable")
        cuts = np.searchsorted(of_rank[ranks], np.arange(1, len(ends)))
        native = np.bincount(of_native, minlength=len(ends)).tolist()
        return list(zip((part.tolist() for part in np.split(ranks, cuts)), native, strict=True))

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


Planned = Sequence[tuple[TokenProblem, LayerShape]]
Sizes = Callable[[Sequence[LayerPlan | LayerCounts]], int]


def _layers(planned: Planned, b: float) -> tuple[LayerPlan, ...]:
    """Every layer at nominal budget b, in the tiers of its own problem."""
    tiers = {problem: problem.tiers(b) for problem in distinct_problems(planned)}
    return tuple(problem.layer(layer, tiers[problem]) for problem, layer in planned)


def distinct_problems(planned: Planned) -> list[TokenProblem]:
    return list(dict.fromkeys(problem for problem, _ in planned))


def _floor_of(problems: Sequence[TokenProblem]) -> float:
    """The smallest b that all of their families reach."""
    return max(problem.family.floor for problem in problems)


class Least(NamedTuple):
    """A size that no member of a family goes below: bytes for all, and for each token of a tier.

    token_nbytes: of each problem, for each tier that keeps a token.
    """

    framing: int
    token_nbytes: Sequence[Sequence[int]]


class Curve:
    """The exact wire bytes of families' members for some layers, and the search along them.

    All families take the same b. least: where rows are not sent as `Plan` has them.

    The bytes do not grow with b everywhere: a tier that comes to an end takes its padding and its
    bits of the tier map with it. `_least`, payload and bare framing, does grow and lies below them,
    so it bounds where to look.
    """

    def __init__(self, planned: Planned, nbytes: Sizes, least: Least | None = None) -> None:
        self._planned, self._nbytes = planned, nbytes
        self._problems = distinct_problems(planned)
        self._floor = _floor_of(self._problems)
        n = max(len(problem.order) for problem in self._problems)
        # Balanced has the finest curve: one of its counts changes with every 5/8 of a token in b.
        self._steps = range(8 * n + 1 if self._floor < 1 else 1)
        self._framing, self._token_nbytes = least or self._payload()

    def _payload(self) -> Least:
        token_nbytes = [
            _token_nbytes(problem, [layer for its, layer in self._planned if its is problem])
            for problem in self._problems
        ]
        nothing = (0,) * DROP_INDEX
        dropped = [LayerCounts(la, lambda t: (*nothing, t[1] - t[0])) for _, la in self._planned]
        return Least(self._nbytes(dropped), token_nbytes)

    def smallest(self) -> int:
        """The fewest bytes of any member."""
        best: float = inf
        for step in self._distinct(self._steps):
            if self._least(step) >= best:
                break
            best = min(best, self._cost(step))
        return int(best)

    def largest(self, given: int) -> float | None:
        """The largest b that fits; None where `given` is below `smallest()`."""
        high = bisect_right(self._steps, given, key=self._least)
        steps = self._distinct(reversed(self._steps[:high]))
        fitting = (self._b(step) for step in steps if self._cost(step) <= given)
        return next(fitting, None)

    def _b(self, step: int) -> float:
        return self._floor + (1 - self._floor) * step / max(1, self._steps[-1])

    def _counts(self, step: int) -> list[TierCounts]:
        b = self._b(step)
        return [problem.family.counts(b, len(problem.order)) for problem in self._problems]

    def _cost(self, step: int) -> int:
        counts = zip(self._problems, self._counts(step), strict=True)
        shared = {problem: (its, problem.counter(its)) for problem, its in counts}
        return self._nbytes(
            [problem.counted(la, *shared[problem]) for problem, la in self._planned]
        )

    def _least(self, step: int) -> int:
        nbytes = self._framing
        counted = zip(self._problems, self._counts(step), self._token_nbytes, strict=True)
        for problem, (native, int8, int4), token_nbytes in counted:
            counts = (native + len(problem.protected), int8, int4)
            nbytes += sum(n * each for n, each in zip(counts, token_nbytes, strict=True))
        return nbytes

    def _distinct(self, steps: Iterable[int]) -> Iterator[int]:
        """The steps at which the counts change."""
        for _, same in groupby(steps, key=self._counts):
            yield next(same)


def _token_nbytes(problem: TokenProblem, layers: Sequence[LayerShape]) -> list[int]:
    """Payload bytes of one token in all of these layers, for each tier that is not dropped."""
    return [
        sum(
            component.heads * row_nbytes(tier, component.channels, layer.itemsize, component.name)
            for layer in layers
            for component in layer.components
        )
        for tier in problem.menu[:DROP_INDEX]
    ]


def solve_prompt(problems: Sequence[TokenProblem], shape: KVShape, budget: Budget | None) -> Plan:
    """One tier per token for all layers that hold it: the largest b that fits the exact budget.

    problems: one for each of `shape.token_ranges`, or one for each layer (the same object where
    layers share it), so that layers of one range may follow different families. Layers of different
    ranges share b, not ranks: a sliding window's attention over its few tokens does not compare
    with attention over all.

    Raises:
        BudgetTooSmall: no member of the family fits; carries the minimum.
        BadInput: not one problem per token range or layer.
    """
    if budget is None:
        return solve_nominal(problems, shape, 1.0)
    curve = _prompt_curve(problems, shape)
    b = curve.largest(budget.nbytes)
    if b is None:
        needed = curve.smallest()
        raise BudgetTooSmall(problems[0].policy, needed, budget.nbytes, shape.reference_nbytes)
    return solve_nominal(problems, shape, b)


def smallest_prompt(problems: Sequence[TokenProblem], shape: KVShape) -> int:
    """The fewest bytes that `solve_prompt` can send this cache in."""
    return _prompt_curve(problems, shape).smallest()


def _prompt_curve(problems: Sequence[TokenProblem], shape: KVShape) -> Curve:
    planned, first = assigned(problems, shape), problems[0]
    return Curve(planned, lambda layers: stream_nbytes(layers, first.menu, first.split))


def assigned(problems: Sequence[TokenProblem], shape: KVShape) -> Planned:
    """Every layer with the problem of its token range, or its own."""
    found = shape.token_ranges
    if len(problems) == len(found):
        problem_of = dict(zip(found, problems, strict=True))
        return [(problem_of[layer.token_range], layer) for layer in shape.layers]
    if len(problems) == len(shape.layers):
        return list(zip(problems, shape.layers, strict=True))
    raise BadInput(
        f"token ranges {list(found)} need one problem each, or {len(shape.layers)} layers one "
        f"each, got {len(problems)} problems"
    )


def solve_nominal(problems: Sequence[TokenProblem], shape: KVShape, b: float) -> Plan:
    """The paper's plan at nominal budget b: payload only, whatever the wire bytes come to.

    Raises:
        BadInput: b below a family's floor or above 1, or not one problem per token range or layer.
    """
    planned, first, floor = assigned(problems, shape), problems[0], _floor_of(problems)
    if not floor <= b <= 1:
        raise BadInput(f"nominal budget {b} for {first.family.name}: expected {floor} to 1")
    return Plan(_layers(planned, b), first.menu, first.split, first.policy)


def nominal_fraction(budget: str | float | Budget | None) -> float:
    """The b that a nominal budget names, `0.30` or `30%`; `BadInput` for anything else."""
    text = str(budget).strip()
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError as error:
        raise BadInput(
            f"a nominal budget is a fraction such as 0.30 or 30%, got {budget!r}"
        ) from error


def solve_layers(
    problems: Sequence[TokenProblem], shape: KVShape, budget: Budget, shares: Sequence[float]
) -> Plan:
    """Each layer alone within its share of the budget, so that it can leave before the next exists.

    Raises:
        BudgetTooSmall: a layer's share is below its minimum; carries the minimum of the whole.
        BadInput: not one share per layer.
    """
    curves, framing = _layer_curves(problems, shape)
    _check_shares(curves, shares)
    first = problems[0]
    parts = layer_budgets(shape, first.menu, first.split, budget, shares)
    layers = []
    for problem, layer, curve, part in zip(problems, shape.layers, curves, parts, strict=True):
        b = curve.largest(part)
        if b is None:
            needed = _smallest(curves, framing, shares)
            raise BudgetTooSmall(first.policy, needed, budget.nbytes, shape.reference_nbytes)
        layers.append(problem.layer(layer, problem.tiers(b)))
    return Plan(tuple(layers), first.menu, first.split, first.policy)


def layer_budgets(
    shape: KVShape, menu: Sequence[Tier], split: Split, budget: Budget, shares: Sequence[float]
) -> list[int]:
    """What each layer may take of a budget: its share of what the frames around all leave."""
    return apportion(budget.nbytes - _framing_nbytes(shape, menu, split), shares)


def solve_layer(
    problem: TokenProblem, layer: LayerShape, first_sequence: int, nbytes: int
) -> LayerPlan:
    """One layer of `solve_layers`, within the bytes that `layer_budgets` gives it.

    first_sequence: how many manifests go before it.

    Raises:
        BudgetTooSmall: no member of the family fits; carries what this layer alone needs.
    """
    curve = _layer_curve(problem, layer, first_sequence)
    b = curve.largest(nbytes)
    if b is None:
        raise BudgetTooSmall(problem.policy, curve.smallest(), nbytes, layer.reference_nbytes)
    return problem.layer(layer, problem.tiers(b))


def smallest_layers(
    problems: Sequence[TokenProblem], shape: KVShape, shares: Sequence[float]
) -> int:
    """The fewest bytes that `solve_layers` can be given; `BadInput` as there."""
    return _smallest(*_layer_curves(problems, shape), shares)


def _check_shares(curves: Sequence[Curve], shares: Sequence[float]) -> None:
    if len(shares) != len(curves):
        raise BadInput(f"{len(curves)} layers need one share each, got {len(shares)}")


def _smallest(curves: Sequence[Curve], framing: int, shares: Sequence[float]) -> int:
    _check_shares(curves, shares)
    return framing + least_total([curve.smallest() for curve in curves], shares)


def _layer_curves(problems: Sequence[TokenProblem], shape: KVShape) -> tuple[list[Curve], int]:
    """A curve per layer, and the bytes of the frames around all of them."""
    curves, sequence = [], 0
    for problem, layer in zip(problems, shape.layers, strict=True):
        curves.append(_layer_curve(problem, layer, sequence))
        sequence += n_manifests(layer, problem.split)
    return curves, _framing_nbytes(shape, problems[0].menu, problems[0].split)


def _layer_curve(problem: TokenProblem, layer: LayerShape, first_sequence: int) -> Curve:
    nbytes = partial(_one_nbytes, problem.menu, problem.split, first_sequence)
    return Curve([(problem, layer)], nbytes)


def _framing_nbytes(shape: KVShape, menu: Sequence[Tier], split: Split) -> int:
    sequence = sum(n_manifests(layer, split) for layer in shape.layers)
    # END counts the bytes before it, which are not known yet: room for the longest number.
    end = frame_nbytes(end_of(sequence, MAX_NBYTES))
    return frame_nbytes(offer_of(shape, menu)) + end


def _one_nbytes(
    menu: Sequence[Tier], split: Split, sequence: int, layers: Sequence[LayerPlan | LayerCounts]
) -> int:
    [layer] = layers
    return layer_nbytes(layer, menu, split, sequence)[0]
