"""From measured losses to routes: PolyKV's, and ours, which are chosen on documents held out.

A loss is the increase of the NLL per scored token over the full cache, in nats, for each group of
documents: the text, and every kind of task. `mean` and `worst` are over groups; a sum of layers'
worst cases bounds the worst case of the layers' sum.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from typing import Literal, get_args

import msgspec

from kvprism.allocate import (
    Curve,
    budgets,
    hull,
    least_tokens,
    marginal,
    neighbours,
    preferred,
    route,
)
from kvprism.errors import BadInput, UnknownName
from kvprism.evaluate.layers import (
    TEXT,
    DecodePhase,
    Document,
    LayerLosses,
    Loss,
    Stage,
    Treatment,
    key_of,
    silently,
)
from kvprism.evictions import EVICTIONS
from kvprism.layer_signals import perplexity_sensitivity, worst_case
from kvprism.policies import POLICIES, VARIANTS
from kvprism.retention import decode_policies
from kvprism.routes import LayerRoute, Route

Preference = Literal["perplexity", "cosine"]
Sharing = Literal["uniform", "entropy", "perplexity"]
Phase = Literal["prompt", "decode"]
# The paper's candidates that are built and differ from each other as a layer's pattern: PyramidKV's
# is SnapKV's score. CaM and D2O rewrite rows, which a route does not do.
PAPER = ("streaming-llm", "h2o", "tova", "snapkv", "cake", "scissorhands")
# Ours: besides, what others found strong where the question is not known.
CANDIDATES = (*PAPER, "keydiff", "expected-attention", "ada-kv", "lava", "defensivekv")
# Those that `RouteSearch.routes` makes unless it is asked for others.
PAPERS, OURS = "polykv", "polykv-best"
# A curve is measured at these multiples of every budget.
STEPS = (0.25, 0.5, 1.0, 2.0, 4.0)
PASSES, FINALISTS = 2, 3
Arrangement = tuple[list[str], list[int]]


@dataclass(frozen=True)
class Variant:
    """Which signals Algorithm 1 takes: g for the policy, m for the budgets."""

    preference: Preference = "perplexity"
    sharing: Sharing = "uniform"

    def __str__(self) -> str:
        return f"preference {self.preference}, budgets {self.sharing}"


class Candidate(msgspec.Struct, frozen=True):
    """A route that was tried; making, choosing: its loss on the two halves, if it was measured."""

    name: str
    prefill: str
    making: float
    choosing: float | None = None


class BudgetReport(msgspec.Struct, frozen=True):
    """What was tried at one budget.

    single: the whole policy with the least loss on all calibration documents; singles: of each.
    """

    tokens: int
    single: str
    singles: dict[str, float]
    candidates: tuple[Candidate, ...]


@dataclass(eq=False)
class RouteSearch:
    """Measures what it needs and makes the routes `polykv` and `polykv-best` at every budget.

    paper: candidates of Algorithm 1; policies: of the allocator; singles: whole policies, of which
    the best is named; sweeps: passes of coordinate descent over the layers; wanted: whose routes,
    `polykv` (by `variant`), `polykv-best`, or a name of `policies.VARIANTS`; decode: whether
    Algorithm 1 also gives its routes a decode phase, by the signals of that phase.

    Raises:
        UnknownName: no such eviction policy, or no policy of that name has routes.
        BadInput: a budget below what every layer must have, or not below the context; no candidate,
            or for a decode phase none that evicts then.
    """

    losses: LayerLosses
    tokens: Sequence[int]
    variant: Variant = field(default_factory=Variant)
    paper: Sequence[str] = PAPER
    policies: Sequence[str] = CANDIDATES
    singles: Sequence[str] = tuple(EVICTIONS)
    sweeps: int = PASSES
    stage: Stage = silently
    wanted: Sequence[str] = (PAPERS, OURS)
    decode: bool = False

    def __post_init__(self) -> None:
        if self.decode:
            check_decode(self.wanted, self.paper)
        for name in self.wanted:
            check_routed(name)
        rows = [EVICTIONS[policy] for policy in (*self.paper, *self.policies, *self.singles)]
        if not self.paper or not self.policies or not self.singles:
            raise BadInput("calibration needs at least one candidate policy for each of its routes")
        self.floor = 1 + max(row.sinks + row.recent for row in rows)
        context = self.losses.calibration.context
        for tokens in self.tokens:
            if not self.floor <= tokens < context:
                raise BadInput(
                    f"a budget of {tokens} tokens a layer: expected at least {self.floor}, one "
                    f"more than the candidates protect, and fewer than the context's {context}"
                )

    def papers(self, phase: Phase) -> list[str]:
        """Algorithm 1's candidates, those that evict in this phase."""
        return list(self.paper) if phase == "prompt" else _evicting_in_decode(self.paper)

    @property
    def _documents(self) -> tuple[Document, ...]:
        return self.losses.calibration.documents

    @cached_property
    def making(self) -> list[Document]:
        """The half that routes are made on."""
        return [document for document in self._documents if not document.chooses]

    @property
    def _texts(self) -> list[Document]:
        return [document for document in self.making if document.group == TEXT]

    @cached_property
    def choosing(self) -> list[Document]:
        """The half that they are chosen by."""
        return [document for document in self._documents if document.chooses]

    @cached_property
    def grid(self) -> list[int]:
        """Tokens at which every layer is measured alone under every candidate."""
        wanted = {max(self.floor, int(n * step)) for n, step in product(self.tokens, STEPS)}
        return sorted(n for n in wanted if n < self.losses.calibration.context)

    def measure(self) -> None:
        """Every layer alone, on the making half.

        For the allocator under its candidates at every grid point; for Algorithm 1, which reads
        texts alone, under its own at the budgets.
        """
        self.measure_signals()
        self._fill("layers' curves", self.making, self._alone(self.policies, self.grid))

    def measure_signals(self) -> None:
        """What Algorithm 1 reads alone; enough for `polykv` with a uniform or PPL sharing."""
        signals = self._alone(self.paper, self.tokens)
        self._fill("layers' signals", self._texts, signals)
        if self.decode:
            signals = self._alone(self.papers("decode"), self.tokens, "decode")
            self._fill("layers' signals while decoding", self._texts, signals)

    def _alone(
        self, policies: Sequence[str], tokens: Sequence[int], phase: Phase = "prompt"
    ) -> list[Treatment]:
        return [
            self._one(layer, LayerRoute(policy, n), phase)
            for layer in range(self.losses.n_layers)
            for policy, n in product(policies, tokens)
        ]

    def _one(self, layer: int, its: LayerRoute, phase: Phase) -> Treatment:
        alone = self.losses.alone(layer, its)
        return alone if phase == "prompt" else DecodePhase(alone)

    def routes(self) -> tuple[list[Route], list[BudgetReport]]:
        """Those wanted at every budget, and what `polykv-best` was chosen from."""
        if OURS in self.wanted:
            self.measure()
        else:
            self.measure_signals()
        found, reports = [], []
        for tokens in self.tokens:
            found += [self._papers(name, tokens) for name in self.wanted if name != OURS]
            if OURS in self.wanted:
                best, report = self.best(tokens)
                found.append(best)
                reports.append(report)
        return found, reports

    def _papers(self, name: str, tokens: int) -> Route:
        variant = self.variant if name == PAPERS else Variant(*VARIANTS[name])  # type: ignore[arg-type]
        found = replace(self.polykv(tokens, variant), policy=name)
        if self.decode:
            found = replace(found, decode=self.polykv(tokens, variant, phase="decode").layers)
        return found

    # PolyKV, Algorithm 1

    def polykv(
        self, tokens: int, variant: Variant, inverse: bool = False, phase: Phase = "prompt"
    ) -> Route:
        """The paper's route by the signals of a phase.

        inverse: the control, the worst policy by the same signal.
        """
        highest = (variant.preference == "cosine") != inverse
        policies = preferred(self.preferences(tokens, variant.preference, phase), highest)
        needs = self.sensitivities(tokens, variant.sharing, phase)
        shares = budgets(tokens, needs, self._least(tokens))
        note = f"Algorithm 1, {variant}" + ", inverse" * inverse
        return route("polykv", policies, shares, note)

    def preferences(
        self, tokens: int, preference: Preference, phase: Phase = "prompt"
    ) -> list[dict[str, float]]:
        """g of every layer and candidate, each alone at this budget, on the making half's text."""
        signal = self._cosine if preference == "cosine" else self._sensitivity
        return [
            {
                policy: signal(self._texts, self._one(layer, LayerRoute(policy, tokens), phase))
                for policy in self.papers(phase)
            }
            for layer in range(self.losses.n_layers)
        ]

    def sensitivities(self, tokens: int, sharing: Sharing, phase: Phase = "prompt") -> list[float]:
        """m of every layer; the entropy is of the prompt's attention in either phase."""
        if sharing == "uniform":
            return [1.0] * self.losses.n_layers
        if sharing == "entropy":
            return list(self.losses.entropies())
        return [worst_case(layer) for layer in self.preferences(tokens, "perplexity", phase)]

    def _cosine(self, texts: Sequence[Document], treatment: Treatment) -> float:
        cosines = [self._loss(text, treatment).cosine for text in texts]
        return sum(c for c in cosines if c is not None) / len(cosines)

    def _sensitivity(self, texts: Sequence[Document], treatment: Treatment) -> float:
        full, evicted = (
            [(loss.nll, loss.targets) for loss in (self._loss(text, each) for text in texts)]
            for each in (self.losses.full, treatment)
        )
        return perplexity_sensitivity(full, evicted)

    # Controls

    def uniform(self, tokens: int) -> Route:
        """The candidate that loses least on the making half when all layers have it, equal shares.

        The control that has one policy; `BudgetReport.single` is a whole policy, whose layers may
        share as its paper has it.
        """
        n = self.losses.n_layers
        everywhere = {policy: ([policy] * n, [tokens] * n) for policy in self.policies}
        self._try(f"{tokens}tok: one policy", self.making, everywhere.values())
        best = min(everywhere, key=lambda p: self.loss(self.making, _layers(everywhere[p])))
        return route("polykv-best", *everywhere[best], "one policy")

    # Ours

    def best(self, tokens: int) -> tuple[Route, BudgetReport]:
        """The arrangement with the least loss on the choosing half, of the best on the making one.

        Tried are equal shares under each candidate, all variants of Algorithm 1, and the allocator
        on marginal losses, over all candidates and over each alone; the best goes on by coordinate
        descent.
        """
        tried = dict(self._arrangements(tokens))
        self._try(f"{tokens}tok: routes", self.making, tried.values())
        ranked = sorted(tried, key=lambda name: self.loss(self.making, _layers(tried[name])))
        tried["descent"] = self._descend(tokens, tried[ranked[0]])
        finalists = ["descent", *ranked[:FINALISTS]]
        self._try(f"{tokens}tok: choosing", self.choosing, [tried[name] for name in finalists])
        chosen = min(finalists, key=lambda name: self.loss(self.choosing, _layers(tried[name])))
        report = self._report(tokens, tried, finalists)
        return route("polykv-best", *tried[chosen], f"marginal losses, {chosen}"), report

    def loss(self, documents: Sequence[Document], treatment: Treatment) -> float:
        """Mean and worst group, added: what the allocator is after."""
        groups = self.groups(documents, treatment)
        return sum(groups.values()) / len(groups) + max(groups.values())

    def groups(self, documents: Sequence[Document], treatment: Treatment) -> dict[str, float]:
        """Group -> increase of the NLL per scored token over the full cache."""
        more: dict[str, float] = {}
        targets: dict[str, int] = {}
        for document in documents:
            loss, full = self._loss(document, treatment), self._loss(document, self.losses.full)
            more[document.group] = more.get(document.group, 0.0) + loss.nll - full.nll
            targets[document.group] = targets.get(document.group, 0) + loss.targets
        return {group: more[group] / targets[group] for group in more}

    def curves(self, aggregate: str) -> list[dict[tuple[str, int], float]]:
        """Every layer's marginal losses by candidate and tokens; the whole context loses nothing.

        aggregate: `mean` or `worst` over groups.
        """
        found = []
        for of_layer in self._groups_alone:
            curve = {
                point: max(groups) if aggregate == "worst" else sum(groups) / len(groups)
                for point, groups in of_layer.items()
            }
            curve[hull(curve)[-1].policy, self.losses.calibration.context] = 0.0
            found.append(curve)
        return found

    @cached_property
    def _groups_alone(self) -> list[dict[tuple[str, int], list[float]]]:
        """Every group's loss with one layer evicted, the same for all budgets; after `measure`."""
        return [
            {
                (policy, tokens): list(self.groups(self.making, treatment).values())
                for policy, tokens in product(self.policies, self.grid)
                for treatment in [self.losses.alone(layer, LayerRoute(policy, tokens))]
            }
            for layer in range(self.losses.n_layers)
        ]

    def _arrangements(self, tokens: int) -> Iterator[tuple[str, Arrangement]]:
        n = self.losses.n_layers
        for policy in self.policies:
            yield f"{policy} everywhere", ([policy] * n, [tokens] * n)
        for preference, sharing in product(get_args(Preference), get_args(Sharing)):
            made = self.polykv(tokens, Variant(preference, sharing))
            yield made.note, _arrangement(made)
        for aggregate in ("mean", "worst"):
            curves = self.curves(aggregate)
            yield f"allocator, {aggregate}", marginal(tokens, curves)
            for policy in self.policies:
                alone = [_only(policy, curve) for curve in curves]
                yield f"allocator, {aggregate}, {policy}", marginal(tokens, alone)

    def _descend(self, tokens: int, start: Arrangement) -> Arrangement:
        """Each layer in turn takes what lowers the loss on the making half most, if anything does.

        Until a sweep changes nothing.
        """
        current, least = start, self._least(tokens)
        for sweep in range(1, self.sweeps + 1):
            before = current
            for layer in range(self.losses.n_layers):
                near = neighbours(*current, layer, self.policies, least)
                label = f"{tokens}tok: sweep {sweep} of {self.sweeps}, layer {layer}"
                self._try(label, self.making, near)
                current = min(
                    [current, *near], key=lambda each: self.loss(self.making, _layers(each))
                )
            if current == before:
                break
        return current

    def _report(
        self, tokens: int, tried: Mapping[str, Arrangement], finalists: Sequence[str]
    ) -> BudgetReport:
        whole = {policy: LayerRoute(policy, tokens) for policy in self.singles}
        self._fill(f"{tokens}tok: single policies", self._documents, list(whole.values()))
        singles = {policy: self.loss(self._documents, its) for policy, its in whole.items()}
        candidates = tuple(
            Candidate(
                name,
                key_of(_layers(each)),
                self.loss(self.making, _layers(each)),
                self.loss(self.choosing, _layers(each)) if name in finalists else None,
            )
            for name, each in tried.items()
        )
        return BudgetReport(tokens, min(singles, key=lambda p: singles[p]), singles, candidates)

    # What both stand on

    def _least(self, tokens: int) -> int:
        return least_tokens(tokens, self.floor)

    def _loss(self, document: Document, treatment: Treatment) -> Loss:
        return self.losses.ledger.of(document)[key_of(treatment)]

    def _try(self, label: str, documents: Sequence[Document], tried: Iterable[Arrangement]) -> None:
        self._fill(label, documents, [_layers(each) for each in tried])

    def _fill(
        self, label: str, documents: Sequence[Document], treatments: Sequence[Treatment]
    ) -> None:
        with self.stage(label) as advance:
            self.losses.measure(documents, treatments, advance)


