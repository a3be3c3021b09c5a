"""Routes from what was measured: PolyKV's Algorithm 1, marginal losses, and controls. No torch.

Budgets are in tokens per layer on average; a route's layers sum to exactly `layers * tokens`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import factorial, prod

import numpy as np

from kvprism.errors import BadInput
from kvprism.routes import LayerRoute, Route

# The paper gives no eps; it keeps a layer whose signal is 0 from an undefined share.
EPS = 1e-6
# Nor does it give b_min: no layer gets less than this part of the average, or than its floor.
LEAST_SHARE = 0.25

Preferences = Sequence[Mapping[str, float]]


def largest_remainder(total: int, exact: Sequence[float]) -> list[int]:
    """Whole numbers that sum to `total`, each within one of its exact share; `Round_B`.

    exact: shares that sum to `total` but for rounding. Of equal remainders the earlier layer's goes
    first.

    Example:
        >>> largest_remainder(10, [3.4, 3.3, 3.3])
        [4, 3, 3]
    """
    whole = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: whole[i] - exact[i])
    for i in by_remainder[: total - sum(whole)]:
        whole[i] += 1
    return whole


def least_tokens(tokens: int, floor: int) -> int:
    """b_min at an average of `tokens`; floor: what every layer must have to be above protection."""
    return max(floor, int(tokens * LEAST_SHARE))


def budgets(tokens: int, sensitivities: Sequence[float], least: int, eps: float = EPS) -> list[int]:
    """PolyKV's budgets (Algorithm 1): b_min each, the rest in proportion to m(l) + eps.

    sensitivities: m of every layer, negative ones count as 0; equal ones make uniform budgets.

    Raises:
        BadInput: fewer than `least` tokens on average, or sensitivities that are not finite.
    """
    total, n = tokens * len(sensitivities), len(sensitivities)
    if tokens < least:
        raise BadInput(
            f"{tokens} tokens a layer on average are fewer than the {least} that every layer must "
            "have; ask for a larger budget"
        )
    if not np.isfinite(sensitivities).all():
        raise BadInput(f"budget sensitivities must be finite, got {list(sensitivities)}")
    claims = [max(0.0, signal) + eps for signal in sensitivities]
    spare = total - n * least
    exact = [least + spare * claim / sum(claims) for claim in claims]
    return largest_remainder(total, exact)


def preferred(preferences: Preferences, highest: bool) -> list[str]:
    """The policy of every layer by g (Algorithm 1); of equal ones the first in the table.

    preferences: policy -> signal, for every layer; highest: rank descending (cosine), otherwise
    ascending (perplexity). With the ranking turned round it is the control "inverse routing".
    """
    sign = -1.0 if highest else 1.0
    return [
        min(layer, key=lambda policy, layer=layer: sign * layer[policy])  # type: ignore[misc]
        for layer in preferences
    ]


def route(policy: str, policies: Sequence[str], shares: Sequence[int], note: str = "") -> Route:
    """A route from a policy and a number of tokens for each layer."""
    layers = tuple(LayerRoute(*pair) for pair in zip(policies, shares, strict=True))
    return Route(policy, sum(shares) // len(shares), layers, note)


# Marginal losses


@dataclass(frozen=True)
class Point:
    """What a layer loses with so many tokens under its best policy there."""

    tokens: int
    policy: str
    loss: float


Curve = Mapping[tuple[str, int], float]


def hull(curve: Curve) -> list[Point]:
    """The lower convex hull over policies and budgets of one layer's losses, tokens ascending.

    curve: (policy, tokens) -> loss. A negative loss is noise and counts as none. More tokens never
    lose more on the hull, and each further token gains less than the one before.
    """
    best: dict[int, Point] = {}
    for (policy, tokens), loss in curve.items():
        point = Point(tokens, policy, max(0.0, loss))
        if tokens not in best or point.loss < best[tokens].loss:
            best[tokens] = point
    found: list[Point] = []
    for point in (best[tokens] for tokens in sorted(best)):
        if found and point.loss >= found[-1].loss:
            continue
        while len(found) > 1 and _slope(found[-2], point) <= _slope(found[-2], found[-1]):
            found.pop()
        found.append(point)
    return found


def _slope(a: Point, b: Point) -> float:
    return (b.loss - a.loss) / (b.tokens - a.tokens)


def marginal(tokens: int, curves: Sequence[Curve]) -> tuple[list[str], list[int]]:
    """Policies and tokens of every layer with the least sum of losses, greedily along the hulls.

    The step of whichever layer gains most per token comes next, which is optimal where the budget
    ends at a step; what is left then is a part of the next one, under the policy before it. Layers
    whose hulls have ended share what nobody gains from.

    Raises:
        BadInput: the smallest budgets that were measured are more than the tokens.
    """
    hulls, total = [hull(curve) for curve in curves], tokens * len(curves)
    policies = [points[0].policy for points in hulls]
    shares = [points[0].tokens for points in hulls]
    if sum(shares) > total:
        raise BadInput(
            f"{tokens} tokens a layer on average are fewer than the smallest measured budgets, "
            f"{shares}; measure smaller ones"
        )
    steps = [
        (_slope(a, b), layer, b) for layer, points in enumerate(hulls) for a, b in pairwise(points)
    ]
    for _, layer, point in sorted(steps, key=lambda step: (step[0], step[1], step[2].tokens)):
        left = total - sum(shares)
        if point.tokens - shares[layer] > left:
            shares[layer] += left
            return policies, shares
        policies[layer], shares[layer] = point.policy, point.tokens
    left = total - sum(shares)
    more = largest_remainder(left, [left / len(shares)] * len(shares))
    return policies, [share + extra for share, extra in zip(shares, more, strict=True)]


def neighbours(
    policies: Sequence[str],
    shares: Sequence[int],
    layer: int,
    candidates: Sequence[str],
    least: int,
) -> list[tuple[list[str], list[int]]]:
    """What coordinate descent tries for one layer: another policy, a quarter more or less tokens.

    The other layers give or take in proportion to what they have above `least`, so that the sum
    stays.
    """
    tried = []
    for candidate in candidates:
        if candidate != policies[layer]:
            changed = [*policies]
            changed[layer] = candidate
            tried.append((changed, [*shares]))
    for factor in (0.75, 1.25):
        moved = _moved(shares, layer, max(least, round(shares[layer] * factor)), least)
        if moved is not None:
            tried.append(([*policies], moved))
    return tried


def _moved(shares: Sequence[int], layer: int, wanted: int, least: int) -> list[int] | None:
    """The same sum with `wanted` tokens for a layer; None where the others cannot give them."""
    others = [i for i in range(len(shares)) if i != layer]
    spare = [shares[i] - least for i in others]
    left = sum(shares) - wanted - least * len(others)
    if wanted == shares[layer] or left < 0 or sum(spare) <= 0:
        return None
    parts = largest_remainder(left, [left * each / sum(spare) for each in spare])
    moved = [*shares]
    moved[layer] = wanted
    for i, part in zip(others, parts, strict=True):
        moved[i] = least + part
    return moved


# Controls


def placements(found: Route, count: int, seed: int = 0) -> list[Route]:
    """The route's policies in other layers, each as often, with the layers' tokens where they were.

    All other arrangements when there are at most `count`, else `count` different ones at random;
    the control for whether placement matters.
    """
    policies = [layer.policy for layer in found.layers]
    shares = [layer.tokens for layer in found.layers]
    if any(share is None for share in shares):
        raise BadInput(f"route {found} has full layers, which cannot change places")
    seen = {tuple(policies): None}
    rng = np.random.default_rng(seed)
    while len(seen) < min(count + 1, _arrangements(policies)):
        seen[tuple(policies[i] for i in rng.permutation(len(policies)))] = None
    others = list(seen)[1:]
    return [route(found.policy, each, [share or 0 for share in shares]) for each in others]


def _arrangements(policies: Sequence[str]) -> int:
    """How many different orders these have."""
    counts = [policies.count(policy) for policy in set(policies)]
    return factorial(len(policies)) // prod(map(factorial, counts))
