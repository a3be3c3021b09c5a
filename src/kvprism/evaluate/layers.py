"""What eviction does to a model, layer by layer: losses on calibration documents, kept as measured.

A calibration document is a window of a text, or a generated task of a kind. Its cache is captured
once; then layers are evicted, one alone or all by a route, and the same continuation is scored.
Documents alternate between two halves: routes are made on the one and chosen on the other.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch

from kvprism.core import HOLDS, MENU
from kvprism.errors import BadInput
from kvprism.evaluate.arms import sent
from kvprism.evaluate.measure import Case, LoadedModel, check_fits, score
from kvprism.evaluate.perplexity import Perplexity
from kvprism.evaluate.records import Header, header_of, require_same
from kvprism.evaluate.rows import provenance, replace_file
from kvprism.evaluate.ruler import DEPTHS, Ruler, RulerId
from kvprism.evaluate.tasks import KINDS
from kvprism.integrations.hf import capture, restore
from kvprism.layer_signals import attention_entropy, cosine
from kvprism.planning import plan
from kvprism.plans import Plan
from kvprism.policies import signals_of
from kvprism.retention import FULL_KV, Decode, needs_mass, retentions
from kvprism.routes import FULL, LayerRoute, ranges_of
from kvprism.routing import routed_layer, units_of
from kvprism.state import with_mass
from kvprism.tensors import LayerKV, LayerView, RequestKV, Signal

TEXT = "text"
# No evaluation's tasks are drawn from this seed: users' seeds start at 0.
CALIBRATION_SEED = 2**63
# Captured documents, and their layers as routes evict them, that are kept for the next routes.
KEPT_NBYTES = 2**30
# Losses of one line of the records: what a run that is stopped has to measure again, at most.
LINE = 32
# Task n of a kind is at depth 3 n mod 11 of 10: each half of them is spread over all depths.
_DEPTH_STEP = 3


@dataclass(frozen=True)
class DecodePhase:
    """Everything is sent, and the layers evict after every token that is fed."""

    layers: tuple[LayerRoute, ...]


# A route's layers, of the prompt or while tokens are generated; or a whole policy, layers shared as
# its own paper has it.
Treatment = tuple[LayerRoute, ...] | DecodePhase | LayerRoute
Advance = Callable[[int, int], None]
Stage = Callable[[str], AbstractContextManager[Advance]]


class Loss(msgspec.Struct, frozen=True):
    """What eviction did to one document.

    nll: summed over `targets` scored tokens, in nats; right: answers right of `answers`; cosine: of
    the evicted layer's output with the full run's, where one layer alone was evicted in a text.
    """

    nll: float
    targets: int
    right: int
    answers: int
    cosine: float | None = None


class Measured(msgspec.Struct, frozen=True):
    """A line of the records: one document's losses by route, or the layers' attention entropies."""

    document: str
    losses: dict[str, Loss] = {}
    entropies: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Document:
    """group: `text` or a kind of task; number: in its group; chooses: of the half that chooses."""

    group: str
    number: int

    @property
    def name(self) -> str:
        return f"{self.group}-{self.number}"

    @property
    def chooses(self) -> bool:
        return self.number % 2 == 1


@contextmanager
def silently(_: str) -> Iterator[Advance]:
    """A stage without progress."""
    yield lambda done, total: None


@dataclass(frozen=True, eq=False)
class CalibrationSet:
    """`documents` windows of a text and `trials` tasks of every kind, all with `context` tokens.

    Task instances come from a seed of their own, so that no evaluation asks the same.

    Raises:
        BadInput: fewer than 2 of each, an unreadable or too short text, or a context that the model
            has no positions for.
    """

    subject: LoadedModel
    text: Path
    context: int = 2048
    continuation: int = 128
    n_documents: int = 8
    trials: int = 4
    kinds: Sequence[str] = tuple(KINDS)
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.n_documents, self.trials) < 2:
            raise BadInput(
                "calibration needs at least 2 documents and 2 tasks of a kind, to make routes on "
                f"one half and choose by the other; got {self.n_documents} and {self.trials}"
            )
        for document in self.documents:
            if document.number == 0:
                check_fits(self.subject.model, self.case(document))

    @cached_property
    def documents(self) -> tuple[Document, ...]:
        counts = {TEXT: self.n_documents, **dict.fromkeys(self.kinds, self.trials)}
        return tuple(Document(group, n) for group, count in counts.items() for n in range(count))

    @cached_property
    def _windows(self) -> Perplexity:
        sizes = (self.context, self.continuation, self.n_documents)
        return Perplexity(self.subject, self.text, (), *sizes, seed=self.seed)

    @cached_property
    def _tasks(self) -> Ruler:
        seed = CALIBRATION_SEED + self.seed
        return Ruler(self.subject, (), (self.context,), tuple(self.kinds), seed=seed)

    def case(self, document: Document) -> Case:
        """The document's context and what is scored after it."""
        if document.group == TEXT:
            return self._windows.case(document.number)
        turn, place = divmod(document.number, DEPTHS)
        number = turn * DEPTHS + place * _DEPTH_STEP % DEPTHS
        return self._tasks.case(RulerId(self.context, document.group, number)).case

    @cached_property
    def header(self) -> Header:
        configuration = {
            "text": self._windows.header.configuration["text"],
            "context": self.context,
            "continuation": self.continuation,
            "documents": self.n_documents,
            "trials": self.trials,
            "kinds": self.kinds,
            "fingerprint": self.subject.fingerprint,
        }
        made_by = provenance(self.subject.model)
        return header_of("calibrate", self.subject.name, self.seed, configuration, made_by)


