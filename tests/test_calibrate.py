"""The fit finds what is wrong with a layer's keys without being told, and never makes them worse.

Mechanisms are planted in keys and queries that the built-in model made of generated text.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from kvprism.calibrate import Fit, calibrate_conditioning, fit_conditioning
from kvprism.codec.condition import condition, restore
from kvprism.codec.reference import nested_codes, nested_scale
from kvprism.errors import BadInput, MissingSignal, ShapeMismatch
from kvprism.evaluate.haystack import generated_ids
from kvprism.evaluate.measure import continue_on, divergence
from kvprism.integrations import hf
from kvprism.score import SINKS
from kvprism.tensors import KeyConditioning, LayerKV, LayerView, RequestKV

Captures = list[tuple[LayerView, ...]]
Change = Callable[[LayerView, torch.Tensor], LayerView]

PROMPTS, TOKENS, WINDOW = 4, 384, 96


@pytest.fixture(scope="module")
def prompts(tiny: Any) -> torch.Tensor:
    """`[prompt, token]`, one prompt more than the fit sees."""
    _, tokenizer = tiny
    ids = generated_ids(tokenizer, (PROMPTS + 1) * TOKENS, np.random.default_rng(0))
    return torch.from_numpy(ids[: (PROMPTS + 1) * TOKENS]).view(PROMPTS + 1, TOKENS)


@pytest.fixture(scope="module")
def captures(tiny: Any, prompts: torch.Tensor) -> Captures:
    return [hf.capture(tiny[0], ids, window=WINDOW)[1] for ids in prompts[:PROMPTS]]


@pytest.fixture(scope="module")
def frequencies(tiny: Any) -> torch.Tensor:
    return hf.rope_frequencies(tiny[0])


@pytest.fixture(scope="module")
def untouched(captures: Captures, frequencies: torch.Tensor) -> list[Fit]:
    return list(calibrate_conditioning(captures, frequencies))


def planted(captures: Captures, change: Change, frequencies: torch.Tensor) -> list[Fit]:
    """The fit of every layer once `change` has been done to every view."""
    changed = [tuple(change(view, frequencies) for view in views) for views in captures]
    return list(calibrate_conditioning(changed, frequencies))


def total(fits: Sequence[Fit], name: str) -> float:
    return sum(fit.errors[name] for fit in fits)


def with_tensors(view: LayerView, keys: torch.Tensor, queries: torch.Tensor) -> LayerView:
    return replace(
        view, kv=LayerKV(view.kv.layer_id, {"k": keys}, view.kv.positions), queries=queries
    )


# What is planted


def heavy_pairs(captures: Captures) -> dict[int, list[int]]:
    """Of each layer, per KV head, the pair that has the largest keys for its queries."""
    found = {}
    for layer_id, views in enumerate(zip(*captures, strict=True)):
        keys = torch.cat([view.kv.components["k"] for view in views], dim=1)
        heads, _, channels = keys.shape
        queries = torch.cat([view.queries.reshape(heads, -1, channels) for view in views], dim=1)
        size = keys.view(heads, -1, 2, channels // 2).norm(dim=2).amax(dim=1)
        asked = queries.view(heads, -1, 2, channels // 2).square().mean(dim=(1, 2)).sqrt()
        found[layer_id] = (size / asked).argmax(dim=-1).tolist()
    return found


def enlarge(pairs: dict[int, list[int]], factor: float) -> Change:
    """A pair of each KV head times `factor`, of its queries by it: the same logits, bit for bit."""

    def change(view: LayerView, _: torch.Tensor) -> LayerView:
        keys, queries = view.kv.components["k"].clone(), view.queries.clone()
        heads, half = keys.shape[0], keys.shape[2] // 2
        grouped = queries.view(heads, -1, *queries.shape[1:])
        for head, pair in enumerate(pairs[view.kv.layer_id]):
            keys[head, :, [pair, pair + half]] *= factor
            grouped[head, ..., [pair, pair + half]] /= factor
        return with_tensors(view, keys, queries)

    return change


def shift(constant: float) -> Change:
    """A constant on one channel of the slowest pair before RoPE, as a bias of the projection."""

    def change(view: LayerView, frequencies: torch.Tensor) -> LayerView:
        keys, last = view.kv.components["k"].clone(), len(frequencies) - 1
        angles = view.kv.positions.double() * frequencies[last].double()
        keys[..., last] += constant * angles.cos().float()
        keys[..., 2 * last + 1] += constant * angles.sin().float()
        return with_tensors(view, keys, view.queries)

    return change


# What must be found


def test_a_huge_pair_is_found_and_scaled_as_if_it_had_never_been_huge(
    captures: Captures, frequencies: torch.Tensor, untouched: list[Fit]
) -> None:
    fits = planted(captures, enlarge(heavy_pairs(captures), 32.0), frequencies)
    for fit, before in zip(fits, untouched, strict=True):
        assert "scale" in fit.name and fit.conditioning is not None
        # A pair above the median stays above it, and then the scaled keys are the same numbers.
        assert math.isclose(fit.errors["scale(0.5)"], before.errors["scale(0.5)"], rel_tol=1e-9)
        assert fit.errors[fit.name] <= fit.errors["scale(0.5)"] < fit.errors["none"] / 10
        assert fit.int8_errors[fit.name] < fit.int8_errors["none"]
    assert total(fits, "hadamard") > 2 * total(fits, "scale(0.5)")
    assert total(fits, "offset") > 2 * total(fits, "scale(0.5)")


@pytest.mark.parametrize("constant", [100.0, 300.0])
def test_a_constant_before_rope_is_found_and_subtracted(
    captures: Captures, frequencies: torch.Tensor, untouched: list[Fit], constant: float
) -> None:
    fits = planted(captures, shift(constant), frequencies)
    for fit, before in zip(fits, untouched, strict=True):
        assert "offset" in fit.name and fit.conditioning is not None
        # Both channels of the slowest pair, after the mean of the keys that were there before.
        found = fit.conditioning.offset[:, len(frequencies) - 1]
        assert torch.allclose(found, torch.full_like(found, constant), atol=0.2 * constant)
        assert fit.errors["none"] > 10 * before.errors["none"]
        assert fit.errors[fit.name] < before.errors["none"]
    # Sums near `constant` are rounded to 2^-17 of it, a ten-thousandth of an INT4 step: few codes.
    assert math.isclose(total(fits, "offset"), total(untouched, "offset"), rel_tol=0.05)
    for alone in ("hadamard", "scale(0.5)", "scale(0.75)"):
        assert total(fits, alone) > 2 * total(fits, "offset")


def test_both_at_once_need_both(captures: Captures, frequencies: torch.Tensor) -> None:
    pairs = heavy_pairs(captures)
    both = [
        tuple(enlarge(pairs, 32.0)(shift(100.0)(v, frequencies), frequencies) for v in views)
        for views in captures
    ]
    for fit in calibrate_conditioning(both, frequencies):
        assert fit.errors[fit.name] < fit.errors["none"] / 10
        assert "scale" in fit.name and "offset" in fit.name


def test_the_untouched_model_continues_no_worse(
    tiny: Any, prompts: torch.Tensor, untouched: list[Fit]
) -> None:
    model, (context, after) = tiny[0], prompts[PROMPTS].split([TOKENS - 128, 128])
    kv, _ = hf.capture(model, context)
    raw = continue_on(model, kv, after)
    plain = continue_on(model, at_int4(kv, [None] * len(kv.layers)), after)
    fitted = continue_on(model, at_int4(kv, [fit.conditioning for fit in untouched]), after)
    assert sum(divergence(raw, fitted)[0]) <= sum(divergence(raw, plain)[0])


def at_int4(kv: RequestKV, conditionings: Sequence[KeyConditioning | None]) -> RequestKV:
    """The same cache with every key but the sinks at INT4."""
    layers = []
    for layer, given in zip(kv.layers, conditionings, strict=True):
        keys, positions = layer.components["k"], layer.positions
        if given is None:
            decoded = int4(keys)
        else:
            decoded = restore(int4(condition(keys, positions, given)), positions, given)
        decoded[:, :SINKS] = keys[:, :SINKS]
        layers.append(
            LayerKV(layer.layer_id, {"k": decoded, "v": layer.components["v"]}, positions)
        )
    return RequestKV(tuple(layers), kv.next_position)


def int4(x: torch.Tensor) -> torch.Tensor:
    rows = x.flatten(0, 1)
    scale = nested_scale(rows.abs().amax(dim=-1))
    high = torch.div(nested_codes(rows, scale) + 8, 16, rounding_mode="floor")
    return ((16 * high - 0.5) * scale.float()[:, None]).view_as(x)


# What must not be found


def random_layer(
    seed: int, n_prompts: int = 4, channels: int = 16, tokens: int = 80, window: int = 12
) -> dict[str, Any]:
    """Normal keys and queries, which nothing can condition, as arguments of the fit."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "keys": [normal(2, tokens, channels) for _ in range(n_prompts)],
        "queries": [normal(4, window, channels) for _ in range(n_prompts)],
        "positions": [torch.arange(tokens) for _ in range(n_prompts)],
        "softmax_scale": channels**-0.5,
        "inverse_frequencies": 10000.0 ** (-torch.arange(channels // 2) * 2 / channels),
    }


@pytest.mark.parametrize("seed", range(5))
def test_keys_that_nothing_can_improve_stay_as_they_are(seed: int) -> None:
    fit = fit_conditioning(**random_layer(seed))
    assert (fit.name, fit.conditioning) == ("none", None)
    assert set(fit.int8_errors) == {"none"}
    assert len(fit.errors) == 12 and fit.int8_errors["none"] < fit.errors["none"]


def test_what_only_the_prompts_of_the_statistics_show_is_not_believed() -> None:
    layer = random_layer(0)
    zero, one = torch.full((2, 16), 3.0), torch.ones(2, 8)
    offset = KeyConditioning(zero, one, layer["inverse_frequencies"])
    for prompt in (0, 2):
        before_rope = condition(layer["keys"][prompt], layer["positions"][prompt], offset)
        neutral = replace(offset, offset=6 * offset.offset)
        layer["keys"][prompt] = restore(before_rope, layer["positions"][prompt], neutral)
    fit = fit_conditioning(**layer)
    assert fit.errors["offset"] > 2 * fit.errors["none"]
    assert "offset" not in fit.name


def test_a_certain_but_small_gain_is_not_worth_it() -> None:
    layer = random_layer(0, n_prompts=8, channels=12, tokens=200, window=100)
    shared = KeyConditioning(
        torch.full((2, 12), 0.1), torch.ones(2, 6), layer["inverse_frequencies"]
    )
    at = layer["positions"][0]
    layer["keys"] = [restore(keys, at, shared) for keys in layer["keys"]]
    fit = fit_conditioning(**layer)
    assert 0.95 < fit.errors["offset"] / fit.errors["none"] < 1 and fit.name == "none"


def test_without_a_power_of_two_there_is_no_rotation() -> None:
    fit = fit_conditioning(**random_layer(0, channels=12))
    assert len(fit.errors) == 6 and not any("hadamard" in name for name in fit.errors)


# What an error is


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_an_error_is_the_mean_divergence_of_held_out_attention(softcap: float | None) -> None:
    layer = random_layer(1)
    fit = fit_conditioning(**layer, softcap=softcap)
    for tier, found in ((4, fit.errors["none"]), (8, fit.int8_errors["none"])):
        slow = [
            slow_divergence(layer["keys"][p], layer["queries"][p], tier, softcap) for p in (1, 3)
        ]
        # Logits in float32 are off by 2^-22 of some 5; at INT8 a divergence is near 1e-5.
        assert math.isclose(found, float(np.mean(slow)), rel_tol=1e-3)


def slow_divergence(
    keys: torch.Tensor, queries: torch.Tensor, bits: int, softcap: float | None
) -> float:
    """Loops over query heads and window positions, in float64."""
    channels, window = keys.shape[2], queries.shape[1]
    sent = keys.clone()
    for head in range(len(keys)):
        for token in range(SINKS, keys.shape[1]):
            scale = float(nested_scale(keys[head, token].abs().max()))
            codes = torch.round(keys[head, token] * (1 / torch.tensor(scale)))
            sent[head, token] = scale * (
                codes if bits == 8 else 16 * torch.floor((codes + 8) / 16) - 0.5
            )
    found = []
    for q_head, asked in enumerate(queries.double()):
        for i in range(window):
            seen = keys.shape[1] - window + i + 1
            logits = [
                k[q_head // 2, :seen].double() @ asked[i] / channels**0.5 for k in (keys, sent)
            ]
            if softcap is not None:
                logits = [softcap * torch.tanh(x / softcap) for x in logits]
            p, q = (x.softmax(dim=0) for x in logits)
            found.append(float((p * (p / q).log()).sum()))
    return float(np.mean(found))


def test_a_cache_in_16_bits_is_fitted_as_it_comes_back() -> None:
    layer = random_layer(2)
    layer["keys"] = [x.bfloat16() for x in layer["keys"]]
    half = fit_conditioning(**layer)
    layer["keys"] = [x.float() for x in layer["keys"]]
    whole = fit_conditioning(**layer)
    # bfloat16 rounds to 2^-9 where INT8 rounds to 2^-8 of the largest: it shows.
    assert half.int8_errors["none"] > 1.02 * whole.int8_errors["none"]


# Refusals


def test_one_prompt_cannot_both_fit_and_choose() -> None:
    with pytest.raises(BadInput, match=r"at least 2 calibration prompts.*got 1"):
        fit_conditioning(**random_layer(0, n_prompts=1))
    with pytest.raises(BadInput, match="got 0"):
        calibrate_conditioning([], torch.ones(8))


@pytest.mark.parametrize(
    ("field", "change", "error", "says"),
    [
        ("queries", lambda x: x[:3], ShapeMismatch, "got 4, 3 and 4"),
        ("queries", lambda x: [q[:3] for q in x], ShapeMismatch, "multiple of 2 heads"),
        ("queries", lambda x: [*x[:3], x[3][:2]], ShapeMismatch, r"\(2, 2, 16\), \(4, 2, 16\)"),
        ("keys", lambda x: [k[..., :8] for k in x], ShapeMismatch, "8 channels"),
        ("positions", lambda x: [p[1:] for p in x], ShapeMismatch, "79, channel"),
        ("positions", lambda x: [p.float() for p in x], ShapeMismatch, "int64"),
        ("inverse_frequencies", lambda x: x[1:], ShapeMismatch, r"inverse_frequencies.*\[8\]"),
        ("keys", lambda x: [*x[:3], x[3] * math.inf], BadInput, "not finite"),
    ],
)
def test_tensors_that_do_not_go_together_are_refused(
    field: str, change: Callable[[Any], Any], error: type[Exception], says: str
) -> None:
    layer = random_layer(0)
    with pytest.raises(error, match=says):
        fit_conditioning(**(layer | {field: change(layer[field])}))


def test_prompts_of_sinks_alone_are_refused() -> None:
    layer = random_layer(0, tokens=SINKS, window=2)
    with pytest.raises(BadInput, match="more than 4 tokens"):
        fit_conditioning(**layer)


def test_captures_must_be_alike_and_have_queries(
    captures: Captures, frequencies: torch.Tensor
) -> None:
    with pytest.raises(ShapeMismatch, match=r"number of layers.*\[3, 4\]"):
        calibrate_conditioning([captures[0], captures[1][:3]], frequencies)
    blind = [tuple(replace(view, queries=None) for view in views) for views in captures]
    with pytest.raises(MissingSignal, match=r"layer 0.*window"):
        next(calibrate_conditioning(blind, frequencies))
