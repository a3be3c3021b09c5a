"""Haystacks: exact lengths, needles where they should be, answers that only the context holds."""

import re
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvprism.errors import BadInput
from kvprism.evaluate.haystack import (
    NeedleCase,
    ask,
    encode,
    hide,
    hide_facts,
    needle_case,
    sentences,
)
from kvprism.evaluate.lexicon import HELD_OUT_WORDINGS, KEYS, WORDINGS, is_for_evaluation


def text_of(tokenizer: Any, ids: np.ndarray) -> str:
    return str(tokenizer.decode(ids.tolist()))


@pytest.fixture(scope="module")
def tokenizer(tiny: tuple[Any, Any]) -> Any:
    return tiny[1]


@pytest.mark.parametrize("distractors", [0, 3])
@pytest.mark.parametrize("length", [128, 1024, 2048])
def test_the_context_has_exactly_the_length_asked_for(
    tokenizer: Any, length: int, distractors: int
) -> None:
    case = needle_case(tokenizer, length, 0.5, distractors)
    assert len(case.context_ids) == length
    assert case.context_ids[0] == tokenizer.bos_token_id
    assert (case.context_ids[1:] != tokenizer.bos_token_id).all()


@given(depth=st.floats(0, 1), distractors=st.integers(0, 5), seed=st.integers(0, 10**6))
def test_the_needle_is_there_once_and_its_distractors_beside_it(
    tiny: tuple[Any, Any], depth: float, distractors: int, seed: int
) -> None:
    case = needle_case(tiny[1], 700, depth, distractors, seed)
    text = text_of(tiny[1], case.context_ids)
    assert text.count(f"The secret number of {case.key} is {case.value} .") == 1
    found = re.findall(r"The secret number of (\w+) is (\d{5}) \.", text)
    assert len(found) == distractors + 1
    assert {key for key, _ in found} <= set(KEYS)
    assert len({key for key, _ in found}) == distractors + 1


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
def test_the_needle_is_at_its_depth(tokenizer: Any, depth: float) -> None:
    case = needle_case(tokenizer, 2048, depth)
    text = text_of(tokenizer, case.context_ids)
    # The nearest sentence end is half a sentence away; a generated one has at most 60 tokens.
    assert abs(text.index("The secret number") / len(text) - depth) < 60 / 2048


def test_needles_stand_between_sentences_or_at_the_very_end(tokenizer: Any) -> None:
    for seed in range(20):
        case = needle_case(tokenizer, 512, 0.5, 3, seed)
        text = text_of(tokenizer, case.context_ids).removeprefix("<|bos|>")
        parts = re.split(r" The secret number of \w+ is \d{5} \.", text)
        *inner, last = (part for part in parts[:-1] if part)
        assert all(part.endswith(".") for part in inner)
        assert last.endswith(".") or not parts[-1]


def test_question_and_answer_continue_the_needles_own_words(tokenizer: Any) -> None:
    case = needle_case(tokenizer, 256, 0.5)
    assert text_of(tokenizer, case.question_ids) == f" \n The secret number of {case.key} is "
    assert [tokenizer.decode([i]) for i in case.answer_ids.tolist()] == list(case.value)


def test_the_answer_is_found_where_a_space_joins_the_digits(merging_tokenizer: Any) -> None:
    for seed in range(20):
        case = needle_case(merging_tokenizer, 300, 0.5, 1, seed)
        assert len(case.context_ids) == 300
        assert text_of(merging_tokenizer, case.answer_ids).strip() == case.value
        question = text_of(merging_tokenizer, case.question_ids)
        assert question.rstrip() == f" \n The secret number of {case.key} is"
        whole = np.concatenate([case.question_ids, case.answer_ids])
        assert (whole == encode(merging_tokenizer, f"{question.rstrip()} {case.value}")).all()


@pytest.mark.parametrize("template", [*WORDINGS[1::5], *HELD_OUT_WORDINGS])
def test_every_template_hides_and_asks(tokenizer: Any, template: str) -> None:
    case = needle_case(tokenizer, 256, 0.5, template=template)
    text = text_of(tokenizer, case.context_ids)
    assert template.format(key=case.key, value=case.value) in text
    assert text_of(tokenizer, case.answer_ids) == case.value


def same(a: NeedleCase, b: NeedleCase) -> bool:
    return (a.key, a.value) == (b.key, b.value) and (a.context_ids == b.context_ids).all()


def test_a_seed_gives_the_same_case_again(tokenizer: Any) -> None:
    assert same(needle_case(tokenizer, 300, 0.5, 2, 5), needle_case(tokenizer, 300, 0.5, 2, 5))
    assert not same(needle_case(tokenizer, 300, 0.5, 2, 5), needle_case(tokenizer, 300, 0.5, 2, 6))


def test_filler_has_no_key_and_no_value() -> None:
    words = set(sentences(np.random.default_rng(0), 5000).split())
    assert words.isdisjoint(KEYS)
    assert not [word for word in words if re.fullmatch(r"\d{5}", word)]


def test_filler_hardly_repeats_itself() -> None:
    lines = sentences(np.random.default_rng(0), 2000).split(" .")
    assert len(set(lines)) > 0.95 * len(lines)


