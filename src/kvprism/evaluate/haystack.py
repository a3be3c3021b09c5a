"""Needles in a haystack: the project's own text, from a seeded generator. No torch here.

The filler is plain statements in the manner of tokenised WikiText (a space around every mark),
built from a small grammar with invented places and people. The keys are cities that the built-in
models never saw as keys, the values five random digits, so that an answer can only come from the
context.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvprism.errors import BadInput

Ids = NDArray[np.int64]

TEMPLATES = (
    " The secret number of {key} is {value} .",
    " The magic code for {key} is {value} .",
    " {key} has the access key {value} .",
)
VALUE_DIGITS = 5

_WORDS = {
    "key": """Lisbon Madrid Vienna Oslo Helsinki Dublin Warsaw Athens Cairo Nairobi Lagos Accra
        Tunis Lima Quito Bogota Havana Caracas Santiago Denver Boston Seattle Dallas Houston
        Phoenix Atlanta Chicago Toronto Montreal Vancouver Sydney Perth Delhi Mumbai Karachi Dhaka
        Bangkok Hanoi Manila Jakarta Seoul Tokyo Osaka Kyoto Beijing Shanghai Moscow Kiev Minsk
        Riga Prague Berlin Munich Hamburg Zurich Geneva Milan Naples Venice Turin""",
    "place": """Harwick Ellerton Brenford Coldmere Ashby Thornley Marlow Westholm Dunmore Kirkwall
        Stanfield Oakhaven Redcliff Larkhill Penrose Greywater Millbrook Fairmont Langdale Norwood
        Silverton Hartwell Eastcombe Wexmoor Rosedale Blackmoor Caldwell Winslow Haverly
        Stonebridge""",
    "surname": """Ashcroft Barlow Carver Dalton Easton Fletcher Garner Holloway Ingram Jarvis Keller
        Lambert Mercer Norton Osborne Prescott Quinn Ramsey Sutton Thorne Underwood Vance Whitaker
        Yates Abbott Bradford Compton Drake Ellison Farrell""",
    "given": """Alice Arthur Clara Daniel Edith Edward Eleanor Frank George Grace Harold Helen Henry
        James Jane John Laura Martha Mary Peter Robert Ruth Samuel Sarah Thomas Walter William""",
    "building": """church castle bridge station tower museum library hospital theatre factory mill
        school chapel palace market prison harbour lighthouse observatory stadium hotel
        monastery""",
    "buildings": "churches castles bridges towers museums factories mills schools chapels hotels",
    "group": """army company council club orchestra party college society band team government
        parish regiment crew committee association community railway""",
    "animal": """owl fox eagle salmon bear deer frog turtle whale bat hawk lizard otter spider
        beetle heron wolf seal crab trout""",
    "animals": "owls foxes eagles bears frogs turtles whales bats hawks lizards otters seals crabs",
    "plant": "grass moss oak pine fern willow berries seeds roots leaves flowers bark reeds",
    "work": """novel song album film book poem play painting symphony opera magazine essay episode
        report sculpture documentary""",
    "person": """governor painter engineer singer bishop historian captain writer teacher lawyer
        architect merchant actor general composer farmer scientist critic""",
    "adjective": """small large early late modern old northern southern western eastern royal public
        private famous rare common heavy light long short broad narrow simple formal local national
        popular successful damaged strong quiet""",
    "colour": "red white black grey green blue brown yellow golden pale dark silver",
    "material": "stone timber brick iron marble steel limestone granite slate copper clay glass",
    "verb": """described praised rejected supported criticised observed recorded visited restored
        acquired abandoned expanded defended examined completed designed""",
    "built": "built opened closed rebuilt founded destroyed sold moved repaired enlarged renamed",
    "month": """January February March April May June July August September October November
        December""",
    "season": "spring summer autumn winter",
    "count": "two three four five six seven eight nine ten twelve twenty thirty forty",
    "unit": "miles metres feet acres years weeks months days hours",
    "region": "valley coast river forest island county district province lake mountain plain",
    "abstract": """trade design music language religion education history politics science farming
        fishing defence travel art industry navigation""",
    "adverb": "quickly slowly often rarely widely largely gradually finally briefly partly",
}
_PHRASES = {
    "reason": """the war;a fire;a flood;the storm;a dispute;a strike;the election;bad weather;
        the plague;new laws;poor harvests""",
}
_SENTENCES = (
    " The {building} of {place} was {built} in {year} by the {person} {given} {surname} .",
    " {surname} was born in {place} in {year} , the son of a {adjective} {person} .",
    " In {month} {year} , the {group} moved from {place} to {place} because of {reason} .",
    " The {animal} lives in the {region} near {place} and feeds on {plant} and {plant} .",
    " Its back is {colour} and {colour} , while the wings are {adjective} and {colour} .",
    " {given} {surname} wrote a {work} about the {region} , which the {person} {verb} .",
    ' The {work} was {verb} by {surname} as " a {adjective} and {adjective} {work} " .',
    " A {building} made of {material} and {material} stood there until {year} .",
    " After {reason} , the {group} was {adverb} {built} by {surname} .",
    " The {region} is {count} {unit} from {place} and has a {adjective} {building} .",
    " Most of the people there work in {abstract} , {abstract} and {abstract} .",
    " In the {season} of {year} , {count} {animals} were seen on the {adjective} {region} .",
    " The {adjective} {region} lies between {place} and the {region} of {place} .",
    " {surname} studied {abstract} at {place} and later taught {abstract} for {count} years .",
    " The {person} {verb} the {adjective} {building} , but the {group} did not agree .",
    " By {year} the {group} had more than {count} hundred members , many of them from {place} .",
    " It was the {adjective} {work} of {given} {surname} , and it was {adverb} {verb} .",
    " The roof of the {building} is of {material} , and its doors are {colour} .",
    " The road from {place} to {place} follows the {region} for {count} {unit} .",
    " Although the {building} was {adjective} , it was {adverb} {built} after {reason} .",
    " In {year} , {surname} became the {adjective} {person} of the {group} .",
    " The {plant} of the {region} is {colour} in the {season} and {colour} in the {season} .",
    " The {group} and the {group} met at the {building} in {place} on {day} {month} {year} .",
    " Young {animals} leave the nest after {count} {unit} and eat {plant} .",
    " {place} is known for its {abstract} and for the {adjective} {building} of {surname} .",
    " Critics {verb} the {work} ; {surname} called it {adjective} , {adjective} and {adjective} .",
    " The {person} died in {place} in {month} {year} and was buried near the {building} .",
    " During {reason} , the {building} served as a {building} for the {group} .",
    " There are {count} {adjective} {buildings} in {place} , all of them of {colour} {material} .",
    " {surname} {adverb} {verb} the {group} , and {given} {surname} took over in {year} .",
)
_LISTS = {slot: words.split() for slot, words in _WORDS.items()} | {
    slot: [" ".join(phrase.split()) for phrase in phrases.split(";")]
    for slot, phrases in _PHRASES.items()
}
KEYS = tuple(_LISTS["key"])
_FIRST_YEAR, _LAST_YEAR = 1702, 2009
_FRESH_PARAGRAPH = 0.12


@dataclass(frozen=True, eq=False)
class NeedleCase:
    """One question on one context.

    context_ids: int64 `[length]`, begin-of-text token included; question_ids: the question up to
    the answer; answer_ids: the tokens that hold the value's digits; depth: the wanted place of the
    needle, 0 = start, 1 = end; key, value: what was hidden.
    """

    context_ids: Ids
    question_ids: Ids
    answer_ids: Ids
    depth: float
    key: str
    value: str


def sentences(rng: np.random.Generator, count: int) -> str:
    """`count` filler statements; free of the needle keys and of five-digit numbers."""
    text = []
    for template in rng.integers(len(_SENTENCES), size=count):
        start = " \n" if rng.random() < _FRESH_PARAGRAPH else ""
        text.append(start + _fill(_SENTENCES[template], rng))
    return "".join(text)


def generated_ids(tokenizer: Any, n_tokens: int, rng: np.random.Generator) -> Ids:
    """At least `n_tokens` tokens of filler."""
    parts = [np.empty(0, np.int64)]
    while sum(len(part) for part in parts) < n_tokens:
        parts.append(encode(tokenizer, sentences(rng, 64)))
    return np.concatenate(parts)


def needle_case(
    tokenizer: Any,
    length: int,
    depth: float,
    distractors: int = 0,
    seed: int | Sequence[int] = 0,
    haystack_ids: Ids | None = None,
    template: str = TEMPLATES[0],
) -> NeedleCase:
    """Hide one needle at `depth` and `distractors` like it, with other keys, at random places.

    Needles stand at the ends of sentences; the filler comes from the generator, or from a random
    window of `haystack_ids`. The question is a new paragraph with the needle's own words.

    Raises:
        BadInput: too short a length or haystack, a depth outside [0, 1], too many distractors, a
            template without key and value, or a tokenizer that merges the value with its question.
    """
    _check(depth, distractors, template)
    rng = np.random.default_rng(seed)
    keys = [KEYS[i] for i in rng.permutation(len(KEYS))[: distractors + 1]]
    values = ["".join(str(digit) for digit in rng.integers(10, size=VALUE_DIGITS)) for _ in keys]
    needles = [
        encode(tokenizer, template.format(key=key, value=value))
        for key, value in zip(keys, values, strict=True)
    ]
    bos = _bos(tokenizer)
    filler = _filler(tokenizer, _room(length, bos, needles), rng, haystack_ids)
    depths = [depth, *rng.random(distractors)]
    context = np.concatenate([bos, *_hide(tokenizer, filler, needles, depths)])
    question, answer = _question(tokenizer, template, keys[0], values[0])
    return NeedleCase(context, question, answer, depth, keys[0], values[0])


@dataclass(frozen=True, eq=False)
class Fact:
    """One hidden fact: tokens `[start, stop)` of the context say `line`."""

    key: str
    value: str
    line: str
    start: int
    stop: int
    question: str
    question_ids: Ids


@dataclass(frozen=True, eq=False)
class Facts:
    """A long text with several facts in it, each of which can be asked for."""

    context_ids: Ids
    needles: tuple[Fact, ...]


def hide_facts(tokenizer: Any, length: int, n_facts: int, seed: int = 0) -> Facts:
    """`n_facts` facts spread evenly over `length` tokens of generated text.

    Raises:
        BadInput: too short a length, or more facts than there are keys.
    """
    if not 1 <= n_facts <= len(KEYS):
        raise BadInput(f"facts must be 1 to {len(KEYS)}, got {n_facts}")
    rng = np.random.default_rng(seed)
    keys = [KEYS[i] for i in rng.permutation(len(KEYS))[:n_facts]]
    values = ["".join(str(digit) for digit in rng.integers(10, size=VALUE_DIGITS)) for _ in keys]
    lines = [TEMPLATES[0].format(key=k, value=v) for k, v in zip(keys, values, strict=True)]
    needles = [encode(tokenizer, line) for line in lines]
    bos = _bos(tokenizer)
    filler = _filler(tokenizer, _room(length, bos, needles), rng, None)
    depths = [(i + 0.5) / n_facts for i in range(n_facts)]
    parts = [bos, *_hide(tokenizer, filler, needles, depths)]
    starts = np.cumsum([0, *(len(part) for part in parts)])[2:-1:2]
    facts = []
    for key, value, line, ids, start in zip(keys, values, lines, needles, starts, strict=True):
        asked, question = _asked(TEMPLATES[0], key), _question(tokenizer, TEMPLATES[0], key, value)
        span = int(start), int(start) + len(ids)
        facts.append(Fact(key, value, line.strip(), *span, asked.strip(), question[0]))
    return Facts(np.concatenate(parts), tuple(facts))


def encode(tokenizer: Any, text: str) -> Ids:
    """Token ids without special tokens."""
    # Not verbose: it is no mistake that a whole text is longer than the model's context.
    ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    return np.array(ids, np.int64)


def _check(depth: float, distractors: int, template: str) -> None:
    if not 0 <= depth <= 1:
        raise BadInput(f"depth must be in [0, 1], got {depth}")
    if not 0 <= distractors < len(KEYS):
        raise BadInput(f"distractors must be 0 to {len(KEYS) - 1}, got {distractors}")
    if not 0 <= template.find("{key}") < template.find("{value}"):
        raise BadInput(f"a needle template needs {{key}} and then {{value}}, got {template!r}")


def _bos(tokenizer: Any) -> Ids:
    return np.array([] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id], np.int64)


def _room(length: int, bos: Ids, needles: Sequence[Ids]) -> int:
    """Tokens left for filler."""
    n_filler = length - len(bos) - sum(len(needle) for needle in needles)
    if n_filler < 1:
        raise BadInput(
            f"length {length} holds no text beside {len(needles)} needles; at least "
            f"{length - n_filler + 1} tokens are needed"
        )
    return n_filler


def _filler(
    tokenizer: Any, n_tokens: int, rng: np.random.Generator, haystack_ids: Ids | None
) -> Ids:
    if haystack_ids is None:
        return generated_ids(tokenizer, n_tokens, rng)[:n_tokens]
    if len(haystack_ids) < n_tokens:
        raise BadInput(
            f"the haystack has {len(haystack_ids)} tokens, {n_tokens} are needed; give a longer "
            "text or a smaller length"
        )
    start = int(rng.integers(len(haystack_ids) - n_tokens + 1))
    return haystack_ids[start : start + n_tokens]


def _hide(
    tokenizer: Any, filler: Ids, needles: Sequence[Ids], depths: Sequence[float]
) -> list[Ids]:
    """The filler with every needle at the sentence end that is nearest to its depth."""
    ends = _sentence_ends(tokenizer, filler)
    places = [int(ends[np.abs(ends - depth * len(filler)).argmin()]) for depth in depths]
    parts, last = [], 0
    for place, needle in sorted(zip(places, range(len(needles)), strict=True)):
        parts += [filler[last:place], needles[needle]]
        last = place
    return [*parts, filler[last:]]


def _sentence_ends(tokenizer: Any, ids: Ids) -> Ids:
    """Places after a full stop, and both ends of the text; ascending."""
    present = np.unique(ids)
    stops = [
        token for token in present if tokenizer.decode([int(token)]).rstrip()[-1:] in (*".!?",)
    ]
    after = np.flatnonzero(np.isin(ids, stops)) + 1
    return np.unique(np.concatenate([[0], after, [len(ids)]])).astype(np.int64)


def _question(tokenizer: Any, template: str, key: str, value: str) -> tuple[Ids, Ids]:
    """Question and answer as they stand in one tokenisation of both.

    Tokenizers differ in what they do with the space before a number: where it is a token of its
    own, it belongs to the question.
    """
    asked = _asked(template, key)
    whole = encode(tokenizer, asked + value)

    def text(start: int) -> str:
        return str(tokenizer.decode(whole[start:].tolist()))

    first = _common_prefix(whole, encode(tokenizer, asked.rstrip()))
    while first < len(whole) - 1 and text(first + 1).strip() == value:
        first += 1
    if text(first).strip() != value:
        raise BadInput(
            f"this tokenizer merges the value with its question: {text(first)!r} for {value!r}; "
            "choose another template"
        )
    return whole[:first], whole[first:]


def _asked(template: str, key: str) -> str:
    return " \n" + template[: template.index("{value}")].format(key=key)


def _common_prefix(a: Ids, b: Ids) -> int:
    n = min(len(a), len(b))
    differs = np.flatnonzero(a[:n] != b[:n])
    return int(differs[0]) if len(differs) else n


def _fill(template: str, rng: np.random.Generator) -> str:
    return template.format_map(_Slots(rng))


class _Slots(dict[str, str]):
    """Each look-up draws a word, so that one template may name the same slot twice."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng

    def __missing__(self, slot: str) -> str:
        if slot == "year":
            return str(self._rng.integers(_FIRST_YEAR, _LAST_YEAR + 1))
        if slot == "day":
            return str(self._rng.integers(1, 29))
        words = _LISTS[slot]
        return words[int(self._rng.integers(len(words)))]
