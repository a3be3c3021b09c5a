"""Layer splits against slow transcriptions, and what they do with layers of other lengths."""

import math

import numpy as np
import pytest
from score import slow
from strategies import cache, view_of

from kvprism.score.window import lava
from kvprism.split import cake_preference, lava_entropy, pooled, pyramid, uniform
from kvprism.tensors import LayerView


def views() -> tuple[LayerView, ...]:
    """Layers that attend more and more sharply."""
    made = view_of(cache(layers=3, heads=2, tokens=24), window=6)
    return tuple(LayerView(v.kv, v.queries, v.softmax_scale * (1 + i)) for i, v in enumerate(made))


def test_uniform_gives_every_layer_the_same() -> None:
    assert uniform(3, (), ()) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("layers", [2, 3, 32])
def test_the_pyramid_has_the_published_budgets(layers: int) -> None:
    # (C - w) tokens a layer: min = (C - w) / 20, max = 2 (C - w) - min, equal steps between.
    each = 480
    lowest = each / 20
    highest = 2 * each - lowest
    step = (highest - lowest) / (layers - 1)
    expected = [highest - i * step for i in range(layers)]
    weights = np.array(pyramid(layers, (), ()))
    assert np.allclose(weights * each, expected, rtol=1e-12)
    assert math.isclose(sum(expected), layers * each)
    assert pyramid(1, (), ()) == [1.0]


def test_cakes_preference_is_entropy_and_variance_of_the_window() -> None:
    expected = []
    for view in views():
        weights = slow.attention(view)[..., :18]
        entropy, variance = 0.0, 0.0
        for rows in weights:
            entropy -= sum(float(x) * math.log(x) for x in rows.reshape(-1))
            for j in range(18):
                mean = sum(rows[:, j]) / len(rows)
                variance += sum((x - mean) ** 2 for x in rows[:, j]) / len(rows)
        expected.append(entropy ** (1 / 1.6) * variance ** (1 / 0.4))
    got = np.array(cake_preference(3, views(), ()))
    # The variance is a difference of rounded numbers, and is raised to the power of 2.5.
    error = max(slow.relative_error(view) for view in views())
    assert np.allclose(got, np.array(expected) / max(expected), rtol=2.5 * 8 * error, atol=0)
    assert len(set(got.tolist())) == 3


def test_lavas_split_is_the_entropy_of_a_layers_scores() -> None:
    scores = [lava(view) for view in views()]
    expected = []
    for score in scores:
        flat = [float(x) for row in score[:, :18] for x in row]
        shares = [x / sum(flat) for x in flat]
        expected.append(-sum(p * math.log(p) for p in shares) / math.log(len(flat)))
    assert np.allclose(lava_entropy(3, views(), scores), expected, rtol=1e-12)
    assert all(0 < x < 1 for x in expected)


@pytest.mark.parametrize("split", [cake_preference, lava_entropy])
def test_layers_without_a_prefix_still_have_a_weight(split) -> None:
    short = view_of(cache(layers=2, tokens=4), window=6)
    weights = split(2, short, [lava(view) for view in short])
    assert all(0 < weight < math.inf for weight in weights)


@pytest.mark.parametrize("split", [uniform, cake_preference, lava_entropy, pooled])
def test_a_dry_run_is_uniform(split) -> None:
    assert split(3, (), ()) == [1.0, 1.0, 1.0]


def test_pooled_lets_tokens_compete_by_score() -> None:
    assert pooled(3, views(), ()) is None
