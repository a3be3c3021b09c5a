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
from kvprism.retention import FULL_KV, Decode
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
    def load(cls, name: str, dtype: str = "float32", device: str = "cpu") -> "LoadedModel":
        """A built-in model or a local checkpoint, in float32: arithmetic is not measured.

        Raises:
            BadInput: an unknown dtype, or a device that is not there; and as `load`.
        """
        loaded, tokenizer = load(name, known_dtype("dtype", dtype))
        model: Any = loaded
        try:
            return cls(name, model.to(device), tokenizer)
        except (RuntimeError, AssertionError) as error:  # the latter without CUDA in torch
            raise BadInput(f"device {device!r}: {str(error).partition(chr(10))[0]}") from error

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


class Outcome(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one arm did to one case.

    nll: summed over the answers' `targets` tokens, in nats; right: of how many of the `answers`
    every token was the most likely one; kl: KL(raw || arm) of every fed position, in nats; flips:
    fed positions whose most likely token is another than raw's; resident_bytes: what the restored
    cache takes, or, where layers evict while they decode, what they hold at the end. Where an
    answer was generated, text is that answer, and score the task's own, in [0, 1].
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
    text: str = ""
    score: float | None = None

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
    kv, view = capture_for(model, case.context, arms, cache_dtype)
    if query_aware:
        view = asked_about(model, case, view)
    raw: torch.Tensor | None = None
    for arm in arms:
        try:
            restored, plan = through_the_wire(kv, view, arm)
        except BudgetTooSmall as error:
            yield arm, error
            continue
        logits, resident = feed(model, restored, case.fed, arm.decode)
        require_finite(logits, arm)
        raw = logits if raw is None else raw
        yield arm, outcome_of(plan, resident, case, raw, logits)


def capture_for(
    model: Any, context: torch.Tensor, arms: Sequence[Arm], cache_dtype: str
) -> tuple[RequestKV, tuple[LayerView, ...]]:
    """A context's cache, and what the arms need of it; errors as `capture`."""
    dtype = known_dtype("cache dtype", cache_dtype)
    signals = frozenset[Signal]().union(*(signals_of([arm.policy], arm.profile) for arm in arms))
    if any(any(arm.masses(model.config.num_hidden_layers)) for arm in arms):
        signals |= {"mass"}
    return capture(model, context, cache_dtype=dtype, signals=signals)


def known_dtype(what: str, name: str) -> torch.dtype:
    """A dtype by name; `BadInput` for one that no cache can have."""
    if name not in DTYPES:
        raise BadInput(f"{what} {name!r} is not in {list(DTYPES)}")
    return DTYPES[name]


def outcome_of(
    plan: Plan, resident: int, case: Case, raw: torch.Tensor, logits: torch.Tensor
) -> Outcome:
    """An arm's plan, its cache, and its logits and raw's `[token, vocabulary]` of `case.fed`."""
    kl, flips = divergence(raw, logits)
    scored = [score(logits, case.continuation, answer) for answer in case.answers]
    return Outcome(
        wire_bytes=plan.nbytes,
        reference_bytes=plan.shape.reference_nbytes,
        native_bytes=plan.shape.native_nbytes,
        resident_bytes=resident,
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


def continue_on(model: Any, kv: RequestKV, fed: torch.Tensor, last: int = 0) -> torch.Tensor:
    """Logits `[token, vocabulary]` of the `last` tokens of `fed` (0: of all), in one call."""
    return _logits(model, restore(model, kv), fed, last)


def _logits(model: Any, cache: Any, fed: torch.Tensor, last: int) -> torch.Tensor:
    with torch.no_grad():
        out = model(fed[None].to(model.device), **cache.kwargs, use_cache=True, logits_to_keep=last)
    logits: torch.Tensor = out.logits[0]
    return logits


def feed(
    model: Any, kv: RequestKV, fed: torch.Tensor, decode: Decode | None, last: int = 0
) -> tuple[torch.Tensor, int]:
    """Logits as `continue_on`, and the bytes that the cache holds; with a decode phase, at the end.

    With a decode phase one token a call. Bytes are counted in the cache's own dtype, padding of
    heads and state of the policy included.
    """
    if decode is None:
        return continue_on(model, kv, fed, last), kv.resident_nbytes
    cache = restore(model, kv, decode)
    steps = [_logits(model, cache, token, 1) for token in torch.split(fed, 1)]
    return torch.cat(steps[-last:]), cache.held_values * kv.layers[0].dtype.itemsize


def generate_on(
    model: Any,
    kv: RequestKV,
    fed: torch.Tensor,
    n: int,
    stops: Sequence[int],
    decode: Decode | None = None,
    fewest: int = 0,
) -> torch.Tensor:
    """Greedy tokens after `fed`: `n`, or up to the first of `stops`, which is the last of them.

    decode: what the layers keep meanwhile; fewest: how many tokens come before a stop is allowed.
    """
    cache = restore(model, kv, decode or FULL_KV)
    *before, fed = [fed] if decode is None else torch.split(fed, 1)
    for token in before:
        _logits(model, cache, token, 1)
    made: list[int] = []
    while len(made) < n and not (made and made[-1] in stops):
        logits = _logits(model, cache, fed, 1)[-1]
        if len(made) < fewest:
            logits[list(stops)] = -math.inf
        made.append(int(logits.argmax()))
        fed = torch.tensor(made[-1:])
    return torch.tensor(made)


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


def require_finite(logits: torch.Tensor, arm: Arm) -> None:
    """`BadInput` where an arm's logits are not."""
    if not math.isfinite(float(logits.sum())) and not bool(logits.isfinite().all()):
        raise BadInput(
            f"policy {arm.policy!r} at budget {arm.budget}: the model's logits are not finite; are "
            "they on this text without kvprism?"
        )
