"""The task suite as text: facts to hide in a context, and what is asked about them. No torch here.

Nine kinds after RULER (Hsieh et al. 2024, arXiv 2404.06654), worded so that small models can learn
them. One generator serves evaluation and training, with different lexicons and seeds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from kvprism.errors import BadInput
from kvprism.evaluate.lexicon import Lexicon, draw
from kvprism.registry import Registry

TICKET = " {key} drew ticket {place} : {value} ."
PLACES = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PASSED = " {holder} passes to {key} ."


class Exchange(NamedTuple):
    """A question and its answers, each with its leading space, in the order in which they come."""

    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Sample:
    """One instance of a kind.

    facts: statements to hide; exchanges: what may be asked once all of them were read.
    """

    facts: tuple[str, ...]
    exchanges: tuple[Exchange, ...]


Build = Callable[[np.random.Generator, Lexicon, int], Sample]


@dataclass(frozen=True)
class Kind:
    """A kind of task.

    build: makes a sample of a size; size: the evaluation's; unit: what the size counts; ordered:
    the facts must stay in order; asks_all: the evaluation asks every exchange, otherwise the first.
    """

    build: Build
    size: int
    unit: str
    ordered: bool = False
    asks_all: bool = False

    def sample(self, rng: np.random.Generator, lexicon: Lexicon, size: int | None = None) -> Sample:
        """An instance; `BadInput` where the lexicon is too small for the size."""
        return self.build(rng, lexicon, self.size if size is None else size)


def _stated(rng: np.random.Generator, lexicon: Lexicon, size: int) -> Sample:
    """One fact per key, all in one wording; asked for in the fact's own words."""
    wording = lexicon.wordings[int(rng.integers(len(lexicon.wordings)))]
    keys, values = draw(rng, lexicon.keys, size), lexicon.values(rng, size)
    facts = [wording.format(key=k, value=v) for k, v in zip(keys, values, strict=True)]
    return Sample(
        tuple(facts),
        tuple(
            Exchange(fact[: fact.index(f" {value} .")], (f" {value}",))
            for fact, value in zip(facts, values, strict=True)
        ),
    )


def _multi_value(rng: np.random.Generator, lexicon: Lexicon, size: int) -> Sample:
    """Numbered values of one key, one sentence each; all of them are asked for at once."""
    if size > len(PLACES):
        raise BadInput(f"a key has at most {len(PLACES)} values, {size} are wanted")
    (key,), values = draw(rng, lexicon.keys, 1), lexicon.values(rng, size)
    facts = [
        TICKET.format(key=key, place=place, value=value)
        for place, value in zip(PLACES, values, strict=False)
    ]
    first, *others = (fact.removesuffix(" .").removeprefix(f" {key} drew") for fact in facts)
    question = f" {key} drew{first.removesuffix(f' {values[0]}')}"
    return Sample(tuple(facts), (Exchange(question, (f" {values[0]}", *others)),))


def _variable_tracking(rng: np.random.Generator, lexicon: Lexicon, size: int) -> Sample:
    """Two numbers, each handed through `size` keys; the way of one of them, from hand to hand."""
    names, values = draw(rng, lexicon.keys, 2 * size), lexicon.values(rng, 2)
    chains = [[f"Number {value}", *names[i::2]] for i, value in enumerate(values)]
    steps = [[PASSED.format(holder=a, key=b) for a, b in pairwise(chain)] for chain in chains]
    turns = rng.permutation([0] * size + [1] * size)
    return Sample(
        tuple(steps[turn].pop(0) for turn in turns),
        tuple(
            Exchange(
                f" {number} passes to",
                (f" {first}", *(f" passes to {key}" for key in others)),
            )
            for number, first, *others in chains
        ),
    )


def _kv_recall(rng: np.random.Generator, lexicon: Lexicon, size: int) -> Sample:
    """A table of keys and values in one place."""
    keys, values = draw(rng, lexicon.keys, size), lexicon.values(rng, size)
    table = " ;".join(f" {key} {value}" for key, value in zip(keys, values, strict=True))
    order = rng.permutation(size)
    return Sample(
        (f" Table :{table} .",),
        tuple(Exchange(f" In the table : {keys[i]}", (f" {values[i]}",)) for i in order),
    )


def _common_words(rng: np.random.Generator, lexicon: Lexicon, size: int) -> Sample:
    """A list of words in which one comes `size` times and the others once or twice."""
    common, *others = draw(rng, lexicon.words, size + 1)
    words = [common] * size + others + others[: size // 2]
    shown = " ".join(words[i] for i in rng.permutation(len(words)))
    return Sample((f" Words : {shown} .",), (Exchange(" The most common word :", (f" {common}",)),))


RULES: tuple[Callable[[str, str, str], tuple[str, ...]], ...] = (
    lambda before, word, after: (before, word),
    lambda before, word, after: (word, after),
    lambda before, word, after: (before, word, after),
)


def _few_shot(rng: np.random.Generator, lexicon: Lexicon, size: int) -> Sample:
    """`size` examples of what one rule puts around a word, then a word that was not among them."""
    rule = RULES[rng.integers(len(RULES))]
    before, after, *words, asked = draw(rng, lexicon.words, size + 3)
    shots = " ;".join(f" {word} gives {' '.join(rule(before, word, after))}" for word in words)
    answers = tuple(f" {word}" for word in rule(before, asked, after))
    return Sample((f" Rule :{shots} .",), (Exchange(f" Rule : {asked} gives", answers),))


def _copying(rng: np.random.Generator, lexicon: Lexicon, size: int) -> Sample:
    """A passage of `size` words, to be gone on with from its first words to its end."""
    words = draw(rng, lexicon.words, size)
    begun = min(3, size - 1)
    question = " ".join(["", "Passage", ":", *words[:begun]])
    return Sample(
        (f" Passage : {' '.join(words)} .",),
        (Exchange(question, tuple(f" {word}" for word in words[begun:])),),
    )


KINDS: Registry[Kind] = Registry(
    "task kind",
    [
        ("needle", Kind(_stated, 1, "facts")),
        ("multi-key", Kind(_stated, 4, "facts")),
        ("multi-query", Kind(_stated, 4, "facts", asks_all=True)),
        ("multi-value", Kind(_multi_value, 3, "values", ordered=True)),
        ("variable-tracking", Kind(_variable_tracking, 3, "names a chain", ordered=True)),
        ("kv-recall", Kind(_kv_recall, 16, "pairs")),
        ("common-words", Kind(_common_words, 10, "other words")),
        ("few-shot", Kind(_few_shot, 6, "examples")),
        ("copying", Kind(_copying, 10, "words")),
    ],
)
