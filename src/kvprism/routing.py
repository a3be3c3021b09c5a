"""A profile's route -> the eviction problem of a prompt: every layer its own policy and share."""

from collections.abc import Sequence
from math import ceil

import numpy as np

from kvprism.core import Capability, KVShape, LayerShape, Tier
from kvprism.errors import BadInput, BudgetTooSmall, ProfileMismatch
from kvprism.evict import EvictionProblem, LayerProblem, grants
from kvprism.evictions import EVICTIONS, Protection, layer_problem
from kvprism.layout import Split
from kvprism.profiles import Profile
from kvprism.routes import FULL, REACH, LayerRoute, Route, nearest
from kvprism.split import LEAST
from kvprism.tensors import LayerView

# In a dry run without a profile every layer has this policy and an equal share.
_DRY = "streaming-llm"


def routes_of(shape: KVShape, policy: str, profile: Profile | None) -> tuple[Route, ...]:
    """The profile's routes for a policy; asks for no prompt, so that errors come early.

    Raises:
        ProfileMismatch: no profile, none of its routes is for this policy, or they are for another
            number of layers.
        UnknownName: a route names an eviction policy that there is not.
    """
    routes = () if profile is None else profile.routes
    found = tuple(route for route in routes if route.policy == policy)
    if not found:
        what = "no profile" if profile is None else "a profile without one"
        raise ProfileMismatch(
            f"policy {policy!r} follows a route for {len(shape.layers)} layers, got {what}; make a "
            "profile with kvprism calibrate and give it to both sides"
        )
    for route in found:
        if len(route.layers) != len(shape.layers):
            raise ProfileMismatch(
                f"policy {policy!r} follows a route for {len(shape.layers)} layers, the profile's "
                f"is for {len(route.layers)}; make a profile for this model"
            )
        for layer in route.layers:
            if layer.policy != FULL:
                EVICTIONS[layer.policy]
    return found


def route_for(shape: KVShape, policy: str, profile: Profile | None, nbytes: int) -> Route:
    """The route for a budget, by its tokens at 16 bits per layer.

    Raises:
        ProfileMismatch, UnknownName: see `routes_of`.
        BudgetTooSmall: every route was made for a larger budget than this one.
        BadInput: no route was made for a budget like this one.
    """
    routes = routes_of(shape, policy, profile)
    least = min(reach_nbytes(shape, route) for route in routes)
    if nbytes < least:
        raise BudgetTooSmall(policy, least, nbytes, shape.reference_nbytes)
    tokens = nbytes / _token_nbytes(shape)
    route = nearest(routes, tokens)
    if route is None:
        made = ", ".join(f"{route.tokens}tok" for route in routes)
        raise BadInput(
            f"policy {policy!r} at {tokens:.0f} tokens a layer: the profile's routes are for "
            f"{made}, and each serves up to {REACH:.2f} times more or fewer; calibrate for this "
            "budget too"
        )
    return route


def reach_nbytes(shape: KVShape, route: Route) -> int:
    """The smallest budget in bytes that a route serves, whatever its protected tokens take."""
    return ceil(route.tokens / REACH * _token_nbytes(shape))


def _token_nbytes(shape: KVShape) -> float:
    """A token in every layer, at 16 bits."""
    return sum(layer.reference_nbytes / layer.n_tokens for layer in shape.layers)


def dry_route(shape: KVShape, policy: str) -> Route:
    """What stands for a route in a dry run without a profile: equal shares, the same policy."""
    return Route(policy, 1, (LayerRoute(_DRY, 1),) * len(shape.layers))


def routed_problem(
    route: Route,
    shape: KVShape,
    view: Sequence[LayerView],
    menu: tuple[Tier, ...],
    cut: Split,
    capability: Capability,
    protection: Protection | None,
) -> EvictionProblem:
    """What `evict` solves for a route; without a view it is a dry run, ranked by recency.

    Units are granted in proportion to the layers' tokens beyond their protected ones, so that each
    gets its number when the budget is the route's own, and a layer that holds fewer passes on the
    rest. Of a row only scores, heads and protection count: its own split between layers does not.

    Raises:
        MissingSignal: the capture lacks what a layer's scorer needs.
        Unsupported: heads choose for themselves and components have other numbers of them.
    """
    views: Sequence[LayerView | None] = view or [None] * len(shape.layers)
    layers = [
        routed_layer(its, layer, seen, capability, protection)
        for its, layer, seen in zip(route.layers, shape.layers, views, strict=True)
    ]
    weights = [_weight(layer, its) for layer, its in zip(layers, route.layers, strict=True)]
    return EvictionProblem(route.policy, layers, grants(layers, weights), menu, cut)


def routed_layer(
    its: LayerRoute,
    shape: LayerShape,
    view: LayerView | None,
    capability: Capability,
    protection: Protection | None = None,
) -> LayerProblem:
    """One layer of a route; without a view it is a dry run."""
    if its.policy == FULL:
        nothing = np.zeros((1, shape.n_tokens), np.float32)
        return LayerProblem(shape, nothing, np.ones(shape.n_tokens, np.bool_), "shared")
    row = EVICTIONS[its.policy].protecting(protection)
    return layer_problem(row, shape, capability, view)


def units_of(layer: LayerProblem, its: LayerRoute) -> int:
    """The units that the layer's tokens are, beyond the protected ones; at most what it has."""
    if its.tokens is None:
        return 0
    beyond = max(0, its.tokens - int(layer.protected.sum()))
    return min(beyond * layer.units_per_token, layer.n_units)


def _weight(layer: LayerProblem, its: LayerRoute) -> float:
    """Not capped by what the layer has: `grants` passes on what it cannot take."""
    if its.tokens is None:
        return LEAST
    beyond = (its.tokens - int(layer.protected.sum())) * layer.units_per_token
    return max(LEAST, float(beyond))
