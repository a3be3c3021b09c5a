"""The signals against transcriptions of the paper's formulas, term by term."""

import math

import pytest
import torch

from kvprism.errors import BadInput
from kvprism.layer_signals import (
    attention_entropy,
    cosine,
    perplexity,
    perplexity_sensitivity,
    worst_case,
)
from kvprism.score.accumulated import attention_mass


def test_cosine_is_the_mean_over_tokens() -> None:
    full, evicted = torch.randn(7, 5), torch.randn(7, 5)
    expected = 0.0
    for h, g in zip(full.tolist(), evicted.tolist(), strict=True):
        dot = sum(a * b for a, b in zip(h, g, strict=True))
        expected += dot / math.sqrt(sum(a * a for a in h) * sum(b * b for b in g)) / 7
    assert cosine(full, evicted) == pytest.approx(expected, abs=1e-12)
    assert cosine(full, 3 * full) == pytest.approx(1) and cosine(full, -full) == pytest.approx(-1)


def test_perplexity_weighs_documents_by_their_tokens() -> None:
    """exp of the mean over tokens, not the mean of exps: 1 token at 3 nats, 3 tokens at 1."""
    assert perplexity([(3.0, 1), (3.0, 3)]) == pytest.approx(math.exp(6 / 4))
    assert perplexity_sensitivity([(2.0, 2)], [(4.0, 2)]) == pytest.approx(math.e**2 - math.e)
    with pytest.raises(BadInput, match="at least one scored token"):
        perplexity([(0.0, 0)])


def test_the_worst_policy_says_how_sensitive_a_layer_is() -> None:
    assert worst_case({"tova": -0.5, "snapkv": 2.0, "h2o": 1.0}) == 2.0


def test_entropy_is_that_of_the_mean_attention() -> None:
    """Over examples, query positions and query heads, as the paper's p_{l,i}, from the softmax."""
    tokens, heads, group, channels = 6, 2, 2, 4
    examples = [
        (torch.randn(heads * group, tokens, channels), torch.randn(heads, tokens, channels))
        for _ in range(3)
    ]
    mean = [0.0] * tokens
    for queries, keys in examples:
        for head in range(heads * group):
            for t in range(tokens):
                logits = [float(queries[head, t] @ keys[head // group, i]) for i in range(t + 1)]
                total = sum(map(math.exp, logits))
                for i, logit in enumerate(logits):
                    mean[i] += math.exp(logit) / total / (len(examples) * heads * group * tokens)
    assert sum(mean) == pytest.approx(1)
    expected = -sum(p * math.log(p) for p in mean)
    masses = [attention_mass(queries, keys, 1.0) for queries, keys in examples]
    assert attention_entropy(masses) == pytest.approx(expected, abs=1e-6)  # the mass is float32


def test_entropy_is_of_the_mean_and_not_the_mean_of_entropies() -> None:
    one, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert attention_entropy([one]) == attention_entropy([other]) == 0.0
    assert attention_entropy([one, other]) == pytest.approx(math.log(2))
    assert attention_entropy([one, torch.tensor([[0.0, 1.0, 5.0]])]) == pytest.approx(math.log(2))
