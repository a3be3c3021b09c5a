"""What the models read: text, repeated segments, and the task suite, dense or hidden in text.

Every sequence comes from its own seed, so a resumed run reads what an uninterrupted one reads.
The tasks are those of `kvprism eval ruler` with other keys, words, numbers and seeds.
"""

import collections
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvprism.evaluate.haystack import NEW_LINE
from kvprism.evaluate.lexicon import HELD_OUT_WORDINGS, KEYS, WORDINGS, WORDS, Lexicon
from kvprism.evaluate.tasks import KINDS, Exchange, Sample
from kvprism.evaluate.texts import Ids

Encode = Callable[[str], list[int]]
NO_TASK = -1
TASKS = tuple(KINDS)

# What dense sequences may ask again: short answers, whose copying is worth an exercise.
ASKED_AGAIN = ("needle", "multi-key", "multi-query")

# As many facts are said in made-up words as in real wordings: the key counts, not the phrase.
MADE_WORDINGS = 2000

# Numbers and names of a fact cannot be foreseen; its other words are read lightly.
FACT_WEIGHT = 0.1
LIGHT, FULL = 0.3, 1.0


class Range(NamedTuple):
    """Sizes that a kind is trained at; tokens: what one unit of size takes, asked once."""

    fewest: int
    most: int
    tokens: int


SIZES = {
    "needle": Range(1, 1, 34),
    "multi-key": Range(2, 8, 34),
    "multi-query": Range(2, 6, 34),
    "multi-value": Range(2, 4, 36),
    "variable-tracking": Range(1, 4, 50),
    "kv-recall": Range(2, 32, 16),
    "common-words": Range(3, 14, 9),
    "few-shot": Range(2, 9, 14),
    "copying": Range(4, 16, 6),
}


