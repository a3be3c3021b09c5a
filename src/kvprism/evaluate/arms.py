"""The arms of a table: policies at budgets, and a cache through the wire under one of them."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from kvprism.budgets import split_floor
from kvprism.codec.stream import decode, encode
from kvprism.core import HOLDS, Budget, KVShape
from kvprism.errors import BadInput, ProfileMismatch
from kvprism.planning import DEFAULT_OPTIONS, PlanOptions, plan
from kvprism.plans import Plan
from kvprism.policies import POLICIES
from kvprism.profiles import Profile
from kvprism.retention import FULL_KV, Decode, per_layer
from kvprism.state import with_mass
from kvprism.tensors import LayerView, RequestKV

RAW = "raw"
_ANY_SHAPE = KVShape.dense(layers=1, heads=1, channels=2**20, tokens=2**10)


@dataclass(frozen=True)
class SavedProfile:
    """A profile as records name it: its file, and its hash in hex."""

    path: str
    hash: str

    @classmethod
    def named(cls, path: Path) -> "SavedProfile":
        """What is in a file now; errors as `Profile.load`."""
        return cls(str(path), Profile.load(path).hash.hex())

    @cached_property
    def profile(self) -> Profile:
        """Read again; `ProfileMismatch` if the file has changed in the meantime."""
        profile = Profile.load(Path(self.path))
        if profile.hash.hex() != self.hash:
            raise ProfileMismatch(
                f"{self.path} is now profile {profile.hash.hex()[:16]}..., it was "
                f"{self.hash[:16]}... when the run began; begin again"
            )
        return profile


@dataclass(frozen=True)
class Arm:
    """One column of a table: a policy at a budget (none for the fixed-rate policies).

    saved: the model's profile, which some policies and codecs need; decode: what the layers keep
    while tokens are generated, all if None.

    Raises:
        UnknownName: no such policy.
        BadInput: a budget where none belongs, or none where one does.
    """

    policy: str
    budget: float | str | None = None
    options: PlanOptions = DEFAULT_OPTIONS
    saved: SavedProfile | None = None
    decode: Decode | None = None

    def __post_init__(self) -> None:
        if self.fixed_rate != (self.budget is None):
            needs = "takes no" if self.fixed_rate else "needs a"
            raise BadInput(f"policy {self.policy!r} {needs} budget, got {self.budget}")

    @property
    def fixed_rate(self) -> bool:
        """Whether the policy has one size and ignores budgets."""
        return not POLICIES[self.policy].budgeted

    @property
    def profile(self) -> Profile | None:
        return None if self.saved is None else self.saved.profile

    def masses(self, n_layers: int) -> list[bool]:
        """Which layers' decode phase goes on with the attention mass of the prompt."""
        if self.decode is None:
            return [False] * n_layers
        return [its.needs_mass for its in per_layer(self.decode, n_layers)]

    def for_document(self, document: int) -> "Arm":
        """The same arm with this document's random order; reproducible from seed and number."""
        return replace(self, options=replace(self.options, seed=self.options.seed + document))


def arms_of(
    policies: Iterable[str],
    budgets: Iterable[str | float],
    options: PlanOptions = DEFAULT_OPTIONS,
    saved: SavedProfile | None = None,
    decode: Sequence[Decode] = (FULL_KV,),
) -> tuple[Arm, ...]:
    """`raw` first, the baseline; fixed-rate policies once, the others at every budget.

    policies: names, each with `:codec` behind it if its code is not that of `options`; decode: the
    decode phases, under each of which all policies go. The baseline keeps everything.

    Raises:
        UnknownName: no such policy or codec.
        BadInput: a budgeted policy and no budget, or a budget that is none.
    """
    wanted = [policy_budget(budget) for budget in budgets]
    arms = [Arm(RAW, None, options, saved)]
    for name in policies:
        policy, _, codec = name.partition(":")
        own = replace(options, codec=codec) if codec else options
        if POLICIES[policy].budgeted and not wanted:
            raise BadInput(f"policy {policy!r} needs a budget, such as 0.30 or 0.30,0.40")
        for budget in wanted if POLICIES[policy].budgeted else [None]:
            arms += [
                Arm(policy, budget, own, saved, None if phase == FULL_KV else phase)
                for phase in decode
            ]
    return tuple(dict.fromkeys(arms))


def policy_budget(text: str | float) -> float | str:
    """`0.30` and `30%` as the fraction that they are; `512MiB` or `floor+0.04` as it was written.

    Raises:
        BadInput: none of these.

    Example:
        >>> policy_budget("30%"), policy_budget("0.3"), policy_budget(" 512MiB ")
        (0.3, 0.3, '512MiB')
    """
    _, beyond = split_floor(text)
    if beyond is not None:
        Budget.parse(beyond, _ANY_SHAPE)  # refuses what is no budget before anything is measured
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(%?)\s*", str(text))
    if match is None:
        return str(text).strip()
    return round(float(match[1]) / (100 if match[2] else 1), 12)


def through_the_wire(kv: RequestKV, view: Sequence[LayerView], arm: Arm) -> tuple[RequestKV, Plan]:
    """Plan, encode and decode: what the decode side would hold, and what it cost.

    A decode phase that counts attention from the prompt on gets the prompt's, billed with the rest.

    Raises:
        BudgetTooSmall: nothing legal fits this arm's budget.
        MissingSignal, ProfileMismatch, CodecError: see `plan` and `encode`.
    """
    if any(masses := arm.masses(len(view))):
        kv, view = with_mass(kv, view, masses)
    chosen = plan(
        view,
        arm.policy,
        arm.budget,
        options=arm.options,
        capability=HOLDS,
        profile=arm.profile,
    )
    return sent(kv, chosen, arm.profile), chosen


def sent(kv: RequestKV, chosen: Plan, profile: Profile | None) -> RequestKV:
    """What the decode side would hold; errors as `encode` and `decode`."""
    blob = encode(kv, chosen, profile=profile)
    assert len(blob) == chosen.nbytes, (chosen.policy, len(blob), chosen.nbytes)
    return decode(blob, profile=profile, drop=HOLDS.drop)
