"""Plans that need no later layer: each layer's as soon as that layer exists.

A layer can leave while the next is computed if nothing in its plan depends on what the next will
hold: where the policy plans by layer, where it has one size, or where it drops tokens by their
place alone.
"""

from dataclasses import replace
from itertools import accumulate

from kvprism.budgets import budget_limit, required_budget
from kvprism.core import Budget, Capability, KVShape, Tier
from kvprism.errors import Unsupported
from kvprism.layout import Split, split_of
from kvprism.planning import (
    DEFAULT_OPTIONS,
    PlanOptions,
    code_of,
    layer_shares,
    plan_shape,
    smallest_nbytes,
    token_problem,
)
from kvprism.plans import LayerPlan, n_manifests
from kvprism.policies import POLICIES
from kvprism.profiles import Profile
from kvprism.solve import EVICT, layer_budgets, solve_layer
from kvprism.tensors import LayerView


def leaves_early(policy: str) -> bool:
    """Whether a layer's plan needs no other layer; `UnknownName` for no policy."""
    row = POLICIES[policy]
    if row.eviction is not None or row.routed or row.remedy == "adaptive":
        return False
    by_place = row.family is EVICT and row.order != "importance"
    return row.tempo == "per_layer" or not row.budgeted or by_place


class LayerPlanner:
    """Plans the layers of one request, each alone; together they are what `plan` would make.

    shape: of the cache to come. `menu` and `split` go into the offer.

    Raises:
        UnknownName: no such policy.
        Unsupported: the policy looks at all layers before it plans the first.
        BudgetTooSmall, ProfileMismatch, BadInput: as `plan`, as far as the shape shows it.
    """

    def __init__(
        self,
        shape: KVShape,
        policy: str,
        budget: str | float | Budget | None = None,
        *,
        options: PlanOptions = DEFAULT_OPTIONS,
        capability: Capability | None = None,
        profile: Profile | None = None,
    ) -> None:
        if not leaves_early(policy):
            raise Unsupported(
                f"policy {policy!r} plans a layer knowing the others; plan the whole prompt, or "
                "choose one that plans by layer, such as spectrum-layer"
            )
        self._policy, self._options = policy, options
        self._capability = capability or Capability()
        self._code = code_of(shape, policy, options, profile)
        self.menu: tuple[Tier, ...] = self._code.menu
        self.split: Split = options.split or split_of(shape)
        self._shapes = {layer.layer_id: layer for layer in shape.layers}
        counts = [n_manifests(layer, self.split) for layer in shape.layers]
        self._first = dict(zip(self._shapes, accumulate([0, *counts]), strict=False))
        self._by_place: dict[int, LayerPlan] = {}
        self._nbytes: dict[int, int] = {}
        if not POLICIES[policy].budgeted:
            return
        limit = budget_limit(
            required_budget(policy, budget),
            shape,
            lambda: smallest_nbytes(shape, policy, options, profile),
        )
        if POLICIES[policy].tempo == "per_layer":
            shares = layer_shares(shape, profile)
            parts = layer_budgets(shape, self.menu, self.split, limit, shares)
            self._nbytes = dict(zip(self._shapes, parts, strict=True))
        else:
            dry = plan_shape(shape, policy, limit, options, profile)
            self._by_place = dict(zip(self._shapes, dry.layers, strict=True))

    def plan(self, view: LayerView) -> LayerPlan:
        """The plan of one layer.

        Raises:
            BudgetTooSmall: rows that must stay native leave nothing legal within its share.
            MissingSignal, Unsupported: as `plan`.
        """
        layer = self._shapes[view.kv.layer_id]
        planned = self._by_place.get(layer.layer_id) or self._solved(view)
        planned.check_drops(self.menu, self._capability)
        return planned

    def _solved(self, view: LayerView) -> LayerPlan:
        layer = self._shapes[view.kv.layer_id]
        problem = token_problem(self._policy, layer, [view], self._options, self._code)
        problem = replace(problem, split=self.split)
        if not self._nbytes:
            return problem.layer(layer, problem.tiers(1.0))
        first, nbytes = self._first[layer.layer_id], self._nbytes[layer.layer_id]
        return solve_layer(problem, layer, first, nbytes)