class Tokens(NamedTuple):
    """ids, loss weights, and which task's answer a token is (`NO_TASK`): all `[token]`."""

    ids: Ids
    weights: NDArray[np.float32]
    task: NDArray[np.int8]

    @classmethod
    def of(cls, ids: Iterable[int], weight: float, task: int = NO_TASK) -> "Tokens":
        array = np.asarray(list(ids) if not isinstance(ids, np.ndarray) else ids, np.int64)
        return cls(
            array,
            np.full(len(array), weight, np.float32),
            np.full(len(array), task, np.int8),
        )

    @classmethod
    def join(cls, parts: Sequence["Tokens"]) -> "Tokens":
        return cls(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def cut(self, length: int) -> "Tokens":
        return Tokens(self.ids[:length], self.weights[:length], self.task[:length])


class Batch(NamedTuple):
    """`[sequence, token]` each; kinds: `[sequence]`."""

    inputs: Ids
    targets: Ids
    weights: NDArray[np.float32]
    task: NDArray[np.int8]
    kinds: tuple[str, ...]


def training_lexicon(text: str) -> Lexicon:
    """Names and words of `text`, without those that the evaluation asks for."""
    counts = collections.Counter(text.split())
    asked = {*KEYS, *WORDS}

    def frequent(pattern: str, fewest: int) -> list[str]:
        found = [w for w, n in counts.most_common() if n >= fewest and re.fullmatch(pattern, w)]
        return [word for word in found if word not in asked]

    assert not set(WORDINGS) & set(HELD_OUT_WORDINGS)
    # Rare words too: frequent ones are one or two tokens, those of the evaluation three or four.
    words = frequent("[a-z]{3,9}", 3)[:12000]
    made = made_wordings(frequent("[a-z]{3,9}", 20)[:3000])
    return Lexicon(
        tuple(frequent("[A-Z][a-z]{2,10}", 3)[:9000]),
        tuple(words),
        (*made, *WORDINGS * (len(made) // len(WORDINGS))),
        evaluation=False,
    )


def made_wordings(words: Sequence[str]) -> list[str]:
    """Sentences of random `words` around a key and its value; the same ones for the same words."""
    rng = np.random.default_rng(0)

    def wording() -> str:
        before, between = (
            [words[i] for i in rng.integers(len(words), size=rng.integers(*bounds))]
            for bounds in ((0, 4), (1, 5))
        )
        return " ".join(["", *before, "{key}", *between, "{value} ."])

    return [wording() for _ in range(MADE_WORDINGS)]


@dataclass(frozen=True, eq=False)
class Sampler:
    """Draws sequences.

    text_ids: int64 `[token]`, the training text; encode: text -> ids; bos: the first token of every
    sequence; vocabulary: how many ids there are, the first four special and the next 256 bytes.
    """

    text_ids: Ids
    encode: Encode
    lexicon: Lexicon
    bos: int
    vocabulary: int

    def batch(
        self,
        seed: Sequence[int],
        length: int,
        count: int,
        mixture: dict[str, float],
        tasks: dict[str, float],
        text_length: int | None = None,
    ) -> Batch:
        """`count` sequences of `length` inputs and as many targets.

        text_length: where only text is drawn, as many sequences of about this length instead.
        """
        rng = np.random.default_rng(list(seed))
        kinds = tuple(str(_choose(rng, mixture)) for _ in range(count))
        if text_length is not None and set(kinds) == {"text"}:
            windows = max(1, length // text_length)
            kinds, length = kinds * windows, length // windows
        drawn = [self.sequence(rng, kind, length + 1, tasks) for kind in kinds]
        ids, weights, task = (np.stack(column) for column in zip(*drawn, strict=True))
        return Batch(ids[:, :-1], ids[:, 1:], weights[:, 1:], task[:, 1:], kinds)

    def sequence(
        self, rng: np.random.Generator, kind: str, length: int, tasks: dict[str, float]
    ) -> Tokens:
        """`length` tokens of one kind: text, echo, copy, dense or hidden."""
        body = {
            "text": lambda: Tokens.of(self._window(rng, length), FULL),
            "echo": lambda: self._echo(rng, length),
            "copy": lambda: self._copy(rng, length),
            "dense": lambda: self._dense(rng, length, tasks),
            "hidden": lambda: self._hidden(rng, length, tasks),
        }[kind]()
        return Tokens.join([Tokens.of([self.bos], 0), body]).cut(length)

    def _window(self, rng: np.random.Generator, length: int) -> Ids:
        start = int(rng.integers(len(self.text_ids) - length + 1))
        return self.text_ids[start : start + length]

    def _echo(self, rng: np.random.Generator, length: int) -> Tokens:
        """Random triples `a b a`, read at their last token alone: looking one token back pays.

        Induction needs a head that does so, and text alone is slow to grow one.
        """
        pairs = rng.integers(4, self._alphabet(rng), (length // 3 + 1, 2))
        triples = Tokens.of(np.column_stack([pairs, pairs[:, 0]]).ravel(), 0)
        triples.weights[2::3] = FULL
        return triples

    def _copy(self, rng: np.random.Generator, length: int) -> Tokens:
        """Segments said several times over; what a first time cannot foretell has no weight."""
        parts: list[Tokens] = []
        while sum(len(part.ids) for part in parts) < length:
            size = int(np.exp(rng.uniform(np.log(3), np.log(length // 3))))
            is_text = rng.random() < 0.35
            segment = self._window(rng, size) if is_text else self._random_ids(rng, size)
            parts.append(Tokens.of(segment, FULL if is_text else 0))
            parts += [Tokens.of(segment, FULL)] * int(rng.integers(1, 8))
        return Tokens.join(parts)

    def _alphabet(self, rng: np.random.Generator) -> int:
        """Mostly the 256 bytes: what few tokens teach, all tokens then have."""
        return 260 if rng.random() < 0.6 else self.vocabulary

    def _random_ids(self, rng: np.random.Generator, size: int) -> Ids:
        # Tokens that return within a segment: more than one must be matched.
        most = self._alphabet(rng)
        if rng.random() < 0.54:
            return rng.integers(4, most, size)
        return rng.choice(rng.integers(4, most, max(4, int(0.6 * size) + 2)), size)

    def _dense(self, rng: np.random.Generator, length: int, tasks: dict[str, float]) -> Tokens:
        """Facts and their questions at once, sample after sample."""
        parts: list[Tokens] = []
        while sum(len(part.ids) for part in parts) < length:
            kind = _choose(rng, tasks)
            sample = self._sample(rng, kind, length)
            parts += [self._fact(fact) for fact in sample.facts]
            for _ in range(int(rng.integers(1, 4)) if kind in ASKED_AGAIN else 1):
                for i in rng.permutation(len(sample.exchanges)):
                    parts.append(self._exchange(sample.exchanges[i], kind))
        return Tokens.join(parts)

    def _hidden(self, rng: np.random.Generator, length: int, tasks: dict[str, float]) -> Tokens:
        """Facts in text, asked for later in it or after it."""
        inserted: list[tuple[float, Tokens]] = []
        available = {kind: share for kind, share in tasks.items() if share}
        for _ in range(int(rng.integers(1, 2 + min(5, length // 256)))):
            kind = _choose(rng, available)
            available = {k: s for k, s in available.items() if k != kind} or available
            room = length // 2 - sum(len(part.ids) for _, part in inserted)
            if room > SIZES[kind].fewest * SIZES[kind].tokens or not inserted:
                inserted += self._placed(rng, kind, room)
        return self._among_text(rng, length, _weigh_answers(inserted, length))

    def _placed(self, rng: np.random.Generator, kind: str, room: int) -> list[tuple[float, Tokens]]:
        """Facts and exchanges with the places, 0 to 1, at which they stand in the text."""
        sample = self._sample(rng, kind, room)
        last = rng.random() ** 0.5
        places = np.sort(rng.random(len(sample.facts))) * last
        facts = [(float(p), self._fact(f)) for p, f in zip(places, sample.facts, strict=True)]
        exchanges = []
        for i in rng.permutation(len(sample.exchanges))[:6]:
            place = 1.0 if rng.random() < 0.5 else float(rng.uniform(places.max(), 1))
            exchanges.append((place, self._exchange(sample.exchanges[i], kind)))
        return facts + exchanges

    def _among_text(
        self, rng: np.random.Generator, length: int, inserted: list[tuple[float, Tokens]]
    ) -> Tokens:
        line = Tokens.of(self.encode(NEW_LINE), 0)
        taken = 1 + len(line.ids) + sum(len(part.ids) for _, part in inserted)
        text = self._window(rng, max(32, length - taken))
        ends = np.append(np.flatnonzero(text == self._stop) + 1, len(text))
        parts, last = [], 0
        for place, part in sorted(inserted, key=lambda item: item[0]):
            stop = len(text) if place == 1 else int(ends[np.searchsorted(ends, place * len(text))])
            if last < stop:
                parts.append(Tokens.of(text[last:stop], FULL))
                if stop == len(text):
                    parts.append(line)
            parts.append(part)
            last = stop
        return Tokens.join(
            [*parts, Tokens.of(text[last:], FULL), Tokens.of(self._window(rng, 64), FULL)]
        )

    def _sample(self, rng: np.random.Generator, kind: str, room: int) -> Sample:
        fewest, most, tokens = SIZES[kind]
        most = max(fewest, min(most, room // tokens))
        size = round(float(np.exp(rng.uniform(np.log(fewest), np.log(most)))))
        return KINDS[kind].sample(rng, self.lexicon, size)

    def _fact(self, text: str) -> Tokens:
        ids = np.array(self.encode(text), np.int64)
        fact = Tokens.of(ids, FACT_WEIGHT)
        fact.weights[np.isin(ids, self._digits)] = 0
        return fact

    @cached_property
    def _stop(self) -> int:
        return self.encode(" .")[-1]

    @cached_property
    def _space(self) -> int:
        """What a number after a space begins with."""
        return self.encode(" 0")[0]

    @cached_property
    def _digits(self) -> list[int]:
        return [self.encode(str(digit))[0] for digit in range(10)]

    def _exchange(self, exchange: Exchange, kind: str) -> Tokens:
        question = self.encode(exchange.question)
        whole = self.encode(exchange.question + "".join(exchange.answers))
        # Where a space before a number is a token of its own, it is still part of the question.
        if self.encode(exchange.answers[0])[0] == self._space:
            question = whole[: len(question) + 1]
        return Tokens.join(
            [
                Tokens.of(question, LIGHT),
                Tokens.of(whole[len(question) :], FULL, TASKS.index(kind)),
                Tokens.of(self.encode(" ."), LIGHT),
            ]
        )


def _weigh_answers(inserted: list[tuple[float, Tokens]], length: int) -> list[tuple[float, Tokens]]:
    """Few answers in a long text must not drown in it."""
    answers = sum(int((part.task != NO_TASK).sum()) for _, part in inserted)
    weight = float(np.clip(0.3 * length / answers, 1, 10))
    for _, part in inserted:
        part.weights[part.task != NO_TASK] = weight
    return inserted


def _choose(rng: np.random.Generator, shares: dict[str, float]) -> str:
    names, weights = list(shares), np.array(list(shares.values()))
    return names[rng.choice(len(names), p=weights / weights.sum())]
