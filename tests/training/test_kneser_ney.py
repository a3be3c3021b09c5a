"""A distribution after every context, and exact counts in a case small enough for paper."""

import numpy as np
import pytest

from training.kneser_ney import Trigram

VOCABULARY = 7


@pytest.fixture(scope="module")
def fitted() -> Trigram:
    ids = np.random.default_rng(0).integers(0, VOCABULARY - 1, 200)
    return Trigram.fit(ids, VOCABULARY)


@pytest.mark.parametrize("context", [(0, 1), (3, 3), (5, 0), (6, 6), (0, 6)])
def test_probabilities_sum_to_one_after_seen_and_unseen_contexts(fitted, context):
    first, second = (np.full(VOCABULARY, token) for token in context)
    found = fitted.probabilities(first, second, np.arange(VOCABULARY))
    assert found.sum() == pytest.approx(1, abs=1e-12)
    assert (found > 0).all(), "also the token that was never seen"


def test_what_was_counted_is_discounted_and_the_rest_goes_to_the_lower_order():
    # 0 1 2 twice, 0 1 3 once: n1 = 4 (1 2 0, 2 0 1, 0 1 3, 1 3 ... none) counted below by hand.
    ids = np.array([0, 1, 2, 0, 1, 2, 0, 1, 3])
    model = Trigram.fit(ids, 4)
    three = model.levels[0]
    # trigrams: 012 x2, 120 x2, 201 x2, 013 x1
    assert three.discount == pytest.approx(1 / (1 + 2 * 3))
    lower = model.levels[1].interpolate(np.array([1]), np.array([1 * 4 + 2]), np.array([0.25]))
    assert lower.shape == (1,)
    found = model.probabilities(np.array([0]), np.array([1]), np.array([2]))[0]
    bigram = model.levels[1].interpolate(
        np.array([1]),
        np.array([1 * 4 + 2]),
        model.levels[2].interpolate(np.array([0]), np.array([2]), np.array([0.25])),
    )[0]
    discount = three.discount
    assert found == pytest.approx((2 - discount + discount * 2 * bigram) / 3)


def test_perplexity_of_a_certain_text_is_near_one_and_of_noise_near_the_vocabulary():
    certain = np.arange(3000) % VOCABULARY
    assert Trigram.fit(certain, VOCABULARY).perplexity(certain) < 1.01
    noise = np.random.default_rng(1).integers(0, VOCABULARY, 20_000)
    assert Trigram.fit(noise, VOCABULARY).perplexity(noise[::-1].copy()) == pytest.approx(
        VOCABULARY, rel=0.02
    )