def test_a_text_file_can_be_the_haystack(tokenizer: Any) -> None:
    text = "".join(f" This is line {i} of another text ." for i in range(400))
    case = needle_case(tokenizer, 400, 0.5, haystack_ids=encode(tokenizer, text))
    assert len(case.context_ids) == 400
    rest = text_of(tokenizer, case.context_ids).removeprefix("<|bos|>")
    before, after = rest.split(f" The secret number of {case.key} is {case.value} .")
    assert before in text and after in text


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"depth": 1.5}, "depth must be in"),
        ({"distractors": 60}, "distractors must be 0 to 59, got 60"),
        ({"length": 10}, "length 10 holds no text beside 1 needles; at least"),
        ({"template": " {value} is the number of {key}"}, "then {value}"),
        ({"haystack_ids": np.arange(50)}, "the haystack has 50 tokens"),
    ],
)
def test_what_cannot_be_hidden_is_refused(
    tokenizer: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        needle_case(tokenizer, **{"length": 256, "depth": 0.5, **settings})


def test_facts_are_where_they_say_and_spread_over_the_text(tokenizer: Any) -> None:
    facts = hide_facts(tokenizer, 1000, 5)
    assert len(facts.context_ids) == 1000
    for fact, depth in zip(facts.needles, (0.1, 0.3, 0.5, 0.7, 0.9), strict=True):
        line = text_of(tokenizer, facts.context_ids[fact.start : fact.stop]).strip()
        assert line == fact.line == f"The secret number of {fact.key} is {fact.value} ."
        assert abs(fact.start / 1000 - depth) < 0.1
        asked = text_of(tokenizer, fact.question_ids)
        assert asked.strip() == fact.question == f"The secret number of {fact.key} is"


def test_the_same_seed_hides_the_same_facts(tokenizer: Any) -> None:
    first, second, other = (hide_facts(tokenizer, 400, 3, seed) for seed in (1, 1, 2))
    assert (first.context_ids == second.context_ids).all()
    assert (first.context_ids != other.context_ids).any()


def test_values_are_those_that_no_model_was_trained_on(tokenizer: Any) -> None:
    values = [needle_case(tokenizer, 128, 0.5, seed=seed).value for seed in range(20)]
    values += [fact.value for fact in hide_facts(tokenizer, 600, 10).needles]
    assert all(is_for_evaluation(value) for value in values)


def test_facts_are_where_they_say_in_the_order_of_their_depths(tokenizer: Any) -> None:
    rng = np.random.default_rng(0)
    facts = [f" The mill of {key} is old ." for key in KEYS[:4]]
    hidden = hide(tokenizer, 300, facts, [0.9, 0.2, 0.2, 0.0], rng)
    assert len(hidden.context_ids) == 300
    assert [text_of(tokenizer, hidden.context_ids[s]) for s in hidden.facts] == facts
    last, second, third, first = (span.start for span in hidden.facts)
    assert first < second < third < last
    assert hidden.facts[1].stop == third  # facts of one place keep their order


def test_no_facts_are_a_text_of_that_length(tokenizer: Any) -> None:
    hidden = hide(tokenizer, 64, [], [], np.random.default_rng(0))
    assert (len(hidden.context_ids), hidden.facts) == (64, ())


@pytest.mark.parametrize(
    "answers", [(" 01234", " 56789"), (" Oslo", " Rome", " 77777"), (" mill",)]
)
def test_questions_and_answers_are_parted_where_the_tokenizer_allows(
    tokenizer: Any, merging_tokenizer: Any, answers: tuple[str, ...]
) -> None:
    for each in (tokenizer, merging_tokenizer):
        asked = ask(each, " \n The mills of Oslo are", answers)
        assert text_of(each, asked.ids) == " \n The mills of Oslo are" + "".join(answers)
        assert [text_of(each, asked.ids[span]).strip() for span in asked.answers] == [
            answer.strip() for answer in answers
        ]
        assert asked.answers[-1].stop == len(asked.ids)
        assert all(a.stop == b.start for a, b in pairwise(asked.answers))


def test_a_space_of_its_own_belongs_to_the_question_and_to_the_second_answer(
    tokenizer: Any, merging_tokenizer: Any
) -> None:
    def parts(each: Any) -> list[str]:
        asked = ask(each, " The number is", (" 01234", " 56789"))
        return [text_of(each, asked.ids[span]) for span in asked.answers]

    assert parts(tokenizer) == ["01234", " 56789"]
    assert parts(merging_tokenizer) == [" 01234", " 56789"]


def test_an_answer_that_is_merged_with_its_question_is_refused(merging_tokenizer: Any) -> None:
    with pytest.raises(BadInput, match="merges the answer 'tle' with what comes before it"):
        ask(merging_tokenizer, " The cas", ("tle",))


@pytest.mark.parametrize("n_facts", [0, 61])
def test_more_facts_than_keys_are_refused(tokenizer: Any, n_facts: int) -> None:
    with pytest.raises(BadInput, match=f"facts must be 1 to 60, got {n_facts}"):
        hide_facts(tokenizer, 1000, n_facts)
