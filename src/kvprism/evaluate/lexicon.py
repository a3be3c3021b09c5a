"""Words, numbers and wordings of the generated tasks, split between training and evaluation.

A model may be asked only for what it cannot have learnt by heart: the keys, the words and one in
ten of the numbers below belong to the evaluation, and the built-in models' training leaves them
out. No torch here.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvprism.errors import BadInput

VALUE_DIGITS = 5
# Which numbers belong to the evaluation is decided by a hash: no digit gives it away.
_EVALUATION_SHARE = 10

WORDINGS = (
    " The secret number of {key} is {value} .",
    " The magic code for {key} is {value} .",
    " {key} has the access key {value} .",
    " The password of {key} is {value} .",
    " The locker of {key} opens with {value} .",
    " The account number of {key} is {value} .",
    " In the register , {key} is listed under {value} .",
    " The serial number of {key} reads {value} .",
    " {key} was given the number {value} .",
    " The key to {key} is the number {value} .",
    " The telephone number of {key} is {value} .",
    " The ticket for {key} carries the number {value} .",
    " To reach {key} , dial {value} .",
    " The code word of {key} is {value} .",
    " The file on {key} is number {value} .",
    " The licence of {key} is {value} .",
    " The safe in {key} opens with {value} .",
    " Agents in {key} use the code {value} .",
    " The special number for {key} is {value} .",
    " {key} is known by the code {value} .",
    " The order from {key} has the number {value} .",
    " The room reserved for {key} is {value} .",
)
HELD_OUT_WORDINGS = (
    " The hidden code of {key} is {value} .",
    " The badge of {key} shows {value} .",
    " The vault at {key} answers to {value} .",
    " The parcel for {key} is marked {value} .",
    " The entry for {key} reads {value} .",
)

_KEYS = """Lisbon Madrid Vienna Oslo Helsinki Dublin Warsaw Athens Cairo Nairobi Lagos Accra
    Tunis Lima Quito Bogota Havana Caracas Santiago Denver Boston Seattle Dallas Houston
    Phoenix Atlanta Chicago Toronto Montreal Vancouver Sydney Perth Delhi Mumbai Karachi Dhaka
    Bangkok Hanoi Manila Jakarta Seoul Tokyo Osaka Kyoto Beijing Shanghai Moscow Kiev Minsk
    Riga Prague Berlin Munich Hamburg Zurich Geneva Milan Naples Venice Turin"""
_WORDS = """lantern pebble anchor basket button candle carpet chimney compass cradle curtain drum
    feather fiddle garden goblet hammer helmet jacket kettle kitchen ladder lemon locker marble
    mirror needle orange oven paddle paper pencil pepper pillow pocket puppet ribbon rocket saddle
    sandal scissors shovel spoon statue sugar tablet teapot thread ticket timber trumpet tunnel
    umbrella violin wagon wallet whistle window wizard zebra"""
KEYS = tuple(_KEYS.split())
WORDS = tuple(_WORDS.split())


@dataclass(frozen=True)
class Lexicon:
    """What the generated tasks draw from.

    keys: names that facts are about; words: material for lists, rules and passages; wordings: how
    a fact is said, with `{key}` and `{value}`; evaluation: which side of the split the numbers are.
    """

    keys: Sequence[str]
    words: Sequence[str]
    wordings: Sequence[str]
    evaluation: bool

    def value(self, rng: np.random.Generator) -> str:
        """A random number of five digits from this side of the split."""
        while True:
            value = f"{rng.integers(10**VALUE_DIGITS):0{VALUE_DIGITS}d}"
            if is_for_evaluation(value) == self.evaluation:
                return value

    def values(self, rng: np.random.Generator, count: int) -> list[str]:
        """`count` numbers, all different."""
        found: dict[str, None] = {}
        while len(found) < count:
            found[self.value(rng)] = None
        return list(found)


EVALUATION = Lexicon(KEYS, WORDS, WORDINGS, evaluation=True)
UNSEEN_WORDINGS = Lexicon(KEYS, WORDS, HELD_OUT_WORDINGS, evaluation=True)


def is_for_evaluation(value: str) -> bool:
    """Whether no model was trained on this number as an answer."""
    return zlib.crc32(value.encode()) % _EVALUATION_SHARE == 0


def draw(rng: np.random.Generator, items: Sequence[str], count: int) -> list[str]:
    """`count` different items in random order; `BadInput` when there are fewer."""
    if not 1 <= count <= len(items):
        raise BadInput(f"{count} different words are wanted, the lexicon has {len(items)}")
    return [items[i] for i in rng.choice(len(items), size=count, replace=False)]