class Ledger:
    """Losses by document and route, appended to a file as they are measured.

    Raises:
        BadInput: the file is something else, or of another configuration or version.
    """

    def __init__(self, header: Header, path: Path | None) -> None:
        self._path = path
        self.losses: dict[str, dict[str, Loss]] = {}
        self.entropies: tuple[float, ...] | None = None
        lines = [] if path is None or not path.exists() else _stored(path, header)
        for measured in lines:
            self._take(measured)
        if path is not None:
            encoded = [msgspec.json.encode(item) for item in (header, *lines)]
            replace_file(path, b"\n".join([*encoded, b""]))

    def of(self, document: Document) -> dict[str, Loss]:
        """Route -> loss, of what was measured."""
        return self.losses.get(document.name, {})

    def add(self, measured: Measured) -> None:
        """Take a line, and append it."""
        self._take(measured)
        if self._path is not None:
            with self._path.open("ab") as file:
                file.write(msgspec.json.encode(measured) + b"\n")

    def _take(self, measured: Measured) -> None:
        self.losses.setdefault(measured.document, {}).update(measured.losses)
        self.entropies = measured.entropies or self.entropies


def _stored(path: Path, header: Header) -> list[Measured]:
    try:
        first, *lines = path.read_bytes().split(b"\n")
        stored = msgspec.json.decode(first, type=Header)
        # What follows the last line end is empty, or a line that was being written.
        measured = [msgspec.json.decode(line, type=Measured) for line in lines[:-1]]
    except (OSError, msgspec.DecodeError) as error:
        raise BadInput(f"{path} is not a file of calibration records: {error}") from error
    require_same(path, stored, header)
    return measured


class _Scored(NamedTuple):
    """One pass over a continuation; hidden: the layers' outputs `[token, channel]`, if asked."""

    logits: torch.Tensor
    hidden: tuple[torch.Tensor, ...]


