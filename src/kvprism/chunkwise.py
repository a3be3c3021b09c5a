"""Plans of a prompt that is prefilled in chunks: a provisional map, and upgrades after the last.

What a token is worth is known when the last chunk was computed. Until then protected tokens go
native and the others in the family's smallest tier, which is 4 bits; what the budget leaves goes
into upgrades of the tokens that rank first. All of it counts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from kvprism.budgets import Given, budget_limit, required_budget
from kvprism.core import Budget, Capability, KVShape, LayerShape, Tier
from kvprism.errors import BudgetTooSmall, ShapeMismatch, Unsupported
from kvprism.layout import Split, TierArray, ranges, row_nbytes, split_of
from kvprism.planning import (
    DEFAULT_OPTIONS,
    PlanOptions,
    code_of,
    pinned_rows,
    problems_of,
)
from kvprism.plans import LayerCounts, LayerPlan, end_of, offer_of, sent_after
from kvprism.policies import POLICIES
from kvprism.profiles import Profile
from kvprism.solve import (
    ALL_NATIVE,
    INT4_INDEX,
    INT8_INDEX,
    NATIVE_INDEX,
    Curve,
    Least,
    TokenProblem,
    assigned,
    distinct_problems,
)
from kvprism.staged import StagedPlan, part_of, staged_menu, upgrade_of, within
from kvprism.tensors import LayerKV, LayerView
from kvprism.wire.frames import frame_nbytes


def leaves_in_chunks(policy: str) -> bool:
    """Whether a prompt can be sent chunk by chunk; `UnknownName` for no policy.

    So can those of one size, and those that give every token at least 4 bits by the whole prompt.
    """
    row = POLICIES[policy]
    if row.evicts or row.remedy == "adaptive":
        return False
    return not row.budgeted or (row.tempo == "whole_prompt" and not row.family.drops)


class ChunkPlanner:
    """Plans one request part by part: `base` of every layer of every chunk, in order, then `plan`.

    shape: of the cache to come; chunk: tokens of a part, where that is known: the budget can then
    be refused before anything is sent. `shape`, `menu` and `split` go into the offer.

    must_fit: refuse a budget that the provisional map is above; otherwise send that map, without
    upgrades, and say so in `missed`.

    Raises:
        UnknownName: no such policy.
        Unsupported: the policy may drop tokens, or plans a layer by itself; a code without
            upgrades, or a receiver that does not read them.
        BudgetTooSmall, ProfileMismatch, BadInput: as `plan`, as far as the shape shows it.
    """

    def __init__(
        self,
        shape: KVShape,
        policy: str,
        budget: Given | None = None,
        *,
        chunk: int | None = None,
        options: PlanOptions = DEFAULT_OPTIONS,
        capability: Capability | None = None,
        profile: Profile | None = None,
        must_fit: bool = True,
    ) -> None:
        if not leaves_in_chunks(policy):
            raise Unsupported(
                f"policy {policy!r} may drop tokens or plans each layer by itself, so that a chunk "
                "cannot be sent before the last; choose one that gives every token at least 4 bits "
                "by the whole prompt, such as spectrum, or send without chunks"
            )
        self.shape, self._policy, self._options = shape, policy, options
        self._code = code_of(shape, policy, options, profile)
        self._row, self._must_fit, self.missed = POLICIES[policy], must_fit, False
        menu = self._code.menu
        self.menu: tuple[Tier, ...] = staged_menu(menu) if self._row.budgeted else menu
        self.split: Split = options.split or split_of(shape)
        self._capability = capability or Capability()
        self._check_codecs()
        self._provisional = self._smallest_members()
        self._parts: list[LayerPlan] = []
        self._nbytes = frame_nbytes(offer_of(shape, self.menu))
        self._sequence = 0
        self._budget = required_budget(policy, budget) if self._row.budgeted else None
        self._refuse_above_budget(*self._provisional_size(chunk))

    def base(self, kv: LayerKV) -> LayerPlan:
        """The provisional tiers of one layer's part; call it for what is sent, as it is sent.

        Raises:
            BudgetTooSmall: rows that must stay native take more than the budget.
            ShapeMismatch: not a part of the shape.
        """
        own, shape = kv.shape(), self._provisional[kv.layer_id].shape
        if within(shape, *own.token_range) != own.token_range:
            raise ShapeMismatch(f"{own} is no part of {shape}")
        part = self._pinned(kv, part_of(self._provisional[kv.layer_id], own.token_range))
        part.check_drops(self.menu, self._capability)
        self._take(part)
        return part

    def _take(self, part: LayerPlan) -> None:
        sent = sent_after([part], self.menu, self.split, self._nbytes, self._sequence)
        self._refuse_above_budget(*sent)
        self._parts.append(part)
        self._nbytes, self._sequence = sent

    def dry(self, chunk: int) -> StagedPlan:
        """A dry run, in place of `base` and `plan`: most recent tokens first."""
        for part in self._expected_parts(chunk):
            self._take(part)
        return self.plan(())

    def plan(self, views: Sequence[LayerView], importance: str | None = None) -> StagedPlan:
        """All that was sent and will be; views: of the whole prompt.

        importance: in place of that of the options.

        Raises:
            MissingSignal: importance `attention` without captured queries.
        """
        if importance is not None:
            self._options = replace(self._options, importance=importance)
        provisional = self._joined()
        final = provisional
        if self._row.budgeted and not self.missed:
            final = self._solved(provisional, views)
        return StagedPlan(
            final, self.menu, self.split, self._policy, provisional=provisional, cuts=self._cuts()
        )

    def _cuts(self) -> tuple[int, ...]:
        """Where chunks ended: a layer with a window may begin in the middle of one."""
        longest = max(self.shape.layers, key=lambda layer: layer.n_tokens)
        own = [p.shape for p in self._parts if p.shape.layer_id == longest.layer_id]
        return tuple(sorted({bound for shape in own for bound in shape.token_range}))

    def _check_codecs(self) -> None:
        codecs = self._capability.codecs
        missing = sorted({tier.codec for tier in self.menu if tier.codec not in codecs})
        if missing:
            raise Unsupported(f"the receiver does not read {missing}, it reads {list(codecs)}")

    def _problems(self, views: Sequence[LayerView]) -> list[TokenProblem]:
        options = replace(self._options, split=self.split)
        return problems_of(self._policy, self.shape, views, options, self._code)

    def _smallest_members(self) -> dict[int, LayerPlan]:
        """By layer: the tiers that need no prompt."""
        planned = assigned(self._problems(()), self.shape)
        return {
            layer.layer_id: problem.layer(layer, problem.tiers(problem.family.floor))
            for problem, layer in planned
        }

    def _pinned(self, kv: LayerKV, part: LayerPlan) -> LayerPlan:
        """The same with the rows native that no code can hold."""
        if self._row.family is ALL_NATIVE:
            return part
        pinned = pinned_rows([LayerView(kv)], self._code).get(kv.layer_id, {})
        if not pinned:
            return part
        tier_of = dict(part.tier_of)
        for name, rows in pinned.items():
            tiers = tier_of[name]
            coded = (tiers == INT8_INDEX) | (tiers == INT4_INDEX)
            tier_of[name] = np.where(rows & coded, np.uint8(NATIVE_INDEX), tiers)
        return LayerPlan(part.shape, tier_of)

    def _expected_parts(self, chunk: int | None) -> Iterator[LayerPlan]:
        """The parts to come, unless rows must be pinned; one each where the chunk is unknown."""
        start = min(layer.token_range[0] for layer in self.shape.layers)
        for low, high in ranges(start, self.shape.next_position, chunk):
            for layer in self._provisional.values():
                if (tokens := within(layer.shape, low, high)) is not None:
                    yield part_of(layer, tokens)

    def _provisional_size(self, chunk: int | None) -> tuple[int, int]:
        """Bytes and manifests of those."""
        return sent_after(self._expected_parts(chunk), self.menu, self.split, self._nbytes)

    def _refuse_above_budget(self, nbytes: int, sequence: int) -> None:
        """Of so many bytes in so many manifests, whatever is still to come."""
        if self._budget is None or self.missed:
            return
        whole = nbytes + frame_nbytes(end_of(sequence, nbytes))
        limit = self._limit(whole)
        if whole > limit.nbytes:
            if self._must_fit:
                reference = self.shape.reference_nbytes
                raise BudgetTooSmall(self._policy, whole, limit.nbytes, reference)
            self.missed = True

    def _limit(self, floor: int) -> Budget:
        """In bytes; floor: of the provisional map, where the budget counts from there."""
        assert self._budget is not None
        return budget_limit(self._budget, self.shape, lambda: floor)

    def _joined(self) -> tuple[LayerPlan, ...]:
        """What was sent of each layer."""
        layers = []
        for layer in self.shape.layers:
            parts = [part for part in self._parts if part.shape.layer_id == layer.layer_id]
            tier_of = {
                name: np.concatenate([part.tier_of[name] for part in parts], axis=1)
                for name, _, _ in layer.components
            }
            layers.append(LayerPlan(layer, tier_of))
        return tuple(layers)

    def _solved(
        self, provisional: tuple[LayerPlan, ...], views: Sequence[LayerView]
    ) -> tuple[LayerPlan, ...]:
        planned = assigned(self._problems(views), self.shape)
        sizes = _Sizes(provisional, self.menu, self.split, self._nbytes, self._sequence)
        limit = self._limit(sizes(provisional))
        b = Curve(planned, sizes, sizes.least(planned)).largest(limit.nbytes)
        assert b is not None  # `base` was within the budget, and is a member
        return tuple(problem.layer(layer, problem.tiers(b)) for problem, layer in planned)


class _Sizes:
    """The exact bytes of a request whose base was sent, for any tiers that it may end in.

    nbytes, sequence: of what was sent; END comes on top.
    """

    def __init__(
        self,
        provisional: Sequence[LayerPlan],
        menu: tuple[Tier, ...],
        split: Split,
        nbytes: int,
        sequence: int,
    ) -> None:
        self._provisional = {layer.shape.layer_id: layer for layer in provisional}
        self._menu, self._split = menu, split
        self._nbytes, self._sequence = nbytes, sequence

    def __call__(self, layers: Sequence[LayerPlan | LayerCounts]) -> int:
        upgrades = (made for layer in layers if (made := self._upgrade(layer)) is not None)
        nbytes, sequence = sent_after(
            upgrades, self._menu, self._split, self._nbytes, self._sequence
        )
        return nbytes + frame_nbytes(end_of(sequence, nbytes))

    def least(self, planned: Sequence[tuple[TokenProblem, LayerShape]]) -> Least:
        """What is sent already, the residual of every INT8 token, every new native one."""
        framing, token_nbytes = self._nbytes, []
        for problem in distinct_problems(planned):
            layers = [la for its, la in planned if its is problem and la.layer_id not in its.pinned]
            native = sum(_native_nbytes(layer) for layer in layers)
            refined = sum(_refined_nbytes(layer, self._menu) for layer in layers)
            # Protected tokens are native from the beginning.
            framing -= native * len(problem.protected)
            token_nbytes.append((native, refined, 0))
        return Least(framing, token_nbytes)

    def _upgrade(self, layer: LayerPlan | LayerCounts) -> LayerPlan | LayerCounts | None:
        first = self._provisional[layer.shape.layer_id]
        if isinstance(layer, LayerPlan):
            return upgrade_of(first, layer, self._menu)
        native, start = _native_in(first), layer.shape.token_range[0]
        counted, nothing = layer.counts, (0,) * (len(self._menu) - 3)

        def counts(tokens: tuple[int, int]) -> tuple[int, ...]:
            """(keep, refine, replace) after tiers that upgrades do not have."""
            at = counted(tokens)
            before = int(native[tokens[1] - start] - native[tokens[0] - start])
            replaced, refined = at[NATIVE_INDEX] - before, at[INT8_INDEX]
            return (*nothing, tokens[1] - tokens[0] - replaced - refined, refined, replaced)

        keep = len(nothing)
        if all(
            counts(tokens)[keep] == tokens[1] - tokens[0]
            for tokens in ranges(*layer.shape.token_range, self._split.tokens)
        ):
            return None
        return LayerCounts(layer.shape, counts)


def _native_in(layer: LayerPlan) -> TierArray:
    """`[token + 1]`: how many tokens before it are native, in a layer whose rows are all alike."""
    row = next(iter(layer.tier_of.values()))[0]
    return np.concatenate([[0], np.cumsum(row == NATIVE_INDEX)])


def _native_nbytes(layer: LayerShape) -> int:
    return layer.native_nbytes // layer.n_tokens


def _refined_nbytes(layer: LayerShape, menu: Sequence[Tier]) -> int:
    """Of one token's residuals."""
    refine = menu[len(menu) - 2]
    return sum(
        component.heads * row_nbytes(refine, component.channels, layer.itemsize)
        for component in layer.components
    )
