"""The eviction solver: scores, a share for each layer and a budget -> an exact plan. No torch.

Tokens are kept native or dropped. The protected ones stay; the others are granted one by one, to
the layer whose turn it is and there to the best scores, until the budget is full. Granted is a
*unit*: one token in all heads of its layer (`shared`), or one row of one head.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kvprism.core import Budget, KVShape, LayerShape, Tier
from kvprism.errors import BadInput, BudgetTooSmall, Unsupported
from kvprism.layout import WHOLE, Split
from kvprism.plans import LayerPlan, Plan
from kvprism.solve import DROP_INDEX, NATIVE_INDEX

Heads = Literal["shared", "even", "adaptive", "flat"]
# Ada-KV's safeguard: so much of a layer's budget is spread evenly over its heads.
SAFEGUARD = 0.2


@dataclass(frozen=True, eq=False)
class LayerProblem:
    """Which tokens of one layer are worth keeping.

    scores: float `[head, token]`, finite, higher = keep; protected: bool `[token]`, kept in all
    heads; heads: who chooses tokens: `shared` (all heads of the layer the same, by their mean
    score), `even` (each its own, as many as the others), `adaptive` (Ada-KV, arXiv 2407.11550,
    algorithms 1 and 2: a head's number is a fifth of the mean and four fifths of what it has in the
    top-k over all heads), `flat` (that top-k itself); rewrite: of a merging policy, what becomes of
    the layer under a plan of it, see `LayerPlan`.

    Raises:
        Unsupported: components with other numbers of heads, unless heads share.
    """

    shape: LayerShape
    scores: NDArray[np.floating]
    protected: NDArray[np.bool_]
    heads: Heads = "shared"
    rewrite: Callable[[LayerPlan, Any], Any] | None = None

    def __post_init__(self) -> None:
        counts = {component.heads for component in self.shape.components}
        if self.heads != "shared" and counts != {len(self.scores)}:
            raise Unsupported(
                f"{self.shape} cannot keep other tokens in each head: expected {len(self.scores)} "
                "heads in every component; plan for a receiver with drop=uniform"
            )

    @cached_property
    def candidates(self) -> NDArray[np.intp]:
        """Tokens that are not protected."""
        return np.flatnonzero(~self.protected)

    @cached_property
    def _rows(self) -> NDArray[np.floating]:
        """`[choosing head, candidate]`: one row when heads share."""
        scores = self.scores[:, self.candidates]
        return scores.mean(axis=0, keepdims=True) if self.heads == "shared" else scores

    @cached_property
    def _ranks(self) -> NDArray[np.intp]:
        """`[choosing head, candidate]`: candidates, the best first; of equal ones the earlier."""
        return np.argsort(-self._rows, axis=1, kind="stable")

    @cached_property
    def _flat(self) -> NDArray[np.intp]:
        """Units as `choosing head * number of candidates + candidate`, the best first."""
        return np.argsort(-self._rows, axis=None, kind="stable")

    @property
    def n_units(self) -> int:
        return self._rows.size

    @property
    def units_per_token(self) -> int:
        """One when heads share, else one for every head."""
        return len(self._rows)

    @property
    def unit_nbytes(self) -> int:
        """Payload bytes of one unit."""
        return self.token_nbytes // self.units_per_token

    @property
    def token_nbytes(self) -> int:
        """Payload bytes of one token in all heads and components."""
        return sum(c.heads * c.channels * self.shape.itemsize for c in self.shape.components)

    def descending(self) -> NDArray[np.floating]:
        """The scores of all units, highest first."""
        return self._rows.reshape(-1)[self._flat]

    def counts(self, n: int) -> NDArray[np.intp]:
        """How many of `n` units each choosing head gets; they sum to `n`."""
        heads, size = self._rows.shape
        even: NDArray[np.intp] = n // heads + (np.arange(heads) < n % heads)
        if self.heads in ("shared", "even"):
            return even
        top = np.bincount(self._flat[:n] // size, minlength=heads)
        if self.heads == "flat":
            return top
        return _rounded((1 - SAFEGUARD) * top + SAFEGUARD * n / heads, n, size)

    def plan(self, n: int) -> LayerPlan:
        """The protected tokens and `n` units."""
        kept = np.repeat(self.protected[None], len(self._rows), axis=0)
        for head, (ranks, count) in enumerate(zip(self._ranks, self.counts(n), strict=True)):
            kept[head, self.candidates[ranks[:count]]] = True
        tiers = np.where(kept, np.uint8(NATIVE_INDEX), np.uint8(DROP_INDEX))
        planned = LayerPlan(
            self.shape,
            {
                name: np.broadcast_to(tiers, (heads, tiers.shape[1]))
                for name, heads, _ in self.shape.components
            },
        )
        if self.rewrite is None:
            return planned
        return replace(planned, rewrite=partial(self.rewrite, planned))


def _rounded(exact: NDArray[np.floating], total: int, most: int) -> NDArray[np.intp]:
    """Whole numbers near `exact`, at most `most` each, that sum to `total`."""
    counts: NDArray[np.intp] = np.minimum(np.floor(exact).astype(np.intp), most)
    by_remainder = np.argsort(counts - exact, kind="stable")
    while counts.sum() < total:
        room = by_remainder[counts[by_remainder] < most]
        counts[room[: total - counts.sum()]] += 1
    return counts


def grants(problems: Sequence[LayerProblem], weights: Sequence[float] | None) -> NDArray[np.intp]:
    """Which layer (by its place in `problems`) gets the first, second, ... unit, up to all.

    By highest averages of the weights (D'Hondt), so that a larger budget never takes a token from a
    layer, and layers that are full pass on; without weights by score.

    Raises:
        BadInput: not one positive, finite weight per layer.
    """
    sizes = [problem.n_units for problem in problems]
    if weights is None:
        claims = [problem.descending().astype(np.float64) for problem in problems]
    else:
        if len(weights) != len(sizes) or not all(0 < weight < np.inf for weight in weights):
            raise BadInput(
                f"{len(sizes)} layers need one positive, finite weight each, got {list(weights)}"
            )
        claims = [w / np.arange(1, n + 1) for w, n in zip(weights, sizes, strict=True)]
    layers: NDArray[np.intp] = np.repeat(np.arange(len(sizes)), sizes)
    order = np.argsort(-np.concatenate(claims), kind="stable")
    return np.take(layers, order)


@dataclass(frozen=True, eq=False)
class EvictionProblem:
    """A whole prompt: its layers, in whose order they are granted units, and what a plan needs.

    Each layer may come from another policy, with other weights: nothing here knows of any.
    """

    policy: str
    layers: Sequence[LayerProblem]
    granted: NDArray[np.intp]
    menu: tuple[Tier, ...]
    split: Split = WHOLE
    _last: dict[int, tuple[int, LayerPlan]] = field(default_factory=dict, init=False, repr=False)

    def plan(self, n: int) -> Plan:
        """The protected tokens and the first `n` units."""
        counts = np.bincount(self.granted[:n], minlength=len(self.layers)).tolist()
        layers = tuple(self._layer(i, count) for i, count in enumerate(counts))
        return Plan(layers, self.menu, self.split, self.policy)

    def _layer(self, number: int, count: int) -> LayerPlan:
        """Kept until it changes: from one trial of the solver to the next most layers do not."""
        if number not in self._last or self._last[number][0] != count:
            self._last[number] = count, self.layers[number].plan(count)
        return self._last[number][1]

    @cached_property
    def payload(self) -> NDArray[np.int64]:
        """Payload bytes with 0, 1, 2, ... units."""
        protected = sum(int(la.protected.sum()) * la.token_nbytes for la in self.layers)
        each = np.array([layer.unit_nbytes for layer in self.layers], np.int64)
        return protected + np.concatenate([[0], np.cumsum(each[self.granted])])

    def units_within(self, nbytes: int) -> int:
        """The most units with a payload of at most `nbytes`; -1 if protected tokens are more."""
        return int(np.searchsorted(self.payload, nbytes, side="right")) - 1


def solve_eviction(problem: EvictionProblem, budget: Budget) -> Plan:
    """Keep as much as fits: one unit more would be over the budget, or there is none.

    Raises:
        BudgetTooSmall: the protected tokens alone do not fit; carries what they need.
    """
    least = problem.plan(0)
    if least.nbytes > budget.nbytes:
        raise BudgetTooSmall(
            problem.policy, least.nbytes, budget.nbytes, least.shape.reference_nbytes
        )
    return problem.plan(_most_units(problem, budget.nbytes))


def _most_units(problem: EvictionProblem, given: int) -> int:
    """A number that fits while the next does not; 0 fits.

    Payload alone bounds it from above. What framing and padding exceed the budget by is taken off
    the payload, which leads to a number that fits, and just below the border: from there upwards.
    """
    over = problem.units_within(given) + 1
    fits, step = over - 1, 1
    while fits > 0 and (excess := problem.plan(fits).nbytes - given) > 0:
        over, fits = fits, max(0, problem.units_within(int(problem.payload[fits]) - excess))
    while over - fits > 1:
        probe = min(fits + step, over - 1)
        if problem.plan(probe).nbytes > given:
            over, step = probe, 1
        else:
            fits, step = probe, 2 * step
    return fits


def solve_nominal_eviction(problem: EvictionProblem, b: float) -> Plan:
    """A share b of the tokens' payload, protected ones included, whatever the wire bytes are.

    Raises:
        BadInput: b is not between 0 and 1.
        BudgetTooSmall: the protected tokens are more than that.
    """
    if not 0 <= b <= 1:
        raise BadInput(f"nominal budget {b} for {problem.policy!r}: expected 0 to 1")
    shape = KVShape(tuple(layer.shape for layer in problem.layers))
    given = int(b * shape.native_nbytes + 1e-6)
    if problem.payload[0] > given:
        needed = int(problem.payload[0])
        raise BudgetTooSmall(problem.policy, needed, given, shape.native_nbytes)
    return problem.plan(problem.units_within(given))