@dataclass(eq=False)
class _Captured:
    """A document's cache and views, and what was made of them so far."""

    case: Case
    kv: RequestKV
    view: tuple[LayerView, ...]
    full: _Scored | None = None
    _evicted: dict[tuple[int, LayerRoute], LayerKV] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """The memory that the caches take."""
        evicted = RequestKV(tuple(self._evicted.values()), self.kv.next_position)
        return self.kv.resident_nbytes + evicted.resident_nbytes

    def layer(self, number: int, its: LayerRoute) -> LayerKV:
        """A layer as the decode side would hold it: evicted, through the wire and back."""
        if its.policy == FULL:
            return self.kv.layers[number]
        return self._evicted.get((number, its)) or self._evict(number, its)

    def _evict(self, number: int, its: LayerRoute) -> LayerKV:
        layer = self.kv.layers[number]
        problem = routed_layer(its, layer.shape(), self.view[number], HOLDS)
        kept = Plan((problem.plan(units_of(problem, its)),), MENU, policy=its.policy)
        return sent(RequestKV((layer,), self.kv.next_position), kept, None).layers[0]

    def holding(self, what: Treatment) -> RequestKV:
        """The cache as the decode side would hold it before the first token is fed."""
        if isinstance(what, DecodePhase):
            counted = [needs_mass(its.policy) for its in what.layers]
            return with_mass(self.kv, self.view, counted)[0]
        if isinstance(what, LayerRoute):
            budget = f"{what.tokens}tok"
            return sent(self.kv, plan(self.view, what.policy, budget, capability=HOLDS), None)
        layers = tuple(self.layer(i, its) for i, its in enumerate(what))
        if _evicted_alone(what) is None:  # routes have layers in common, single layers come once
            pairs = zip(enumerate(what), layers, strict=True)
            self._evicted |= {key: layer for key, layer in pairs if key[1].policy != FULL}
        return RequestKV(layers, self.kv.next_position)


