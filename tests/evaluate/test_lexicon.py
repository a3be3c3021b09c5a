"""The split of words and numbers: exact, balanced, and drawn from as promised."""

import numpy as np
import pytest

from kvprism.errors import BadInput
from kvprism.evaluate.lexicon import (
    EVALUATION,
    HELD_OUT_WORDINGS,
    KEYS,
    UNSEEN_WORDINGS,
    WORDINGS,
    WORDS,
    Lexicon,
    draw,
    is_for_evaluation,
)

TRAINING = Lexicon(["Rome"], ["wheel"], WORDINGS, evaluation=False)


def test_names_are_said_once_and_wordings_are_on_one_side() -> None:
    for names in (KEYS, WORDS, (*WORDINGS, *HELD_OUT_WORDINGS)):
        assert len(set(names)) == len(names)
    assert not set(KEYS) & set(WORDS)
    assert set(UNSEEN_WORDINGS.wordings).isdisjoint(TRAINING.wordings)


@pytest.mark.parametrize("wording", [*WORDINGS, *HELD_OUT_WORDINGS])
def test_a_wording_is_a_sentence_about_a_key_that_ends_with_its_value(wording: str) -> None:
    assert 0 < wording.index("{key}") < wording.index("{value}")
    assert wording.startswith(" ") and wording.endswith(" {value} .")


def test_one_number_in_ten_is_for_the_evaluation_whatever_its_digits() -> None:
    chosen = [f"{i:05d}" for i in range(10**5) if is_for_evaluation(f"{i:05d}")]
    assert len(chosen) == pytest.approx(10**4, rel=0.05)
    for place in range(5):
        digits = np.bincount([int(value[place]) for value in chosen])
        assert digits == pytest.approx(np.full(10, len(chosen) / 10), rel=0.1)


@pytest.mark.parametrize("lexicon", [EVALUATION, TRAINING])
def test_values_are_different_and_of_their_side(lexicon: Lexicon) -> None:
    values = lexicon.values(np.random.default_rng(0), 50)
    assert len(set(values)) == 50
    assert all(len(value) == 5 and value.isdigit() for value in values)
    assert {is_for_evaluation(value) for value in values} == {lexicon.evaluation}


def test_a_draw_repeats_nothing_and_misses_nothing() -> None:
    drawn = draw(np.random.default_rng(0), KEYS, len(KEYS))
    assert sorted(drawn) == sorted(KEYS)
    assert drawn != list(KEYS)


@pytest.mark.parametrize("count", [0, 61])
def test_more_words_than_there_are_cannot_be_drawn(count: int) -> None:
    with pytest.raises(BadInput, match=f"{count} different words are wanted, the lexicon has 60"):
        draw(np.random.default_rng(0), KEYS, count)
