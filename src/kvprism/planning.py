"""A captured prompt, a policy and a budget -> an exact plan."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from kvprism.budgets import Given, budget_limit, required_budget
from kvprism.codec.reference import Conditioned, quantisable
from kvprism.core import (
    KEYS,
    MENUS,
    ONE_WIDTH_MENUS,
    STATE,
    Capability,
    KVShape,
    LayerShape,
    Tier,
)
from kvprism.errors import BadInput, ProfileMismatch, Unsupported
from kvprism.eviction_plans import dry_eviction_plan, plan_eviction, smallest_eviction_nbytes
from kvprism.evictions import Protection, protected
from kvprism.layout import Split, split_of
from kvprism.plans import Plan
from kvprism.policies import POLICIES, Policy
from kvprism.profiles import LayerSetting, Profile, conditioning_for
from kvprism.registry import Registry
from kvprism.routing import routes_of
from kvprism.score import DECAY, SCORERS, check_decay, ranking
from kvprism.solve import (
    ALL_NATIVE,
    EVICT,
    INT4_WAITS,
    INT8_FIRST,
    TWO_TIER,
    Pinned,
    TokenProblem,
    nominal_fraction,
    smallest_layers,
    smallest_prompt,
    solve_layers,
    solve_nominal,
    solve_prompt,
)
from kvprism.tensors import KeyConditioning, LayerView

CODECS = Registry("codec", list(MENUS.items()))


@dataclass(frozen=True)
class PlanOptions:
    """The settings of a plan beside policy and budget.

    importance: `attention`, `position` or `norm`; decay: lambda per token of distance from the
    end; seed: for the random orders; codec: `nested` (ours), `conditioned` (the same with the
    profile's key conditioning), `published` (the papers' code), or what others have: `affine`,
    `hadamard`, `grouped`; split: how the stream is cut, by default as `layout.split_of` says;
    protection: which tokens all eviction policies keep in any case, by default each its own.

    Raises:
        UnknownName: no such importance or codec.
        BadInput: a negative seed or decay.
    """

    importance: str = "attention"
    decay: float = DECAY
    seed: int = 0
    codec: str = "nested"
    split: Split | None = None
    protection: Protection | None = None

    def __post_init__(self) -> None:
        SCORERS[self.importance], CODECS[self.codec]
        check_decay(self.decay)
        if self.seed < 0:
            raise BadInput(f"a seed must not be negative, got {self.seed}")

    @property
    def menu(self) -> tuple[Tier, ...]:
        return CODECS[self.codec]


DEFAULT_OPTIONS = PlanOptions()


def plan(
    view: Sequence[LayerView],
    policy: str = "spectrum",
    budget: Given | None = None,
    *,
    nominal: bool = False,
    options: PlanOptions = DEFAULT_OPTIONS,
    capability: Capability | None = None,
    profile: Profile | None = None,
) -> Plan:
    """Decide the tier of every token of a captured prompt.

    view: one `LayerView` per layer; budget: `0.30`, `"30%"`, `"512MiB"`, `"512tok"`, a cap on *all*
    wire bytes (none for the fixed-rate policies); `"floor"` is the smallest plan that the policy
    has for this prompt, `"floor+0.04"` so much of 16 bits more; nominal: read the fraction as the
    paper's payload-only budget instead.

    A policy that gives a token one tier in all layers does so for the layers that hold the same
    tokens: layers with a sliding window are ranked by the mean over themselves, the others by the
    mean over the others, and all follow one curve at one b.

    `spectrum-adaptive` follows the settings of the profile's probe. With a `conditioned` layer
    among them the request is in the conditioned code, and since a request has one quantised code, a
    `plain` layer for which the profile has a conditioning is conditioned too. A `no-int4` layer
    follows the 2-tier curve, so that it may drop tokens that the other layers keep; what the budget
    has beyond all others at INT4 goes to it first, until it drops none. A nominal budget is each
    layer's own.

    Eviction policies rank and choose in every layer by itself: by head where the receiver's
    capability is `per_head`, else the same tokens in all heads, by the mean of their scores.

    Raises:
        UnknownName: no such policy.
        BudgetTooSmall: nothing legal fits; carries the minimum.
        MissingSignal: importance `attention` without captured queries, or an eviction policy
            without what `signals_of` names.
        Unsupported: the receiver's capability rules the policy out.
        ProfileMismatch: the profile does not have what the policy or the codec needs.
        BadInput: a budgeted policy without a budget, a profile of another number of layers, or the
            published codec for a policy that conditions.
    """
    shape = KVShape(tuple(layer.kv.shape() for layer in view))
    row, code = POLICIES[policy], code_of(shape, policy, options, profile)
    menu = code.menu
    capability = capability or Capability()
    missing = [tier.codec for tier in menu if tier.codec not in capability.codecs]
    if missing:
        raise Unsupported(
            f"the receiver does not read {missing}, it reads {list(capability.codecs)}; "
            f"choose another codec than {options.codec!r}, or another policy than {policy!r}"
        )
    if row.evicts:
        planned = plan_eviction(
            policy, shape, view, budget, options.menu, _cut(shape, options),
            nominal=nominal, capability=capability, profile=profile, protection=options.protection,
        )  # fmt: skip
    elif nominal and row.budgeted:
        problems = problems_of(policy, shape, view, options, code, paced=False)
        planned = _solve_nominal(row, problems, shape, nominal_fraction(budget))
    else:
        problems = problems_of(policy, shape, view, options, code)
        planned = _solve(policy, problems, shape, budget, profile)
    for layer in planned.layers:
        layer.check_drops(menu, capability)
    return planned


def plan_shape(
    shape: KVShape,
    policy: str,
    budget: Given | None,
    options: PlanOptions = DEFAULT_OPTIONS,
    profile: Profile | None = None,
) -> Plan:
    """A dry run: the plan for a cache that does not exist yet, most recent tokens first.

    Layers share uniformly where an eviction policy's shares follow the data; that moves padding.
    Without a profile `spectrum-adaptive` has the sizes of `spectrum`, and a routed policy those of
    equal shares.

    Raises:
        UnknownName, BudgetTooSmall, Unsupported, ProfileMismatch, BadInput: as `plan`.
    """
    row = POLICIES[policy]
    if row.evicts:
        cut = _cut(shape, options)
        its = options.protection
        return dry_eviction_plan(policy, shape, budget, options.menu, cut, profile, its)
    problems = _dry_problems(shape, policy, options, profile)
    return _solve(policy, problems, shape, budget if row.budgeted else None, profile)


def smallest_nbytes(
    shape: KVShape,
    policy: str,
    options: PlanOptions = DEFAULT_OPTIONS,
    profile: Profile | None = None,
) -> int:
    """The smallest budget in bytes that the policy can do with."""
    row = POLICIES[policy]
    if row.evicts:
        cut = _cut(shape, options)
        its = options.protection
        return smallest_eviction_nbytes(policy, shape, options.menu, cut, profile, its)
    problems = _dry_problems(shape, policy, options, profile)
    if row.tempo == "per_layer":
        return smallest_layers(problems, shape, layer_shares(shape, profile))
    return smallest_prompt(problems, shape)


def _cut(shape: KVShape, options: PlanOptions) -> Split:
    return options.split or split_of(shape)


def _dry_problems(
    shape: KVShape, policy: str, options: PlanOptions, profile: Profile | None
) -> list[TokenProblem]:
    if profile is None:
        code = Code(_menu(policy, options, conditioned=False))
    else:
        code = code_of(shape, policy, options, profile)
    return problems_of(policy, shape, (), options, code)


@dataclass(frozen=True)
class Code:
    """What a policy makes of a profile: the menu, the conditioned layers, those without INT4.

    conditioning: layer id -> its key conditioning; no_int4: layer ids.
    """

    menu: tuple[Tier, ...]
    conditioning: Mapping[int, KeyConditioning] = field(default_factory=dict)
    no_int4: frozenset[int] = frozenset()


def code_of(shape: KVShape, policy: str, options: PlanOptions, profile: Profile | None) -> Code:
    """The menu and the layers' settings; asks for no prompt, so that errors come early.

    Raises:
        ProfileMismatch: no profile, or not one that has what the policy or the codec needs.
        UnknownName: a route of the profile names an eviction policy that there is not.
        BadInput: the published codec for a policy that conditions.
    """
    if POLICIES[policy].routed:
        routes_of(shape, policy, profile)
    settings = _settings(shape, policy, profile)
    menu = _menu(policy, options, "conditioned" in settings.values())
    no_int4 = frozenset(layer for layer, setting in settings.items() if setting == "no-int4")
    return Code(menu, conditioning_for(shape, menu, profile), no_int4)


def _menu(policy: str, options: PlanOptions, conditioned: bool) -> tuple[Tier, ...]:
    row = POLICIES[policy]
    if row.code is not None:
        if options.codec != DEFAULT_OPTIONS.codec:
            raise BadInput(
                f"policy {policy!r} is about the code {row.code!r}, got codec {options.codec!r}; "
                "leave the codec out"
            )
        return (MENUS | ONE_WIDTH_MENUS)[row.code]
    remedy = row.remedy
    if remedy != "none" and options.codec not in ("nested", "conditioned"):
        raise BadInput(
            f"policy {policy!r} chooses between the codecs nested and conditioned, got "
            f"{options.codec!r}; leave the codec out"
        )
    if remedy == "conditioned" or conditioned:
        return CODECS["conditioned"]
    return options.menu


def _settings(shape: KVShape, policy: str, profile: Profile | None) -> dict[int, LayerSetting]:
    """Layer id -> what the probe set it to, for a policy that follows the probe."""
    if POLICIES[policy].remedy != "adaptive":
        return {}
    found = None if profile is None or profile.probe is None else profile.probe.settings
    if found is None or len(found) != len(shape.layers):
        what = "none" if found is None else f"for {len(found)} layers"
        raise ProfileMismatch(
            f"policy {policy!r} follows a probe's settings for {len(shape.layers)} layers, got "
            f"{what}; make a profile with kvprism probe and give it to both sides"
        )
    return {layer.layer_id: its for layer, its in zip(shape.layers, found, strict=True)}


def layer_shares(shape: KVShape, profile: Profile | None) -> tuple[float, ...]:
    """Each layer's share of the budget: the profile's, else in proportion to its bytes."""
    if profile is not None and profile.layer_shares is not None:
        return profile.layer_shares
    return tuple(float(layer.reference_nbytes) for layer in shape.layers)


def _solve(
    policy: str,
    problems: Sequence[TokenProblem],
    shape: KVShape,
    budget: Given | None,
    profile: Profile | None,
) -> Plan:
    row = POLICIES[policy]
    if budget is None and not row.budgeted:
        return solve_prompt(problems, shape, None)
    given, shares = required_budget(policy, budget), layer_shares(shape, profile)
    if row.tempo == "per_layer":
        limit = budget_limit(given, shape, lambda: smallest_layers(problems, shape, shares))
        return solve_layers(problems, shape, limit, shares)
    return solve_prompt(
        problems, shape, budget_limit(given, shape, lambda: smallest_prompt(problems, shape))
    )


def _solve_nominal(row: Policy, problems: Sequence[TokenProblem], shape: KVShape, b: float) -> Plan:
    if row.tempo == "whole_prompt":
        return solve_nominal(problems, shape, b)
    alone = [
        solve_nominal([problem], KVShape((layer,)), b)
        for problem, layer in zip(problems, shape.layers, strict=True)
    ]
    return replace(alone[0], layers=tuple(plan.layers[0] for plan in alone))


def problems_of(
    policy: str,
    shape: KVShape,
    view: Sequence[LayerView],
    options: PlanOptions,
    code: Code,
    *,
    paced: bool = True,
) -> list[TokenProblem]:
    """One problem for each token range, or for each layer; without a view it is a dry run.

    paced: layers without INT4 are served before the others' tokens go to INT8.
    """
    split = _cut(shape, options)
    if POLICIES[policy].tempo == "per_layer":
        groups = [[layer] for layer in shape.layers]
    else:
        groups = [
            [layer for layer in shape.layers if layer.token_range == tokens]
            for tokens in shape.token_ranges
        ]
    views = {layer.kv.layer_id: layer for layer in view}
    problems = [
        token_problem(policy, group[0], [views[la.layer_id] for la in group if view], options, code)
        for group in groups
    ]
    problems = [replace(problem, split=split) for problem in problems]
    return _without_int4(problems, shape, code, paced) if code.no_int4 else problems


def _without_int4(
    problems: Sequence[TokenProblem], shape: KVShape, code: Code, paced: bool
) -> list[TokenProblem]:
    """One problem per layer: that of its token range, on the 2-tier curve where INT4 is off."""
    on, off = problems[0].family, TWO_TIER
    if paced and len(code.no_int4) < len(shape.layers):
        on, off = INT4_WAITS, INT8_FIRST
    plain, strict = (
        {t: replace(p, family=its) for t, p in zip(shape.token_ranges, problems, strict=True)}
        for its in (on, off)
    )
    return [
        (strict if layer.layer_id in code.no_int4 else plain)[layer.token_range]
        for layer in shape.layers
    ]


def token_problem(
    policy: str, layer: LayerShape, view: Sequence[LayerView], options: PlanOptions, code: Code
) -> TokenProblem:
    """What the token solver is asked for layers like `layer`; without a view it is a dry run."""
    row = POLICIES[policy]
    order = _order(row, layer.n_tokens, view, options)
    stays = protected(row.sinks, row.recent, layer)
    return TokenProblem(
        policy=policy,
        family=row.family,
        order=order[~stays[order]],
        protected=np.flatnonzero(stays),
        menu=code.menu,
        pinned={} if row.family in (ALL_NATIVE, EVICT) else pinned_rows(view, code),
    )


def _order(
    row: Policy, n: int, view: Sequence[LayerView], options: PlanOptions
) -> NDArray[np.intp]:
    """Token indices, most important first."""
    recency = np.arange(n)[::-1]
    if row.order == "random":
        return np.random.default_rng(options.seed).permutation(n)
    if row.order == "ends":
        return np.argsort(np.minimum(recency, recency[::-1]), kind="stable")
    if row.order == "recency" or not row.budgeted or not view:
        return recency
    ranks = ranking(view, options.importance, options.decay)
    return np.argsort(-ranks.cpu().numpy(), kind="stable")


def pinned_rows(view: Sequence[LayerView], code: Code) -> Pinned:
    """Rows that no quantised tier can hold, so that the plan keeps them native."""
    pinned: dict[int, dict[str, NDArray[np.bool_]]] = {}
    for layer in view:
        given = code.conditioning.get(layer.kv.layer_id)
        keys = None if given is None else Conditioned(given, layer.kv.positions.cpu())
        for name, x in layer.kv.components.items():
            if name in STATE:
                pinned.setdefault(layer.kv.layer_id, {})[name] = np.ones(x.shape[:2], bool)
                continue
            conditioned = keys if name == KEYS else None
            find = partial(quantisable, x, code.menu, conditioned)
            key = ("quantisable", name, code.menu)
            # Conditioned keys depend on a profile that may be another the next time.
            fits = layer.once(key, find) if conditioned is None else find()
            if not fits.all():
                pinned.setdefault(layer.kv.layer_id, {})[name] = ~fits
    return pinned
