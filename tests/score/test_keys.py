"""Scores from the cache alone, and from what a capture adds up, against slow transcriptions."""

import math

import numpy as np
import pytest
import torch
from strategies import cache, view_of

from kvprism.errors import MissingSignal, ShapeMismatch
from kvprism.score.accumulated import attention_mass, h2o
from kvprism.score.expected import FUTURE, expected_attention, query_statistics
from kvprism.score.keys import keydiff, knorm, recency
from kvprism.tensors import LayerView, QueryStatistics
from score import slow

EPSILON = slow.EPSILON


def view_without_queries(tokens: int = 20, start: int = 0) -> LayerView:
    [view] = view_of(cache(layers=1, tokens=tokens, start=start), window=None)
    return view


def test_recency_is_the_position() -> None:
    score = slow.as_array(recency(view_without_queries(start=7)))
    assert score.tolist() == [list(range(7, 27))] * 2


def test_keydiff_is_minus_the_cosine_to_the_mean_direction() -> None:
    view = view_without_queries()
    keys = view.kv.components["k"].double().numpy()
    got = slow.as_array(keydiff(view))
    for head in range(2):
        directions = [k / math.sqrt(sum(x * x for x in k)) for k in keys[head]]
        anchor = sum(directions) / len(directions)
        length = math.sqrt(sum(x * x for x in anchor))
        expected = [-float(np.dot(d, anchor)) / length for d in directions]
        # Rounded products of 8 channels, and a mean of 20 that is divided by its own length.
        assert np.allclose(got[head], expected, rtol=0, atol=EPSILON * (16 + 32 / length))


def test_knorm_is_minus_the_keys_length() -> None:
    view = view_without_queries()
    keys = view.kv.components["k"].double().numpy()
    expected = [[-math.sqrt(sum(x * x for x in k)) for k in head] for head in keys]
    assert np.allclose(slow.as_array(knorm(view)), expected, rtol=8 * EPSILON, atol=0)


@pytest.mark.parametrize("scorer", [keydiff, knorm, expected_attention])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("name", ["k", "v"])
def test_scores_of_a_broken_cache_are_finite(scorer, bad: float, name: str) -> None:
    [view] = view_of(cache(layers=1, dtype="float32"))
    view.kv.components[name][1, 5] = bad
    assert bool(scorer(view).isfinite().all())


