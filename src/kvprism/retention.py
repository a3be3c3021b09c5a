"""The decode phase: what a layer keeps while tokens are generated on it.

The rows of `evictions.py` again, applied after every call to what a layer holds then: the same
scorers see the same `LayerView`, with the queries of the calls instead of the prompt's.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kvprism.core import ComponentShape, LayerShape
from kvprism.errors import BadInput, ProfileMismatch, UnknownName, Unsupported
from kvprism.evict import LayerProblem
from kvprism.evictions import EVICTIONS, Eviction
from kvprism.routes import FULL, LayerRoute, Route, ranges_of
from kvprism.solve import DROP_INDEX
from kvprism.tensors import DTYPE_NAMES, LayerKV, LayerView


@dataclass(frozen=True)
class Retention:
    """One layer's decode phase: at most `tokens` of each head after every call, by `policy`.

    policy: a row of `evictions.py`, or `full`, which keeps everything and has no number. A row's
    split between layers has no say here: each layer has its own number. Where a row has budgets of
    its heads' own (Ada-KV), `tokens` is their mean.

    Raises:
        UnknownName: no such policy.
        Unsupported: a policy that does not know what to do without a prefill's signals.
        BadInput: no number, or less than what the policy protects.
    """

    policy: str = FULL
    tokens: int | None = None

    def __post_init__(self) -> None:
        if self.policy != FULL and self.policy not in EVICTIONS:
            raise UnknownName("decode-phase policy", self.policy, decode_policies())
        if (self.policy == FULL) != (self.tokens is None):
            needs = "takes no" if self.policy == FULL else "needs a"
            raise BadInput(
                f"decode-phase policy {self.policy!r} {needs} budget such as 256tok, got "
                f"{self.tokens}"
            )
        if self.policy not in decode_policies():
            raise Unsupported(
                f"policy {self.policy!r} does not evict while tokens are generated: it needs more "
                f"than the calls show; choose one of {decode_policies()}"
            )
        least = 0 if self.row is None else self.row.sinks + self.row.recent
        if self.tokens is not None and self.tokens < max(1, least):
            raise BadInput(
                f"decode-phase policy {self.policy!r} protects {least} tokens of every layer, so "
                f"its budget must be at least that, got {self.tokens}"
            )

    def __str__(self) -> str:
        return self.policy if self.tokens is None else f"{self.policy}@{self.tokens}tok"

    @classmethod
    def parse(cls, policy: str, budget: str | None) -> "Retention":
        """From a policy's name and `256tok`; bytes are no budget here, as nothing is sent.

        Raises:
            UnknownName, Unsupported, BadInput: as the class; another unit.
        """
        return cls(policy, None if budget is None else parse_tokens(budget))

    @property
    def row(self) -> Eviction | None:
        """None for `full`."""
        return None if self.policy == FULL else EVICTIONS[self.policy]

    @property
    def needs_mass(self) -> bool:
        """Whether the policy goes on with the attention that tokens got from all queries so far."""
        return needs_mass(self.policy)


def parse_tokens(budget: str) -> int:
    """`256tok`, or 256; `BadInput` for what is no number of tokens per layer."""
    match = re.fullmatch(r"\s*([0-9]+)\s*(tok)?\s*", budget)
    if match is None:
        raise BadInput(f"a decode-phase budget is tokens per layer, such as 256tok: {budget!r}")
    return int(match[1])


# One for all layers, or one for each.
Decode = Retention | tuple[Retention, ...]


def per_layer(decode: Decode, n_layers: int) -> tuple[Retention, ...]:
    """One for each of `n_layers`; `BadInput` when there are others."""
    retentions = (decode,) * n_layers if isinstance(decode, Retention) else decode
    if len(retentions) != n_layers:
        raise BadInput(
            f"a decode phase needs one retention, or one for each of {n_layers} layers, got "
            f"{len(retentions)}"
        )
    return retentions


def phase_of(routes: Sequence[Route], policy: str, tokens: int) -> tuple[Retention, ...]:
    """The decode phase of the route for a policy and its own budget, one for each layer.

    A route that names none for that phase has there what it has for the prompt.

    Raises:
        ProfileMismatch: no route for this policy.
        BadInput: none for this budget, or fewer tokens than a layer's policy protects.
        UnknownName, Unsupported: a layer's policy does not exist, or does not evict then.
    """
    own = {route.tokens: route for route in routes if route.policy == policy}
    if not own:
        raise ProfileMismatch(
            f"decode-phase policy {policy!r} follows a route, and there is none for it; make a "
            "profile with kvprism calibrate and give it"
        )
    if tokens not in own:
        made = ", ".join(f"{each}tok" for each in sorted(own))
        raise BadInput(
            f"decode-phase policy {policy!r} at {tokens}tok: the profile's routes are for {made}, "
            "and each is followed at its own budget"
        )
    return retentions(own[tokens].decode or own[tokens].layers)


def retentions(layers: Iterable[LayerRoute]) -> tuple[Retention, ...]:
    """A route's layers as a decode phase; errors as the class."""
    return tuple(Retention(layer.policy, layer.tokens) for layer in layers)


