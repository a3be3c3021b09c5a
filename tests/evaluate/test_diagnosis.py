"""Attention errors against the model's own attention, outlier channels, and the rule."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from kvprism.evaluate.diagnosis import (
    ATTENTION_LIMIT,
    OUTLIER_RATIO,
    Errors,
    errors_of,
    outliers_of,
    setting_of,
)
from kvprism.tensors import LayerKV, LayerView


def layer_view(softcap: float | None = None) -> LayerView:
    """Two KV heads of two query heads each, and queries of the last five of twenty tokens."""
    k, v = torch.randn(2, 20, 8), torch.randn(2, 20, 8)
    kv = LayerKV(0, {"k": k, "v": v}, torch.arange(20))
    return LayerView(kv, torch.randn(4, 5, 8), softmax_scale=0.3, softcap=softcap)


def with_components(kv: LayerKV, **changed: torch.Tensor) -> LayerKV:
    return replace(kv, components={**kv.components, **changed})


def test_the_output_error_is_that_of_the_models_own_attention() -> None:
    view = layer_view()
    assert view.queries is not None
    k, v = view.kv.components["k"], view.kv.components["v"]
    noisy = k + 0.5 * torch.randn_like(k)
    mask = torch.ones(5, 20, dtype=torch.bool).tril(15)
    outputs = [
        F.scaled_dot_product_attention(
            view.queries,
            keys.repeat_interleave(2, 0),
            v.repeat_interleave(2, 0),
            attn_mask=mask,
            scale=0.3,
        )
        for keys in (k, noisy)
    ]
    errors = errors_of(view, with_components(view.kv, k=noisy))
    expected = float((outputs[1] - outputs[0]).norm() / outputs[0].norm())
    assert errors.output == pytest.approx(expected, rel=1e-4)
    assert errors.values == 0 < errors.kl


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_what_softmax_ignores_is_no_attention_error(softcap: float | None) -> None:
    """An error that all keys share moves every logit alike; a soft cap makes it visible."""
    view = layer_view(softcap)
    shared = view.kv.components["k"] + torch.randn(8)
    errors = errors_of(view, with_components(view.kv, k=shared))
    assert errors.keys > 0.5
    assert (errors.output < 1e-5) == (softcap is None)
    assert (errors.kl < 1e-5) == (softcap is None)


def test_values_alone_move_the_output_and_not_the_attention() -> None:
    view = layer_view()
    errors = errors_of(view, with_components(view.kv, v=1.25 * view.kv.components["v"]))
    assert (errors.keys, errors.kl) == (0, 0)
    assert errors.values == pytest.approx(0.25) and errors.output == pytest.approx(0.25)


def test_outliers_are_named_largest_first() -> None:
    keys = torch.ones(2, 10, 8)
    keys[0, :, 5], keys[1, :, 2], keys[1, :, 7] = 20.0, -50.0, OUTLIER_RATIO
    found = outliers_of(LayerKV(4, {"k": keys, "v": keys}, torch.arange(10)))
    assert [(o.layer, o.head, o.channel, o.ratio) for o in found] == [(4, 1, 2, 50), (4, 0, 5, 20)]


def test_dead_channels_do_not_make_infinite_ratios() -> None:
    keys = torch.zeros(1, 10, 8)
    keys[0, :, 1] = 1.0
    [outlier] = outliers_of(LayerKV(0, {"k": keys, "v": keys}, torch.arange(10)))
    assert outlier.ratio == 2**16


@pytest.mark.parametrize(
    ("plain", "conditioned", "expected"),
    [
        (ATTENTION_LIMIT, None, "plain"),
        (0.31, ATTENTION_LIMIT, "conditioned"),
        (0.31, 0.31, "no-int4"),
        (0.31, None, "no-int4"),
        (0.1, 0.05, "plain"),
    ],
)
def test_a_layer_takes_the_mildest_setting_within_the_limit(
    plain: float, conditioned: float | None, expected: str
) -> None:
    remedy = None if conditioned is None else Errors(0.1, 0.1, conditioned, 0.1)
    assert setting_of(Errors(0.1, 0.1, plain, 0.1), remedy) == expected
