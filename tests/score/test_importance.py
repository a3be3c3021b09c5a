"""Scorers against slow transcriptions of their formulas."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from strategies import cache, view_of

from kvprism.errors import BadInput, MissingSignal, UnknownName
from kvprism.score import DECAY, SCORERS, norm, position, ranking, window_attention
from kvprism.tensors import LayerKV, LayerView

EPSILON = 2.0**-23


def slow_attention(view: LayerView) -> np.ndarray:
    """Loops over KV heads, query heads of the group, window positions and visible keys."""
    assert view.queries is not None
    keys = view.kv.components["k"].double().numpy()
    queries = view.queries.double().numpy()
    heads, tokens, _ = keys.shape
    group, window = queries.shape[0] // heads, queries.shape[1]
    score = np.zeros((heads, tokens))
    for q_head in range(queries.shape[0]):
        for w in range(window):
            visible = tokens - window + w + 1
            logits = [
                view.softmax_scale * float(np.dot(queries[q_head, w], keys[q_head // group, j]))
                for j in range(visible)
            ]
            if view.softcap is not None:
                logits = [view.softcap * math.tanh(x / view.softcap) for x in logits]
            weights = [math.exp(x - max(logits)) for x in logits]
            for j in range(visible):
                score[q_head // group, j] += weights[j] / sum(weights) / (group * window)
    return score


def relative_error(view: LayerView) -> float:
    """What float32 may add: each logit is a sum of `channels` rounded products."""
    assert view.queries is not None
    channels = view.queries.shape[-1]
    largest = float(
        view.queries.norm(dim=-1).max() * view.kv.components["k"].float().norm(dim=-1).max()
    )
    return EPSILON * (2 * (channels + 4) * largest * view.softmax_scale + 32)


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("tokens, window", [(1, 1), (9, 4), (9, 9), (30, 1)])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_window_attention_is_the_mean_causal_softmax(
    group: int, tokens: int, window: int, softcap: float | None
) -> None:
    kv = cache(layers=1, heads=2, tokens=tokens)
    [plain] = view_of(kv, window=window, group=group)
    view = LayerView(plain.kv, plain.queries, plain.softmax_scale, softcap)
    got, expected = window_attention(view), slow_attention(view)
    assert got.dtype == torch.float32 and got.shape == (2, tokens)
    assert np.allclose(got.numpy(), expected, rtol=relative_error(view), atol=0)
    assert np.allclose(got.sum(dim=1).numpy(), 1.0, rtol=tokens * EPSILON)


def test_a_prompt_shorter_than_the_window_is_scored_with_what_there_is() -> None:
    [view] = view_of(cache(layers=1, tokens=3), window=32)
    assert view.queries is not None and view.queries.shape[1] == 3
    scores = window_attention(view)
    assert scores.isfinite().all()
    assert np.allclose(scores.numpy(), slow_attention(view), rtol=relative_error(view), atol=0)


def test_tokens_after_a_window_position_get_nothing_from_it() -> None:
    [view] = view_of(cache(layers=1, tokens=6), window=6, group=1)
    last = window_attention(view)[:, -1]
    alone = LayerView(view.kv, view.queries[:, -1:] if view.queries is not None else None)
    expected = slow_attention(LayerView(alone.kv, alone.queries, view.softmax_scale))[:, -1] / 6
    assert np.allclose(last.numpy(), expected, rtol=relative_error(view), atol=0)


def test_attention_without_queries_is_refused_with_a_way_out() -> None:
    [view] = view_of(cache(layers=1), window=None)
    with pytest.raises(MissingSignal, match=r"layer 0: .* window >= 1, or choose importance 'posi"):
        window_attention(view)
    assert position(view).shape == norm(view).shape == (2, 16)


def heuristic(tokens: int) -> list[float]:
    """compute_importance_heuristic of SpectrumKV's experiments, token by token."""
    score = [1.0 if i < 4 else math.exp(-0.01 * (i - 4)) for i in range(tokens)]
    first_recent = int(0.8 * tokens)
    ramp = np.linspace(0.3, 0.8, tokens - first_recent).tolist()
    for i in range(first_recent, tokens):
        score[i] = max(score[i], ramp[i - first_recent])
    low, high = min(score), max(score)
    return [(x - low) / (high - low) if high > low else 0.0 for x in score]