def check_routed(name: str) -> None:
    """`UnknownName` for what is no policy that follows routes."""
    known = [policy for policy, row in POLICIES.items() if row.routed]
    if name not in known:
        raise UnknownName("routed policy", name, known)


def check_decode(wanted: Sequence[str], paper: Sequence[str]) -> None:
    """`BadInput` where a decode phase was asked for and Algorithm 1 can make none.

    wanted: whose routes; paper: its candidates.
    """
    if all(name == OURS for name in wanted):
        raise BadInput(
            f"only {PAPERS}'s routes get a decode phase by signals of its own, and the wanted ones "
            f"are {list(wanted)}"
        )
    if not _evicting_in_decode(paper):
        raise BadInput(
            f"none of {list(paper)} evicts while tokens are generated; these do: "
            f"{_evicting_in_decode(EVICTIONS)}"
        )


def _evicting_in_decode(policies: Iterable[str]) -> list[str]:
    return [policy for policy in policies if policy in decode_policies()]


def _layers(arrangement: Arrangement) -> tuple[LayerRoute, ...]:
    return tuple(LayerRoute(*pair) for pair in zip(*arrangement, strict=True))


def _arrangement(found: Route) -> Arrangement:
    return [la.policy for la in found.layers], [la.tokens or 0 for la in found.layers]


def _only(policy: str, curve: Curve) -> Curve:
    """The curve of one policy, and its end."""
    last = max(tokens for _, tokens in curve)
    return {key: loss for key, loss in curve.items() if key[0] == policy} | {(policy, last): 0.0}