@dataclass(eq=False)
class LayerLosses:
    """Measures what is missing in a ledger; policies: all that will be asked for."""

    calibration: CalibrationSet
    ledger: Ledger
    policies: Sequence[str]
    _kept: dict[str, _Captured] = field(default_factory=dict)

    @property
    def n_layers(self) -> int:
        layers: int = self.calibration.subject.model.config.num_hidden_layers
        return layers

    @property
    def full(self) -> tuple[LayerRoute, ...]:
        return (LayerRoute(FULL),) * self.n_layers

    def alone(self, layer: int, its: LayerRoute) -> tuple[LayerRoute, ...]:
        """One layer evicted, the others full."""
        return (*self.full[:layer], its, *self.full[layer + 1 :])

    def measure(
        self,
        documents: Sequence[Document],
        treatments: Sequence[Treatment],
        advance: Advance = lambda done, total: None,
    ) -> None:
        """Fill the ledger; calls `advance` with (documents done, all)."""
        wanted: dict[str, Treatment] = {key_of(treatment): treatment for treatment in treatments}
        wanted |= {key_of(self.full): self.full}
        for done, document in enumerate(documents, 1):
            have = self.ledger.of(document)
            missing = [pair for pair in wanted.items() if pair[0] not in have]
            if missing:
                captured = self._captured(document)
                for start in range(0, len(missing), LINE):
                    line = missing[start : start + LINE]
                    losses = {key: self._loss(document, captured, each) for key, each in line}
                    self.ledger.add(Measured(document.name, losses))
                self._keep(document, captured)
            advance(done, len(documents))

    def entropies(self) -> tuple[float, ...]:
        """PolyKV's entropy signal of every layer, over the texts that routes are made on."""
        if self.ledger.entropies is None:
            texts = [d for d in self.calibration.documents if d.group == TEXT and not d.chooses]
            masses: list[list[torch.Tensor]] = [[] for _ in range(self.n_layers)]
            for document in texts:
                _, view = self._capture(self.calibration.case(document), frozenset({"mass"}))
                for of_layer, seen in zip(masses, view, strict=True):
                    assert seen.mass is not None
                    of_layer.append(seen.mass.cpu())
            found = tuple(attention_entropy(of_layer) for of_layer in masses)
            self.ledger.add(Measured(TEXT, entropies=found))
        assert self.ledger.entropies is not None
        return self.ledger.entropies

    def _captured(self, document: Document) -> _Captured:
        if document.name in self._kept:
            return self._kept[document.name]
        case = self.calibration.case(document)
        return _Captured(case, *self._capture(case, signals_of(self.policies)))

    def _keep(self, document: Document, captured: _Captured) -> None:
        self._kept[document.name] = captured
        if sum(each.nbytes for each in self._kept.values()) > KEPT_NBYTES:
            del self._kept[document.name]

    def _capture(
        self, case: Case, signals: frozenset[Signal]
    ) -> tuple[RequestKV, tuple[LayerView, ...]]:
        model = self.calibration.subject.model
        return capture(model, case.context, cache_dtype=torch.bfloat16, signals=signals)

    def _loss(self, document: Document, captured: _Captured, treatment: Treatment) -> Loss:
        evicted = _evicted_alone(treatment)
        compared = document.group == TEXT and evicted is not None
        if compared and (captured.full is None or not captured.full.hidden):
            captured.full = self._continue(captured, self.full, hidden=True)
        scored = self._continue(captured, treatment, hidden=compared)
        case = captured.case
        answers = [score(scored.logits, case.continuation, answer) for answer in case.answers]
        return Loss(
            nll=sum(nll for nll, _ in answers),
            targets=sum(answer.stop - answer.start for answer in case.answers),
            right=sum(right for _, right in answers),
            answers=len(answers),
            cosine=_cosine(captured.full, scored, evicted) if compared else None,
        )

    def _continue(self, captured: _Captured, treatment: Treatment, hidden: bool) -> _Scored:
        model, fed = self.calibration.subject.model, captured.case.fed
        decode: Decode = FULL_KV
        calls = fed[None]
        if isinstance(treatment, DecodePhase):
            decode = retentions(treatment.layers)
            calls = fed[:, None]
        cache = restore(model, captured.holding(treatment), decode)
        scored = [_call(model, cache, tokens, hidden) for tokens in calls]
        logits = torch.cat([each.logits for each in scored])
        if not bool(logits.isfinite().all()):
            raise BadInput(f"the model's logits are not finite under {key_of(treatment)}")
        by_layer = zip(*(each.hidden for each in scored), strict=True)
        return _Scored(logits, tuple(torch.cat(parts) for parts in by_layer))


def _call(model: Any, cache: Any, tokens: torch.Tensor, hidden: bool) -> _Scored:
    asked: dict[str, Any] = {"output_hidden_states": True} if hidden else {}
    with torch.no_grad():
        out = model(tokens[None].to(model.device), **cache.kwargs, use_cache=True, **asked)
    return _Scored(out.logits[0], tuple(x[0] for x in out.hidden_states[1:]) if hidden else ())


def key_of(treatment: Treatment) -> str:
    """As records name it: `0-2: full, 3: tova@256`, or `cake@256` for a whole policy.

    Of a decode phase `decode: ` and the layers.
    """
    if isinstance(treatment, LayerRoute):
        return str(treatment)
    if isinstance(treatment, DecodePhase):
        return f"decode: {key_of(treatment.layers)}"
    return ranges_of([str(layer) for layer in treatment])


def _evicted_alone(treatment: Treatment) -> int | None:
    """The layer that is not full, if it is the only one."""
    if isinstance(treatment, LayerRoute):
        return None
    if isinstance(treatment, DecodePhase):
        return _evicted_alone(treatment.layers)
    evicted = [i for i, layer in enumerate(treatment) if layer.policy != FULL]
    return evicted[0] if len(evicted) == 1 else None


def _cosine(full: _Scored | None, scored: _Scored, layer: int | None) -> float:
    assert full is not None and layer is not None
    return cosine(full.hidden[layer], scored.hidden[layer])
