"""Scores from the last window's attention against slow transcriptions of their formulas."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from strategies import cache, view_of

from kvprism.errors import MissingSignal
from kvprism.score.window import (
    GAMMA,
    cake,
    defensivekv,
    lava,
    max_pooled,
    scissorhands,
    snapkv,
    tova,
)
from kvprism.tensors import LayerView
from score import slow

SCORERS = [cake, defensivekv, lava, max_pooled, scissorhands, snapkv, tova]
# One query, no GQA; a window in a longer prompt; a window that is nearly all there is; a soft cap.
VIEWS = [
    slow.made(40, 1, group=1),
    slow.made(41, 8, group=3),
    slow.made(12, 11),
    slow.made(30, 6, softcap=1.5),
]


def expect(score: torch.Tensor, expected: list[list[float]], view: LayerView, rtol: float) -> None:
    """The prefix as given, and the window at its highest."""
    got, prefix = slow.as_array(score), len(expected[0])
    assert got.shape == (2, len(view.kv.positions))
    assert np.allclose(got[:, :prefix], expected, rtol=rtol, atol=0)
    assert (got[:, prefix:] == got[:, :prefix].max()).all()


def prefix_of(view: LayerView) -> np.ndarray:
    weights = slow.attention(view)
    return weights[..., : weights.shape[2] - weights.shape[1]]


@pytest.mark.parametrize("view", VIEWS)
def test_snapkv_pools_the_votes_of_the_window(view: LayerView) -> None:
    weights, expected = prefix_of(view), []
    for head in range(2):
        group = slow.group_of(view, head)
        votes = [
            sum(weights[q, w, j] for q in group for w in range(weights.shape[1])) / len(group)
            for j in range(weights.shape[2])
        ]
        expected.append(slow.averaged(votes, 5))
    expect(snapkv(view), expected, view, slow.relative_error(view))


@pytest.mark.parametrize("view", VIEWS)
def test_max_pooling_takes_the_highest_neighbour(view: LayerView) -> None:
    weights, expected = prefix_of(view), []
    for head in range(2):
        mean = weights[list(slow.group_of(view, head))].mean(axis=(0, 1))
        expected.append(slow.highest(mean.tolist(), 7))
    expect(max_pooled(view), expected, view, slow.relative_error(view))


@pytest.mark.parametrize("view", VIEWS)
def test_tova_is_the_last_querys_attention_in_all_heads(view: LayerView) -> None:
    weights = slow.attention(view, 1)
    expected = [sum(weights[q, 0, j] for q in range(len(weights))) / len(weights)
                for j in range(weights.shape[2])]  # fmt: skip
    got = slow.as_array(tova(view))
    assert np.allclose(got, [expected, expected], rtol=slow.relative_error(view), atol=0)


@pytest.mark.parametrize("view", VIEWS)
def test_scissorhands_counts_how_often_a_token_was_above_average(view: LayerView) -> None:
    weights = slow.attention(view)
    _, window, tokens = weights.shape
    got = slow.as_array(scissorhands(view))
    for head in range(2):
        for j in range(tokens):
            count, total = 0, 0.0
            for q in slow.group_of(view, head):
                for w in range(window):
                    average = 1 / (tokens - window + w + 1)
                    margin = slow.relative_error(view) * weights[q, w, j]
                    assert abs(weights[q, w, j] - average) > margin or average == 1, "a near tie"
                    count += weights[q, w, j] > average
                    total += weights[q, w, j]
            expected = count + total / len(slow.group_of(view, head)) / window
            assert math.isclose(got[head, j], expected, rel_tol=slow.relative_error(view))


@pytest.mark.parametrize("view", VIEWS)
def test_cake_adds_the_variance_of_the_attention(view: LayerView) -> None:
    weights, expected = prefix_of(view), []
    for head in range(2):
        rows = []
        for q in slow.group_of(view, head):
            row = []
            for j in range(weights.shape[2]):
                column = weights[q, :, j].tolist()
                mean = sum(column) / len(column)
                row.append(mean + GAMMA * sum((x - mean) ** 2 for x in column) / len(column))
            rows.append(slow.averaged(row, 5))
        expected.append(np.mean(rows, axis=0).tolist())
    got = slow.as_array(cake(view))[:, : weights.shape[2]]
    # An error e of each x moves their variance by at most 4 e max(x)^2.
    error = slow.relative_error(view)
    atol = error * (weights.max() + GAMMA * 4 * weights.max() ** 2)
    assert np.allclose(got, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("view", VIEWS)
def test_lava_weighs_attention_by_the_heads_largest_value(view: LayerView) -> None:
    weights, expected = prefix_of(view), []
    values = view.kv.components["v"].double().numpy()
    for head in range(2):
        largest = max(sum(abs(x) for x in values[head, j]) for j in range(weights.shape[2]))
        rows = [
            slow.highest([float(x) * largest for x in weights[q].mean(axis=0)], 7)
            for q in slow.group_of(view, head)
        ]
        expected.append(np.max(rows, axis=0).tolist())
    expect(lava(view), expected, view, slow.relative_error(view) + 16 * slow.EPSILON)


@pytest.mark.parametrize("view", VIEWS)
def test_defensivekv_takes_the_worst_case_and_no_less_than_the_mean(view: LayerView) -> None:
    weights, expected = prefix_of(view), []
    for head in range(2):
        rows = []
        for q in slow.group_of(view, head):
            for w in range(weights.shape[1]):
                row = weights[q, w].tolist()
                pooled = slow.averaged(row, 5)
                rows.append([x * sum(row) / sum(pooled) for x in pooled])
        worst = np.max(rows, axis=0)
        norms = view.output_norms.double().numpy()
        factor = norms[head, : len(worst)] / norms.mean()
        expected.append((np.maximum(worst, worst.mean()) * factor).tolist())
    # Sums of probabilities keep their relative error; there is a product and a quotient of them.
    expect(defensivekv(view), expected, view, 4 * slow.relative_error(view))


@pytest.mark.parametrize("scorer", SCORERS)
def test_only_the_last_32_queries_count(scorer) -> None:
    [long] = view_of(cache(layers=1, tokens=60), window=40)
    assert long.queries is not None
    short = replace(long, queries=long.queries[:, -32:])
    assert torch.equal(scorer(long), scorer(short))


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("tokens", [1, 3])
def test_a_prompt_that_is_all_window_has_scores(scorer, tokens: int) -> None:
    [view] = view_of(cache(layers=1, tokens=tokens), window=32)
    assert scorer(view).shape == (2, tokens) and bool(scorer(view).isfinite().all())


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("name", ["k", "v"])
def test_scores_of_a_broken_cache_are_finite(scorer, bad: float, name: str) -> None:
    [view] = view_of(cache(layers=1, dtype="float32"))
    view.kv.components[name][1, 5] = bad
    assert bool(scorer(view).isfinite().all())


@pytest.mark.parametrize("scorer", SCORERS)
def test_scores_without_queries_are_refused_with_a_way_out(scorer) -> None:
    [view] = view_of(cache(layers=1), window=None)
    with pytest.raises(MissingSignal, match=r"layer 0: .*needs the queries .*window >= 1, or choo"):
        scorer(view)
