"""An eviction policy, of its own or by a profile's route, and a budget -> an exact plan."""

from collections.abc import Sequence

from kvprism.budgets import Given, budget_limit, required_budget, split_floor
from kvprism.core import Budget, Capability, KVShape, Tier
from kvprism.errors import BadInput
from kvprism.evict import EvictionProblem, solve_eviction, solve_nominal_eviction
from kvprism.evictions import Protection, eviction_problem
from kvprism.layout import Split
from kvprism.plans import Plan
from kvprism.policies import POLICIES
from kvprism.profiles import Profile
from kvprism.routes import Route
from kvprism.routing import dry_route, reach_nbytes, route_for, routed_problem, routes_of
from kvprism.solve import nominal_fraction
from kvprism.tensors import LayerView


def plan_eviction(
    policy: str,
    shape: KVShape,
    view: Sequence[LayerView],
    budget: Given | None,
    menu: tuple[Tier, ...],
    cut: Split,
    *,
    nominal: bool,
    capability: Capability,
    profile: Profile | None,
    protection: Protection | None,
) -> Plan:
    """The plan of a row of `evictions.py`, or of a route; errors as `planning.plan`."""
    route = _route(policy, shape, budget, nominal, profile) if POLICIES[policy].routed else None
    problem = _problem(policy, shape, view, menu, cut, capability, route, protection)
    if nominal:
        return solve_nominal_eviction(problem, nominal_fraction(budget))
    return _within(problem, shape, budget)


def dry_eviction_plan(
    policy: str,
    shape: KVShape,
    budget: Given | None,
    menu: tuple[Tier, ...],
    cut: Split,
    profile: Profile | None,
    protection: Protection | None,
) -> Plan:
    """Without a prompt; a routed policy without a profile has equal shares."""
    routed = POLICIES[policy].routed and profile is not None
    route = _route(policy, shape, budget, False, profile) if routed else None
    return _within(_dry_problem(policy, shape, menu, cut, route, protection), shape, budget)


def smallest_eviction_nbytes(
    policy: str,
    shape: KVShape,
    menu: tuple[Tier, ...],
    cut: Split,
    profile: Profile | None,
    protection: Protection | None,
) -> int:
    """The smallest budget in bytes; by routes, the smallest that any of them serves."""
    if not POLICIES[policy].routed or profile is None:
        return _dry_problem(policy, shape, menu, cut, None, protection).plan(0).nbytes
    return min(
        max(
            _dry_problem(policy, shape, menu, cut, route, protection).plan(0).nbytes,
            reach_nbytes(shape, route),
        )
        for route in routes_of(shape, policy, profile)
    )


def _problem(
    policy: str,
    shape: KVShape,
    view: Sequence[LayerView],
    menu: tuple[Tier, ...],
    cut: Split,
    capability: Capability,
    route: Route | None,
    protection: Protection | None,
) -> EvictionProblem:
    if route is None:
        return eviction_problem(policy, shape, view, menu, cut, capability, protection)
    return routed_problem(route, shape, view, menu, cut, capability, protection)


def _dry_problem(
    policy: str,
    shape: KVShape,
    menu: tuple[Tier, ...],
    cut: Split,
    route: Route | None,
    protection: Protection | None,
) -> EvictionProblem:
    if POLICIES[policy].routed and route is None:
        route = dry_route(shape, policy)
    return _problem(policy, shape, (), menu, cut, Capability(), route, protection)


def _within(problem: EvictionProblem, shape: KVShape, budget: Given | None) -> Plan:
    given = required_budget(problem.policy, budget)
    return solve_eviction(problem, budget_limit(given, shape, lambda: problem.plan(0).nbytes))


def _route(
    policy: str, shape: KVShape, budget: Given | None, nominal: bool, profile: Profile | None
) -> Route:
    """The profile's route for a budget."""
    given = required_budget(policy, budget)
    if nominal:
        nbytes = int(nominal_fraction(budget) * shape.reference_nbytes)
        return route_for(shape, policy, profile, nbytes)
    if split_floor(given)[0]:
        raise BadInput(
            f"policy {policy!r} is calibrated for budgets, and {given!r} counts from a floor; name "
            "the budget itself, such as 256tok"
        )
    return route_for(shape, policy, profile, Budget.parse(given, shape).nbytes)
