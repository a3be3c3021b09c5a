"""One captured context, several arms: what each restored cache does to the same continuation."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import torch

from kvprism.errors import BadInput, BudgetTooSmall
from kvprism.evaluate.arms import RAW, Arm, through_the_wire
from kvprism.integrations.hf import capture, fingerprint, load, restore
from kvprism.plans import Plan
from kvprism.policies import signals_of
from kvprism.tensors import DTYPES, LayerView, RequestKV, Signal

# Rows of float64 logits held at once: 64 rows of a 150k vocabulary are 77 MB.
CHUNK = 64


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model, its tokenizer, and the name that rows call it by."""

    name: str
    model: Any
    tokenizer: Any

    @classmethod
    def load(cls, name: str) -> "LoadedModel":
        """A built-in model or a local checkpoint, in float32: arithmetic is not measured."""
        model, tokenizer = load(name, torch.float32)
        return cls(name, model, tokenizer)

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.model, self.tokenizer).hex()


@dataclass(frozen=True, eq=False)
class Case:
    """A context to capture, what follows it, and which parts of that are answers to be predicted.

    context, continuation: int64 `[token]`; answers: slices of the continuation, in order and apart,
    the last one up to its end. The first token of a continuation follows from nothing that is fed,
    so no answer starts with it.
    """

    context: torch.Tensor
    continuation: torch.Tensor
    answers: tuple[slice, ...]

    @property
    def fed(self) -> torch.Tensor:
        """The continuation but for its last token, which nothing follows."""
        return self.continuation[:-1]

    @property
    def question(self) -> torch.Tensor:
        """What stands before the first answer."""
        return self.continuation[: self.answers[0].start]


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What one arm did to one case.

    nll: summed over the answers' `targets` tokens, in nats; right: of how many of the `answers`
    every token was the most likely one; kl: KL(raw || arm) of every fed position, in nats; flips:
    fed positions whose most likely token is another than raw's.
    """

    wire_bytes: int
    reference_bytes: int
    native_bytes: int
    resident_bytes: int
    nll: float
    targets: int
    answers: int
    right: int
    kl: tuple[float, ...]
    flips: int

    @property
    def exact(self) -> bool:
        """Greedy decoding gives every answer."""
        return self.right == self.answers


def measure(
    model: Any,
    case: Case,
    arms: Sequence[Arm],
    cache_dtype: str = "bfloat16",
    query_aware: bool = False,
) -> Iterator[tuple[Arm, Outcome | BudgetTooSmall]]:
    """Capture once; for each arm send the cache through the wire, restore it, and feed the case.

    The first arm must be raw: the others are compared with its logits. An arm whose budget is too
    small yields that error instead of an outcome. query_aware: plan by the attention that the
    case's question pays to the context, instead of by that of the context's own last positions;
    what is sent is the context's cache in both cases.

    Raises:
        BadInput: an unknown cache dtype, a case longer than the model's positions, or logits that
            are not finite.
    """
    assert arms[0].policy == RAW, arms
    check_fits(model, case)
    if cache_dtype not in DTYPES:
        raise BadInput(f"cache dtype {cache_dtype!r} is not in {list(DTYPES)}")
    signals = frozenset[Signal]().union(*(signals_of([arm.policy], arm.profile) for arm in arms))
    kv, view = capture(model, case.context, cache_dtype=DTYPES[cache_dtype], signals=signals)
    if query_aware:
        view = asked_about(model, case, view)
    raw: torch.Tensor | None = None
    for arm in arms:
        try:
            restored, plan = through_the_wire(kv, view, arm)
        except BudgetTooSmall as error:
            yield arm, error
            continue
        logits = continue_on(model, restored, case.fed)
        _require_finite(logits, arm)
        raw = logits if raw is None else raw
        yield arm, _outcome(plan, restored, case, raw, logits)


def _outcome(
    plan: Plan, restored: RequestKV, case: Case, raw: torch.Tensor, logits: torch.Tensor
) -> Outcome:
    kl, flips = divergence(raw, logits)
    scored = [score(logits, case.continuation, answer) for answer in case.answers]
    return Outcome(
        wire_bytes=plan.nbytes,
        reference_bytes=plan.shape.reference_nbytes,
        native_bytes=plan.shape.native_nbytes,
        resident_bytes=restored.resident_nbytes,
        nll=sum(nll for nll, _ in scored),
        targets=sum(answer.stop - answer.start for answer in case.answers),
        answers=len(scored),
        right=sum(right for _, right in scored),
        kl=kl,
        flips=flips,
    )


def check_fits(model: Any, case: Case) -> None:
    """Refuse a case that is longer than the model has positions for (`BadInput`)."""
    needed, given = len(case.context) + len(case.fed), model.config.max_position_embeddings
    if needed > given:
        raise BadInput(
            f"{len(case.context)} context tokens and {len(case.fed)} after them need {needed} "
            f"positions, the model has {given}"
        )


def asked_about(model: Any, case: Case, view: Sequence[LayerView]) -> tuple[LayerView, ...]:
    """The context's own view, with the queries of the question that follows it."""
    _, asked = capture(model, torch.cat([case.context, case.question]), window=len(case.question))
    # Every position of the question sees the whole context. A scorer takes a window's queries for
    # the context's last and masks what comes after each of them; a window of one has nothing after
    # it, so that the positions go along as further query heads, those of one KV head together.
    seen = []
    for layer, after in zip(view, asked, strict=True):
        assert after.queries is not None
        seen.append(replace(layer, queries=after.queries.flatten(0, 1)[:, None]))
    return tuple(seen)