def slow_mass(
    queries: np.ndarray, keys: np.ndarray, scale: float, softcap: float | None, window: int | None
) -> np.ndarray:
    """Column sums over all queries, one query at a time; mean over the query heads of a KV head."""
    mass, group = np.zeros(keys.shape[:2]), len(queries) // len(keys)
    for q_head, rows in enumerate(queries):
        for i, query in enumerate(rows):
            visible = range(0 if window is None else max(0, i - window + 1), i + 1)
            logits = [scale * float(np.dot(query, keys[q_head // group, j])) for j in visible]
            if softcap is not None:
                logits = [softcap * math.tanh(x / softcap) for x in logits]
            exps = [math.exp(x - max(logits)) for x in logits]
            for j, x in zip(visible, exps, strict=True):
                mass[q_head // group, j] += x / sum(exps) / group
    return mass


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("window", [None, 1, 7, 1000])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_the_mass_is_the_column_sum_of_the_causal_softmax(
    group: int, window: int | None, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvprism.score.accumulated.CHUNK", 8)  # 30 tokens: three and a part
    queries, keys = torch.randn(2 * group, 30, 8), torch.randn(2, 30, 8)
    got = slow.as_array(attention_mass(queries, keys, 0.35, softcap, window))
    expected = slow_mass(queries.double().numpy(), keys.double().numpy(), 0.35, softcap, window)
    largest = float(queries.norm(dim=-1).max() * keys.norm(dim=-1).max())
    error = EPSILON * (2 * 12 * largest * 0.35 + 64)  # as slow.relative_error, and sums of 30
    assert np.allclose(got, expected, rtol=error, atol=0)
    assert math.isclose(got.sum(), 60, rel_tol=error), "each of 30 queries spends 1 in both heads"


def test_the_mass_does_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, keys = torch.randn(2, 300, 8), torch.randn(2, 300, 8)
    whole = attention_mass(queries, keys, 0.3)
    monkeypatch.setattr("kvprism.score.accumulated.CHUNK", 7)
    error = EPSILON * (2 * 12 * float(queries.norm(dim=-1).max() * keys.norm(dim=-1).max()) + 600)
    torch.testing.assert_close(attention_mass(queries, keys, 0.3), whole, rtol=error, atol=0)


def test_h2o_is_the_mass_that_was_captured() -> None:
    [view] = view_of(cache(layers=1))
    assert view.mass is not None and torch.equal(h2o(view), view.mass)


@pytest.mark.parametrize("scorer, signal", [(h2o, "mass"), (expected_attention, "future_queries")])
def test_signals_that_were_not_captured_are_refused_with_a_way_out(scorer, signal: str) -> None:
    with pytest.raises(MissingSignal, match=rf"layer 0: .*signals=.'{signal}'.*, or choose "):
        scorer(view_without_queries())


@pytest.mark.parametrize("start", [0, 2, 50])
def test_expected_attention_is_the_gaussian_closed_form(start: int) -> None:
    [view] = view_of(cache(layers=1, tokens=12, start=start), group=3)
    assert view.future_queries is not None
    keys, values = (view.kv.components[name].double().numpy() for name in "kv")
    means = view.future_queries.mean.double().numpy()
    spreads = view.future_queries.covariance.double().numpy()
    s, got, error = view.softmax_scale, slow.as_array(expected_attention(view)), 0.0
    expected = np.zeros((2, 12))
    scored = [j for j in range(12) if start + j >= 4]
    for q_head, (mean, spread) in enumerate(zip(means, spreads, strict=True)):
        head = keys[q_head // 3]
        z = [s * float(mean @ head[j]) + s * s * float(head[j] @ spread @ head[j]) / 2
             for j in scored]  # fmt: skip
        size = [abs(head[j]) @ abs(mean) * s + s * s * abs(head[j]) @ abs(spread) @ abs(head[j])
                for j in scored]  # fmt: skip
        error = max(error, EPSILON * (2 * 24 * max(size) + 32))  # sums of 8 and of 8 x 8 products
        total = sum(math.exp(x - max(z)) for x in z)
        for j, x in zip(scored, z, strict=True):
            length = math.sqrt(sum(v * v for v in values[q_head // 3, j]))
            expected[q_head // 3, j] += math.exp(x - max(z)) / total / 3 * length
    assert np.allclose(got[:, scored], expected[:, scored], rtol=error, atol=0)
    sinks = [j for j in range(12) if start + j < 4]
    assert (got[:, sinks] == got.max()).all(), "sinks are not scored, and kept"


@pytest.mark.parametrize("tokens", [3, 20])
def test_query_statistics_are_of_queries_before_rope_turned_ahead(tokens: int) -> None:
    frequencies = torch.tensor([1.0, 0.3, 0.05, 0.001])
    queries = torch.randn(2, tokens, 8)
    got = query_statistics(queries, frequencies)
    first = 4 if tokens > 4 else 0  # the sinks are left out where anything else is left
    ahead = np.mean([turn(tokens + i, frequencies) for i in range(FUTURE)], axis=0)
    for q_head in range(2):
        plain = [turn(t, frequencies).T @ queries[q_head, t].double().numpy()
                 for t in range(first, tokens)]  # fmt: skip
        mean = sum(plain) / len(plain)
        covariance = sum(np.outer(x - mean, x - mean) for x in plain) / len(plain)
        largest = float(queries.norm(dim=-1).max())
        error = EPSILON * (8 + 8 + tokens + 16)  # two rotations of 8 channels and a mean
        assert np.allclose(got.mean[q_head].numpy(), ahead @ mean, rtol=0, atol=error * largest)
        assert np.allclose(
            got.covariance[q_head].numpy(),
            ahead @ covariance @ ahead.T,
            rtol=0,
            atol=8 * error * largest**2,
        )


def turn(position: int, frequencies: torch.Tensor) -> np.ndarray:
    """RoPE at a position as a matrix: pair (p, p + half) turns."""
    half, matrix = len(frequencies), np.zeros((8, 8))
    for p, frequency in enumerate(frequencies.double().tolist()):
        c, s = math.cos(position * frequency), math.sin(position * frequency)
        matrix[p, p], matrix[p, p + half] = c, -s
        matrix[p + half, p], matrix[p + half, p + half] = s, c
    return matrix


def test_signals_of_another_shape_are_refused() -> None:
    view = view_without_queries()
    with pytest.raises(ShapeMismatch, match=r"layer 0: expected attention mass \[2 heads, 20 tok"):
        LayerView(view.kv, mass=torch.zeros(2, 19))
    statistics = QueryStatistics(torch.zeros(3, 8), torch.zeros(3, 8, 8))
    with pytest.raises(ShapeMismatch, match=r"query statistics of \[multiple of 2 heads, 8, 8\]"):
        LayerView(view.kv, future_queries=statistics)