def label_of(decode: Decode) -> str:
    """As records name it.

    Example:
        >>> label_of(Retention("h2o", 256))
        'h2o@256tok'
        >>> label_of((FULL_KV, FULL_KV, Retention("tova", 64)))
        '0-1: full, 2: tova@64tok'
    """
    if isinstance(decode, Retention):
        return str(decode)
    return ranges_of([str(its) for its in decode])


def decode_policies() -> list[str]:
    """The names that `Retention` takes."""
    rows = [name for name, row in EVICTIONS.items() if row.signals <= {"mass"} and not row.once]
    return [FULL, *rows]


def needs_mass(policy: str) -> bool:
    """Whether a decode phase by this policy goes on with the prompt's mass; errors as the class."""
    if policy not in decode_policies():
        raise UnknownName("decode-phase policy", policy, decode_policies())
    return policy != FULL and "mass" in EVICTIONS[policy].signals


FULL_KV = Retention()


def retained(retention: Retention, view: LayerView) -> tuple[LayerKV, torch.Tensor] | None:
    """The layer after one call, and which rows `[head, token]` of the old one it kept.

    Tokens that no head keeps are gone; rows of the others are padding (`LayerKV.held`), zeros. Kept
    rows are rewritten where the policy merges. None: everything is kept.
    """
    row, held = retention.row, _held(view.kv)
    if row is None or retention.tokens is None or held.sum(dim=1).max() <= retention.tokens:
        return None
    problem = _problem(row, view, held)
    each = 1 if problem.heads == "shared" else len(held)
    n = (retention.tokens - int(problem.protected.sum())) * each
    planned = problem.plan(max(0, min(n, problem.n_units)))
    kv = view.kv if row.rewrite is None else row.rewrite(view, planned)
    kept = torch.from_numpy(planned.tier_of["k"] != DROP_INDEX).to(held.device) & held
    present = kept.any(dim=0)
    own = kept[:, present]
    rows = {name: (x * kept[..., None])[:, present] for name, x in kv.components.items()}
    ragged = None if own.all() else own
    return LayerKV(kv.layer_id, rows, kv.positions[present], ragged), kept


def _held(kv: LayerKV) -> torch.Tensor:
    heads, tokens = kv.components["k"].shape[:2]
    everything = torch.ones(heads, tokens, dtype=torch.bool, device=kv.positions.device)
    return everything if kv.held is None else kv.held


def _problem(row: Eviction, view: LayerView, held: torch.Tensor) -> LayerProblem:
    """The tokens that are held, as if they were a prompt of their own; true positions count."""
    kv = view.kv
    parts = tuple(ComponentShape(n, x.shape[0], x.shape[2]) for n, x in kv.components.items())
    shape = LayerShape(kv.layer_id, parts, (0, len(kv.positions)), DTYPE_NAMES[kv.dtype])
    scores = row.scorer(view).double()
    if row.heads != "shared":
        scores = scores.masked_fill(~held, torch.finfo(scores.dtype).min)
    positions = kv.positions.cpu().numpy()
    protected = (positions < row.sinks) | (np.arange(len(positions)) >= len(positions) - row.recent)
    return LayerProblem(shape, scores.cpu().numpy(), protected, row.heads)
