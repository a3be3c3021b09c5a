"""Every kind of task: what is asked follows from the facts, and from nothing else."""

import re
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from kvprism.errors import BadInput
from kvprism.evaluate.lexicon import EVALUATION
from kvprism.evaluate.tasks import KINDS, RULES, Sample

SEEDS = range(20)


def samples(kind: str, size: int | None = None) -> list[Sample]:
    return [KINDS[kind].sample(np.random.default_rng(s), EVALUATION, size) for s in SEEDS]


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_gives_the_same_sample_and_another_seed_another(kind: str) -> None:
    assert samples(kind) == samples(kind)
    assert len({sample.facts for sample in samples(kind)}) == len(SEEDS)


@pytest.mark.parametrize("kind", KINDS)
def test_every_part_begins_with_its_space_and_facts_end_a_sentence(kind: str) -> None:
    for sample in samples(kind):
        assert all(fact.startswith(" ") and fact.endswith(" .") for fact in sample.facts)
        for question, answers in sample.exchanges:
            assert question.startswith(" ") and not question.endswith(" ")
            assert answers and all(re.fullmatch(r"( [\w:]+)+", answer) for answer in answers)


@pytest.mark.parametrize(
    ("kind", "facts"), [("needle", 1), ("multi-key", 4), ("multi-query", 4), ("multi-key", 9)]
)
def test_a_stated_fact_is_asked_for_in_its_own_words(kind: str, facts: int) -> None:
    for sample in samples(kind, facts):
        assert len(sample.facts) == len(sample.exchanges) == facts
        for fact, (question, [answer]) in zip(sample.facts, sample.exchanges, strict=True):
            assert fact == f"{question}{answer} ."
        assert len({question for question, _ in sample.exchanges}) == facts


def test_all_values_of_a_key_are_asked_for_in_their_order() -> None:
    for sample in samples("multi-value"):
        [(question, answers)] = sample.exchanges
        key = question.split()[0]
        one, two, three = (answer.split()[-1] for answer in answers)
        assert f"{question}{''.join(answers)}" == (
            f" {key} drew ticket one : {one} ticket two : {two} ticket three : {three}"
        )
        assert list(sample.facts) == [
            f" {key} drew ticket one : {one} .",
            f" {key} drew ticket two : {two} .",
            f" {key} drew ticket three : {three} .",
        ]


def test_a_number_is_followed_through_the_hands_that_it_went() -> None:
    for sample in samples("variable-tracking"):
        passed = {}
        for fact in sample.facts:
            match = re.fullmatch(r" ((?:Number )?\w+) passes to (\w+) \.", fact)
            assert match and (match[1].startswith("Number ") or match[1] in passed.values())
            passed[match[1]] = match[2]
        assert len(sample.exchanges) == 2
        for question, answers in sample.exchanges:
            holder, *hands = f"{question}{''.join(answers)}".strip().split(" passes to ")
            assert len(hands) == 3
            for hand in hands:
                assert passed[holder] == hand
                holder = hand
            assert holder not in passed


def test_the_table_holds_what_is_asked() -> None:
    for sample in samples("kv-recall"):
        [table] = sample.facts
        pairs = dict(pair.split() for pair in table.strip(" .").removeprefix("Table :").split(";"))
        assert len(pairs) == len(sample.exchanges) == 16
        for question, [answer] in sample.exchanges:
            assert pairs[question.split()[-1]] == answer.strip()


def test_the_common_word_is_the_most_common_by_far() -> None:
    for sample in samples("common-words"):
        counts = Counter(sample.facts[0].strip(" .").removeprefix("Words :").split())
        (word, most), (_, second) = counts.most_common(2)
        assert (f" {word}",) == sample.exchanges[0].answers
        assert (most, second, len(counts)) == (10, 2, 11)


def test_one_rule_explains_the_examples_and_the_answer() -> None:
    for sample in samples("few-shot"):
        shots = sample.facts[0].strip(" .").removeprefix("Rule :").split(";")
        [(question, answers)] = sample.exchanges
        asked = question.removeprefix(" Rule :") + "".join(answers)
        found = [rule for rule in RULES if obeys(rule, [*shots, asked])]
        assert len(found) == 1
        assert question.split()[2] not in sample.facts[0]


def obeys(rule: Callable[..., tuple[str, ...]], shots: list[str]) -> bool:
    """Whether one pair of words around it makes what every example gives."""
    pairs = [(shot.split()[0], shot.split()[2:]) for shot in shots]
    said = {word for _, made in pairs for word in made}
    return any(
        all(made == list(rule(before, word, after)) for word, made in pairs)
        for before in said
        for after in said
    )


def test_a_passage_goes_on_as_it_was_read() -> None:
    for sample in samples("copying"):
        [(question, answers)] = sample.exchanges
        assert f"{question}{''.join(answers)} ." == sample.facts[0]
        assert len(answers) == 7


@pytest.mark.parametrize(
    ("kind", "size"),
    [("multi-key", 61), ("variable-tracking", 31), ("few-shot", 58), ("copying", 61)],
)
def test_a_size_beyond_the_lexicon_is_refused(kind: str, size: int) -> None:
    with pytest.raises(BadInput, match="different words are wanted, the lexicon has 6"):
        samples(kind, size)


def test_more_values_than_places_are_refused() -> None:
    with pytest.raises(BadInput, match="at most 9 values, 10 are wanted"):
        samples("multi-value", 10)
