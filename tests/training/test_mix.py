"""What models read: the right lengths and labels, and nothing that the evaluation asks for."""

import numpy as np
import pytest

from kvprism.evaluate.lexicon import (
    EVALUATION,
    HELD_OUT_WORDINGS,
    KEYS,
    WORDINGS,
    WORDS,
    Lexicon,
    is_for_evaluation,
)
from kvprism.evaluate.tasks import KINDS
from training.mix import NO_TASK, SIZES, TASKS, Sampler, training_lexicon
from training.network import train_tokenizer

VOCABULARY = 600
EVEN = dict.fromkeys(TASKS, 1.0)


@pytest.fixture(scope="module")
def tokenizer(text: str):
    return train_tokenizer(text, VOCABULARY)


@pytest.fixture(scope="module")
def sampler(text: str, tokenizer) -> Sampler:
    def encode(part: str) -> list[int]:
        return tokenizer.encode(part, add_special_tokens=False).ids

    words = sorted({word for word in text.split() if word.islower() and len(word) > 2})
    names = sorted({word for word in text.split() if word.istitle() and word.isalpha()})
    lexicon = Lexicon(names, words, training_lexicon(text).wordings, evaluation=False)
    return Sampler(np.array(encode(text)), encode, lexicon, bos=0, vocabulary=VOCABULARY)


@pytest.mark.parametrize("kind", ["text", "echo", "copy", "dense", "hidden"])
@pytest.mark.parametrize("length", [65, 129, 513])
def test_sequences_have_their_length_and_begin_with_bos(sampler, kind, length):
    for seed in range(10):
        found = sampler.sequence(np.random.default_rng(seed), kind, length, EVEN)
        assert [len(column) for column in found] == [length] * 3
        assert found.ids[0] == 0 and found.weights[0] == 0
        assert (found.ids >= 0).all() and (found.ids < VOCABULARY).all()
        assert found.weights.sum() > 0


@pytest.mark.parametrize("task", TASKS)
def test_answers_follow_from_what_was_read(sampler, tokenizer, task):
    """Every answer token has weight, and the answer's text stands earlier in the sequence."""
    found = sampler.sequence(np.random.default_rng(3), "hidden", 1025, {task: 1.0})
    answers = np.flatnonzero(found.task != NO_TASK)
    assert len(answers) and set(found.task[answers]) == {TASKS.index(task)}
    assert (found.weights[answers] >= 1).all()
    first = answers[0]
    until = first + int(np.argmax(np.append(np.diff(answers), 2) > 1)) + 1
    before = tokenizer.decode(found.ids[:first].tolist())
    for word in tokenizer.decode(found.ids[first:until].tolist()).split():
        assert word in before


def test_numbers_are_not_guessed_where_they_are_first_said(sampler, tokenizer):
    found = sampler.sequence(np.random.default_rng(0), "dense", 257, {"needle": 1.0})
    digits = {tokenizer.token_to_id(str(digit)) for digit in range(10)}
    for token, weight, task in zip(*found, strict=True):
        if int(token) in digits:
            assert (weight > 0) == (task != NO_TASK)


def test_a_step_is_reproduced_from_its_seed_alone(sampler):
    one, again, other = (
        sampler.batch((7, step), 128, 3, {"copy": 1, "hidden": 1}, EVEN) for step in (4, 4, 5)
    )
    assert all(np.array_equal(a, b) for a, b in zip(one[:4], again[:4], strict=True))
    assert not np.array_equal(one.inputs, other.inputs)
    assert np.array_equal(one.inputs[:, 1:], one.targets[:, :-1])


def test_training_draws_nothing_that_the_evaluation_asks_for(text):
    common = " ".join([*KEYS, *WORDS] * 30)
    lexicon = training_lexicon(text + " " + common)
    assert lexicon.keys and lexicon.words
    assert not set(lexicon.keys) & set(EVALUATION.keys)
    assert not set(lexicon.words) & set(EVALUATION.words)
    assert not set(lexicon.wordings) & set(HELD_OUT_WORDINGS)
    rng = np.random.default_rng(0)
    assert not any(is_for_evaluation(value) for value in lexicon.values(rng, 500))
    assert all(is_for_evaluation(value) for value in EVALUATION.values(rng, 500))


def test_half_of_the_facts_are_said_in_made_up_words(text):
    wordings = training_lexicon(text * 20).wordings
    made = set(wordings) - set(WORDINGS)
    assert len(made) > 1000
    assert sum(wording in made for wording in wordings) == pytest.approx(
        len(wordings) / 2, rel=0.02
    )
    for wording in made:
        assert 0 < wording.index("{key}") < wording.index("{value}")
        assert wording.startswith(" ") and wording.endswith(" {value} .")
    assert wordings == training_lexicon(text * 20).wordings


def test_every_kind_has_a_range_that_the_evaluation_lies_in():
    assert set(SIZES) == set(KINDS)
    for name, kind in KINDS.items():
        assert SIZES[name].fewest <= kind.size <= SIZES[name].most


def test_text_alone_is_read_in_shorter_windows(sampler):
    drawn = {"length": 1088, "count": 2, "tasks": EVEN, "text_length": 512}
    text = sampler.batch((1, 2), mixture={"text": 1.0}, **drawn)
    assert text.inputs.shape == text.weights.shape == (4, 544)
    assert (text.inputs[:, 0] == 0).all() and text.kinds == ("text",) * 4
    hidden = sampler.batch((1, 2), mixture={"hidden": 1.0}, **drawn)
    assert hidden.inputs.shape == (2, 1088)