@pytest.mark.parametrize("tokens", [1, 4, 5, 6, 100, 1001])
def test_position_is_the_published_heuristic(tokens: int) -> None:
    [view] = view_of(cache(layers=1, tokens=tokens), window=None)
    expected = np.array(heuristic(tokens))
    # Min-max normalisation divides the rounding by the span of the scores.
    span = max(1e-3, 1 - math.exp(-0.01 * max(0, tokens - 5)))
    assert np.allclose(position(view).numpy(), expected[None], rtol=0, atol=16 * EPSILON / span)


def test_position_counts_from_the_start_of_the_prompt_not_of_its_part() -> None:
    [view] = view_of(cache(layers=1, tokens=10, start=500), window=None)
    scores = position(view)[0].tolist()
    assert scores[:8] == sorted(scores[:8], reverse=True), "no token of this part is a sink"
    assert scores[-1] == 1.0, "the end of the ramp is the highest"


def test_norm_adds_the_lengths_of_key_and_value() -> None:
    [view] = view_of(cache(layers=1, dtype="float32"), window=None)
    k, v = (view.kv.components[name].double().numpy() for name in "kv")
    expected = np.sqrt((k**2).sum(-1)) + np.sqrt((v**2).sum(-1))
    assert np.allclose(norm(view).numpy(), expected, rtol=16 * EPSILON, atol=0)


@pytest.mark.parametrize("kind", SCORERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("name", ["k", "v"])
def test_scores_of_a_broken_cache_are_finite(kind: str, bad: float, name: str) -> None:
    view = view_of(cache(layers=2, dtype="float32"))
    view[0].kv.components[name][1, 5] = bad
    assert SCORERS[kind](view[0]).isfinite().all()
    assert ranking(view, kind).isfinite().all()


def test_a_broken_key_leaves_the_order_of_the_other_tokens() -> None:
    whole, broken = (
        view_of(cache(layers=1, heads=1, dtype="float32"), window=1, group=1) for _ in range(2)
    )
    broken[0].kv.components["k"][0, 5] = math.nan
    others = [i for i in range(16) if i != 5]
    ranks = [ranking(view)[others].argsort().tolist() for view in (whole, broken)]
    assert ranks[0] == ranks[1]


def importance(views: Sequence[LayerView], decay: float) -> np.ndarray:
    """I_j = A_j exp(-lambda (n - j)), A_j the mean over heads and layers."""
    score = np.mean([slow_attention(view).mean(axis=0) for view in views], axis=0)
    n = len(score)
    return np.array([score[j] * math.exp(-decay * (n - j)) for j in range(n)])


@pytest.mark.parametrize("decay", [0.0, DECAY, 1.0])
def test_ranking_is_the_logarithm_of_the_importance(decay: float) -> None:
    views = view_of(cache(layers=3, tokens=20))
    expected = np.log(importance(views, decay))
    error = max(relative_error(view) for view in views)
    assert np.allclose(ranking(views, decay=decay).numpy(), expected, rtol=0, atol=error)


def test_tokens_very_far_from_the_end_are_still_told_apart() -> None:
    tokens = 30_000
    k = torch.ones(1, tokens, 4)
    k[0, ::2] *= 2  # twice the norm outweighs one step of the decay
    view = LayerView(LayerKV(0, {"k": k, "v": torch.zeros(1, tokens, 4)}, torch.arange(tokens)))
    ranks = ranking([view], "norm")
    assert (ranks[0::2] > ranks[1::2]).all()


def test_position_takes_no_decay() -> None:
    [view] = view_of(cache(layers=1), window=None)
    assert torch.equal(ranking([view], "position", 5.0), position(view)[0].double())


def test_unknown_kinds_and_impossible_decays_are_refused() -> None:
    view = view_of(cache())
    with pytest.raises(UnknownName, match="importance 'size'; known: attention, position, norm"):
        ranking(view, "size")
    for decay in (-0.1, math.nan, math.inf):
        with pytest.raises(BadInput, match="decay must be finite and not negative"):
            ranking(view, decay=decay)