def continue_on(model: Any, kv: RequestKV, fed: torch.Tensor) -> torch.Tensor:
    """Logits `[token, vocabulary]` of `fed`, in one call on the restored cache."""
    with torch.no_grad():
        out = model(fed[None].to(model.device), **restore(model, kv).kwargs, use_cache=True)
    logits: torch.Tensor = out.logits[0]
    return logits


def divergence(raw: torch.Tensor, arm: torch.Tensor) -> tuple[tuple[float, ...], int]:
    """KL(raw || arm) of every position, and at how many the most likely token differs.

    In float64: at INT8 a KL is near 1e-5 and float32 log-probabilities are off by 1e-6 each.
    """
    flips = int((raw.argmax(dim=-1) != arm.argmax(dim=-1)).sum())
    if raw is arm:
        return (0.0,) * len(raw), flips
    kl = [_kl(p, q) for p, q in zip(torch.split(raw, CHUNK), torch.split(arm, CHUNK), strict=True)]
    # Six digits: records stay readable, and no statistic here resolves more.
    return tuple(float(f"{value:.6g}") for value in torch.cat(kl).tolist()), flips


def _kl(raw: torch.Tensor, arm: torch.Tensor) -> torch.Tensor:
    p, q = raw.double().log_softmax(dim=-1), arm.double().log_softmax(dim=-1)
    return (p.exp() * (p - q)).sum(dim=-1).clamp_min(0)


def score(logits: torch.Tensor, continuation: torch.Tensor, answer: slice) -> tuple[float, bool]:
    """NLL of an answer, and whether all of it was most likely; position i foretells i + 1."""
    logits = logits[answer.start - 1 : answer.stop - 1]
    targets = continuation[answer].to(logits.device)
    nll = 0.0
    for chunk, expected in zip(
        torch.split(logits, CHUNK), torch.split(targets, CHUNK), strict=True
    ):
        nll -= float(chunk.double().log_softmax(dim=-1).gather(1, expected[:, None]).sum())
    return nll, bool((logits.argmax(dim=-1) == targets).all())


def _require_finite(logits: torch.Tensor, arm: Arm) -> None:
    if not math.isfinite(float(logits.sum())) and not bool(logits.isfinite().all()):
        raise BadInput(
            f"policy {arm.policy!r} at budget {arm.budget}: the model's logits are not finite; are "
            "they on this text without kvprism?"
        )
