"""Policies as rows: name -> order of tokens x curve of tier counts x protected tokens x tempo."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from kvprism.codec.reference import quantisable
from kvprism.core import DROP_CODEC, MENUS, Budget, Capability, KVShape, Tier
from kvprism.errors import BadInput, BudgetTooSmall, UnknownName, Unsupported
from kvprism.layout import WHOLE, Split
from kvprism.plans import Plan
from kvprism.profiles import Profile
from kvprism.registry import Registry
from kvprism.score import DECAY, SINKS, importance
from kvprism.solve import (
    ALL_INT4,
    ALL_INT8,
    ALL_NATIVE,
    BALANCED,
    EVICT,
    GREEDY,
    TWO_TIER,
    Family,
    Pinned,
    TokenProblem,
    solve_layers,
    solve_nominal,
    solve_prompt,
)
from kvprism.tensors import LayerView

Order = Literal["importance", "random", "recency", "ends"]
RECENT = 128


@dataclass(frozen=True)
class Policy:
    """One row: which tokens go first, how counts follow the budget, what stays native, and when.

    tempo `whole_prompt` plans after prefill; `per_layer` plans each layer as soon as it exists.
    """

    summary: str
    family: Family
    order: Order = "importance"
    sinks: int = 0
    recent: int = 0
    tempo: Literal["whole_prompt", "per_layer"] = "whole_prompt"

    @property
    def budgeted(self) -> bool:
        """False for the fixed-rate arms, which have one size and ignore the budget."""
        return self.family.floor < 1


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
    ],
)


@dataclass(frozen=True)
class PlanOptions:
    """The settings of a plan beside policy and budget.

    importance: `attention`, `position` or `norm`; decay: lambda per token of distance from the end;
    seed: for the random orders; codec: `nested` (ours) or `published` (the papers' code).
    """

    importance: str = "attention"
    decay: float = DECAY
    seed: int = 0
    codec: str = "nested"
    split: Split = WHOLE

    @property
    def menu(self) -> tuple[Tier, ...]:
        if self.codec not in MENUS:
            raise UnknownName("codec", self.codec, list(MENUS))
        return MENUS[self.codec]


DEFAULT_OPTIONS = PlanOptions()


def plan(
    view: Sequence[LayerView],
    policy: str = "spectrum",
    budget: str | float | Budget | None = None,
    *,
    nominal: bool = False,
    options: PlanOptions = DEFAULT_OPTIONS,
    capability: Capability | None = None,
    profile: Profile | None = None,
) -> Plan:
    """Decide the tier of every token of a captured prompt.

    view: one `LayerView` per layer; budget: `0.30`, `"30%"`, `"512MiB"`, `"512tok"`, a cap on *all*
    wire bytes (none for the fixed-rate policies); nominal: read the fraction as the paper's payload-only
    budget instead.

    Raises:
        UnknownName: no such policy, importance or codec.
        BudgetTooSmall: nothing legal fits; carries the minimum.
        MissingSignal: importance `attention` without captured queries.
        Unsupported: the receiver's capability rules the policy out.
        BadInput: a budgeted policy without a budget.
    """
    row = POLICIES[policy]
    shape = KVShape(tuple(layer.kv.shape() for layer in view))
    _check_capability(policy, row, options.menu, capability or Capability())
    if row.budgeted and budget is None:
        raise BadInput(f"policy {policy!r} needs a budget, such as 0.30, 30%, 512MiB or 512tok")
    if nominal and row.budgeted:
        return solve_nominal(_problem(policy, view, options), shape, _fraction(budget))
    limit = None if budget is None else Budget.parse(budget, shape)
    if row.tempo == "per_layer" and limit is not None:
        problems = [_problem(policy, [layer], options) for layer in view]
        return solve_layers(problems, shape, limit, layer_shares(shape, profile))
    plan = solve_prompt(_problem(policy, view, options), shape, limit if row.budgeted else None)
    if limit is not None and plan.nbytes > limit.nbytes:
        raise BudgetTooSmall(policy, plan.nbytes, limit.nbytes, shape.reference_nbytes)
    return plan


def plan_shape(
    shape: KVShape, policy: str, budget: str | None, options: PlanOptions = DEFAULT_OPTIONS
) -> Plan:
    """A dry run: the policy's plan for a cache that does not exist yet, most recent tokens first."""
    row, problem = POLICIES[policy], _dry_problem(shape, policy, options)
    if not row.budgeted:
        return solve_prompt(problem, shape, None)
    if budget is None:
        raise BadInput(f"policy {policy!r} needs a budget, such as 0.30, 30%, 512MiB or 512tok")
    limit = Budget.parse(budget, shape)
    if row.tempo == "per_layer":
        shares = layer_shares(shape, None)
        return solve_layers([problem] * len(shape.layers), shape, limit, shares)
    return solve_prompt(problem, shape, limit)


def smallest_nbytes(shape: KVShape, policy: str, options: PlanOptions = DEFAULT_OPTIONS) -> int:
    """The fewest wire bytes that the policy can send this cache in."""
    problem = _dry_problem(shape, policy, options)
    return solve_nominal(problem, shape, problem.family.floor).nbytes


def _dry_problem(shape: KVShape, policy: str, options: PlanOptions) -> TokenProblem:
    row, n = POLICIES[policy], shape.layers[0].n_tokens
    protected = _protected(row, n)
    order = np.arange(n)[::-1]
    return TokenProblem(
        policy,
        row.family,
        order[~np.isin(order, protected)],
        protected,
        options.menu,
        {},
        options.split,
    )


def _protected(row: Policy, n: int) -> NDArray[np.intp]:
    return np.unique(np.r_[0 : min(row.sinks, n), max(0, n - row.recent) : n])


def layer_shares(shape: KVShape, profile: Profile | None) -> tuple[float, ...]:
    """Each layer's share of the budget: the profile's, else in proportion to its bytes."""
    if profile is not None and profile.layer_shares is not None:
        return profile.layer_shares
    return tuple(float(layer.reference_nbytes) for layer in shape.layers)


def _fraction(budget: str | float | Budget | None) -> float:
    text = str(budget).strip()
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError as error:
        raise BadInput(
            f"a nominal budget is a fraction such as 0.30 or 30%, got {budget!r}"
        ) from error


def _check_capability(
    policy: str, row: Policy, menu: tuple[Tier, ...], capability: Capability
) -> None:
    if row.family.floor < 0.25 and capability.drop == "none":
        raise Unsupported(
            f"policy {policy!r} drops tokens and the receiver's capability is drop=none; "
            "choose a policy that keeps every token, such as spectrum"
        )
    missing = [t.codec for t in menu if t.codec != DROP_CODEC and not capability.allows(t)]
    if missing:
        raise Unsupported(f"the receiver does not read {missing}; it reads {capability.codecs}")


def _problem(policy: str, view: Sequence[LayerView], options: PlanOptions) -> TokenProblem:
    row = POLICIES[policy]
    n = len(view[0].kv.positions)
    protected = _protected(row, n)
    order = _order(row, view, options)
    return TokenProblem(
        policy,
        row.family,
        order[~np.isin(order, protected)],
        protected,
        options.menu,
        _pinned(view, options.menu),
        options.split,
    )


def _order(row: Policy, view: Sequence[LayerView], options: PlanOptions) -> NDArray[np.intp]:
    """Token indices, most important first."""
    n = len(view[0].kv.positions)
    if not row.budgeted:
        return np.arange(n)
    if row.order == "recency":
        return np.arange(n)[::-1]
    if row.order == "ends":
        inward = np.minimum(np.arange(n), np.arange(n)[::-1])
        return np.argsort(inward, kind="stable")
    if row.order == "random":
        return np.random.default_rng(options.seed).permutation(n)
    scores = [importance(layer, options.importance, options.decay).mean(dim=0) for layer in view]
    mean = torch.stack(scores).mean(dim=0)
    return np.argsort(-mean.numpy(), kind="stable")


def _pinned(view: Sequence[LayerView], menu: tuple[Tier, ...]) -> Pinned:
    """Rows that no quantised tier can hold, so that the plan keeps them native."""
    pinned: dict[int, dict[str, NDArray[np.bool_]]] = {}
    for layer in view:
        for name, x in layer.kv.components.items():
            fits = quantisable(x, menu)
            if not fits.all():
                pinned.setdefault(layer.kv.layer_id, {})[name] = ~fits
    return pinned
