"""What is fitted once per deployment on calibration prompts: the key conditioning of each layer.

A candidate is judged by what INT4 keys do to the attention distribution of real queries,
KL(16 bits || INT4) in nats, not by the logits: softmax ignores an error that all keys share, and
nobody sees the error of a key that no query attends to. Whatever the values are, a KL of d moves
an attention output by at most sqrt(d / 2) times their spread (Pinsker's inequality).

Scales and offsets come from every other prompt, errors from the prompts between them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch

from kvprism.codec.condition import condition, restore
from kvprism.codec.reference import nested_codes, nested_scale, quantisable
from kvprism.core import MENUS
from kvprism.errors import BadInput, MissingSignal, ShapeMismatch
from kvprism.score import SINKS, attention_logits
from kvprism.tensors import KeyConditioning, LayerKV, LayerView

NONE = "none"
# SmoothQuant's alpha. 1, the key's magnitude alone, is what a scale needs when every pair is at its
# largest in the same token; they never are, and it was the worse choice in most layers tried.
SMOOTHING = (0.5, 0.75)
# What a remedy must gain: so much of the mean KL, and so many standard errors of the paired gain.
MARGIN, STANDARD_ERRORS = 0.05, 2.0
# A pair that never moved counts as this small a part of its head's largest.
NEGLIGIBLE = 2.0**-16


@dataclass(frozen=True, eq=False)
class Fit:
    """What was chosen for one layer, and what it was chosen from.

    conditioning: None where nothing beats plain keys clearly; name: the chosen candidate; errors:
    candidate -> mean KL in nats over held-out query positions and heads when keys are at INT4;
    int8_errors: the same at INT8, of `none` and of the chosen one.
    """

    conditioning: KeyConditioning | None
    name: str
    errors: Mapping[str, float]
    int8_errors: Mapping[str, float]


def fit_conditioning(
    keys: Sequence[torch.Tensor],
    queries: Sequence[torch.Tensor],
    positions: Sequence[torch.Tensor],
    softmax_scale: float,
    inverse_frequencies: torch.Tensor,
    softcap: float | None = None,
) -> Fit:
    """The key conditioning of one layer, or none; one entry of each sequence per prompt.

    keys: post-RoPE `[head, token, channel]`; queries: post-RoPE `[q_head, window, channel]` of the
    last positions; positions: int64 `[token]`; inverse_frequencies: float32 `[channel // 2]`.

    Candidates are an offset (the channel's mean before RoPE), a scale per pair of channels and a
    Hadamard rotation, each with and without the others. A scale is the power of two nearest to
    max(key)^a / rms(query)^(1 - a), a in `SMOOTHING` (SmoothQuant, arXiv 2211.10438, equation 4;
    magnitudes of pairs, keys after the offset): an error in a pair counts as much as its query
    does. All keys but the sinks, which stay native, are quantised. The lowest mean KL wins among
    the candidates that lower that of `none` by more than `MARGIN` and whose gain in sqrt(KL), which
    no single position can carry, is more than `STANDARD_ERRORS` of its standard error. Without one,
    keys stay as they are.

    Raises:
        BadInput: fewer than 2 prompts, a prompt with no key but sinks, or keys that cannot be
            quantised (not finite, or beyond the range of a scale).
        ShapeMismatch: tensors that do not go together, within a prompt or between prompts.
    """
    if not len(keys) == len(queries) == len(positions):
        raise ShapeMismatch(
            f"expected keys, queries and positions of the same prompts, got {len(keys)}, "
            f"{len(queries)} and {len(positions)}"
        )
    views = [
        LayerView(LayerKV(0, {"k": k}, at), q, softmax_scale, softcap)
        for k, q, at in zip(keys, queries, positions, strict=True)
    ]
    return _fit(views, inverse_frequencies)


def calibrate_conditioning(
    captures: Sequence[Sequence[LayerView]], inverse_frequencies: torch.Tensor
) -> Iterator[Fit]:
    """`fit_conditioning` for every layer in turn; one capture, a view per layer, per prompt.

    Raises:
        BadInput, ShapeMismatch: see `fit_conditioning`; captures of unequal numbers of layers.
        MissingSignal: a capture without queries.
    """
    _check_number(captures)
    if len(layers := {len(views) for views in captures}) > 1:
        raise ShapeMismatch(
            f"captures of one model have one number of layers, got {sorted(layers)}"
        )
    return (_fit(views, inverse_frequencies) for views in zip(*captures, strict=True))


def _fit(views: Sequence[LayerView], inverse_frequencies: torch.Tensor) -> Fit:
    _check_number(views)
    views = [_checked(view) for view in views]
    _check_alike(views)
    candidates = _candidates(views[0::2], inverse_frequencies.cpu())
    held_out = [_HeldOut(view, _log_attention(view, _keys(view))) for view in views[1::2]]
    found = {name: _errors(held_out, each, 4) for name, each in candidates.items()}
    better = [name for name in found if _clearly_better(found[name], found[NONE])]
    name = min(better, key=lambda each: float(found[each].mean()), default=NONE)
    return Fit(
        candidates[name],
        name,
        {each: float(error.mean()) for each, error in found.items()},
        {each: float(_errors(held_out, candidates[each], 8).mean()) for each in (NONE, name)},
    )


def _clearly_better(error: torch.Tensor, none: torch.Tensor) -> bool:
    """Errors of the same query positions. False when there are too few, or one is not a number."""
    gain = none.sqrt() - error.sqrt()
    noise = STANDARD_ERRORS * gain.std(correction=1) / len(gain) ** 0.5 if len(gain) > 1 else None
    lower = bool(error.mean() < (1 - MARGIN) * none.mean())
    return lower and noise is not None and bool(gain.mean() > noise)


# Candidates


def _candidates(
    views: Sequence[LayerView], inverse_frequencies: torch.Tensor
) -> dict[str, KeyConditioning | None]:
    heads, _, channels = _keys(views[0]).shape
    zero, one = torch.zeros(heads, channels), torch.ones(heads, channels // 2)
    neutral = KeyConditioning(zero, one, inverse_frequencies)
    keys = torch.cat([_before_rope(view, neutral) for view in views], dim=1)
    queries = torch.cat([_queries(view).reshape(heads, -1, channels) for view in views], dim=1)
    turns = [False] if channels & (channels - 1) else [False, True]
    made: dict[str, KeyConditioning | None] = {NONE: None}
    for rotate, centred, alpha in product(turns, [False, True], [None, *SMOOTHING]):
        offset = keys.mean(dim=1) if centred else zero
        scale = one if alpha is None else _scale(keys - offset[:, None], queries, alpha)
        if name := _name(centred, alpha, rotate):
            made[name] = KeyConditioning(offset, scale, inverse_frequencies, rotate)
    return made


def _name(centred: bool, alpha: float | None, rotate: bool) -> str:
    parts = ["offset"] if centred else []
    parts += [] if alpha is None else [f"scale({alpha})"]
    return "+".join(parts + ["hadamard"] * rotate)


def _before_rope(view: LayerView, neutral: KeyConditioning) -> torch.Tensor:
    """The keys that will be quantised, `[head, token, channel]`, as they were before RoPE."""
    quantised = view.kv.positions >= SINKS
    return condition(_keys(view)[:, quantised], view.kv.positions[quantised], neutral)


def _scale(keys: torch.Tensor, queries: torch.Tensor, alpha: float) -> torch.Tensor:
    """`[head, channel // 2]`: powers of two, so that dividing rounds nothing; their median is 1."""
    key = _exponents(_pairs(keys).amax(dim=1))
    query = _exponents(_pairs(queries).square().mean(dim=1).sqrt())
    exponents = alpha * key - (1 - alpha) * query
    return torch.exp2((exponents - exponents.median(dim=-1, keepdim=True).values).round())


def _pairs(x: torch.Tensor) -> torch.Tensor:
    """The magnitude of the pairs that RoPE turns, `[..., channel // 2]`; RoPE leaves it alone."""
    first, second = x.chunk(2, dim=-1)
    return torch.hypot(first, second)


def _exponents(magnitudes: torch.Tensor) -> torch.Tensor:
    least = magnitudes.amax(dim=-1, keepdim=True) * NEGLIGIBLE
    return magnitudes.maximum(least).clamp_min(torch.finfo(torch.float32).tiny).log2()


# Errors


@dataclass(frozen=True, eq=False)
class _HeldOut:
    """A prompt that no statistic came from, and its attention at 16 bits (`_log_attention`)."""

    view: LayerView
    expected: torch.Tensor


def _errors(
    held_out: Sequence[_HeldOut], conditioning: KeyConditioning | None, bits: int
) -> torch.Tensor:
    """KL of every held-out query position and head, float64, flat."""
    return torch.cat([_divergence(each, conditioning, bits).flatten() for each in held_out])


def _divergence(
    held_out: _HeldOut, conditioning: KeyConditioning | None, bits: int
) -> torch.Tensor:
    expected, view = held_out.expected, held_out.view
    got = _log_attention(view, _sent(view, conditioning, bits))
    return (expected.exp() * (expected - got)).sum(dim=-1).clamp_min(0)


def _sent(view: LayerView, conditioning: KeyConditioning | None, bits: int) -> torch.Tensor:
    """What the decode side holds: the keys after quantisation, in the cache's own dtype."""
    keys, positions = _keys(view), view.kv.positions
    if conditioning is None:
        decoded = _nested(keys.float(), bits)
    else:
        decoded = _nested(condition(keys, positions, conditioning), bits)
        decoded = restore(decoded, positions, conditioning)
    native = (positions < SINKS)[:, None]
    return torch.where(native, keys, decoded.to(keys.dtype))


def _nested(x: torch.Tensor, bits: int) -> torch.Tensor:
    """float32 `[head, token, channel]` through `kvp.nested/1` (codec/reference.py)."""
    rows = x.flatten(0, 1)
    scale = nested_scale(rows.abs().amax(dim=-1))
    codes = nested_codes(rows, scale)
    values = ((codes + 8) >> 4) * 16 - 0.5 if bits == 4 else codes.float()
    return (values * scale.float()[:, None]).view_as(x)


def _log_attention(view: LayerView, keys: torch.Tensor) -> torch.Tensor:
    """Causal log-probabilities of the window's queries, float64 `[q_head, window, token]`."""
    return attention_logits(view, keys.double()).log_softmax(dim=-1).flatten(0, 1)


# Prompts


def _keys(view: LayerView) -> torch.Tensor:
    return view.kv.components["k"]


def _queries(view: LayerView) -> torch.Tensor:
    assert view.queries is not None, "see _checked"
    return view.queries.float()


def _checked(view: LayerView) -> LayerView:
    """A view with queries and keys that can be quantised, its tensors on the CPU."""
    layer = f"layer {view.kv.layer_id}"
    if view.queries is None:
        raise MissingSignal(f"{layer}: key conditioning needs queries; capture with window >= 1")
    keys, positions = _keys(view).cpu(), view.kv.positions.cpu()
    if not bool((positions >= SINKS).any()):
        raise BadInput(f"{layer}: expected a prompt with more than {SINKS} tokens to calibrate on")
    if not quantisable(keys, MENUS["nested"]).all():
        raise BadInput(
            f"{layer}: calibration keys have values that are not finite or too large to quantise"
        )
    kv = LayerKV(view.kv.layer_id, {"k": keys}, positions)
    return LayerView(kv, view.queries.cpu(), view.softmax_scale, view.softcap)


def _check_number(prompts: Sequence[object]) -> None:
    if len(prompts) < 2:
        raise BadInput(
            f"expected at least 2 calibration prompts, one to fit on and one to choose by, got "
            f"{len(prompts)}"
        )


def _check_alike(views: Sequence[LayerView]) -> None:
    shapes = {(len(_queries(v)), len(_keys(v)), _keys(v).shape[2]) for v in views}
    if len(shapes) > 1:
        raise ShapeMismatch(
            f"layer {views[0].kv.layer_id}: prompts of one model have one (query heads, heads, "
            f"channels), got {sorted(shapes)}"
        )
