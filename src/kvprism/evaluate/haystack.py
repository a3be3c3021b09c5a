"""Facts in a haystack: the project's own text, from a seeded generator. No torch here.

The filler is plain statements in the manner of tokenised WikiText (a space around every mark),
built from a small grammar with invented places and people. Keys and values are the evaluation's
(`lexicon`), so that an answer can only come from the context.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from kvprism.errors import BadInput
from kvprism.evaluate.lexicon import EVALUATION, KEYS, WORDINGS, draw
from kvprism.evaluate.texts import Ids, encode

NEW_LINE = " \n"

_WORDS = {
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
    template: str = WORDINGS[0],
) -> NeedleCase:
    """Hide one needle at `depth` and `distractors` like it, with other keys, at random places.

    The question is a new paragraph with the needle's own words.

    Raises:
        BadInput: as `hide` and `ask`, too many distractors, or a template without key and value.
    """
    _check(distractors, template)
    rng = np.random.default_rng(seed)
    keys = draw(rng, KEYS, distractors + 1)
    values = EVALUATION.values(rng, distractors + 1)
    needles = [template.format(key=k, value=v) for k, v in zip(keys, values, strict=True)]
    depths = [depth, *rng.random(distractors)]
    context = hide(tokenizer, length, needles, depths, rng, haystack_ids).context_ids
    asked = ask(tokenizer, NEW_LINE + _asked(template, keys[0]), (values[0],))
    first = asked.answers[0].start
    return NeedleCase(context, asked.ids[:first], asked.ids[first:], depth, keys[0], values[0])


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
    keys, values = draw(rng, KEYS, n_facts), EVALUATION.values(rng, n_facts)
    lines = [WORDINGS[0].format(key=k, value=v) for k, v in zip(keys, values, strict=True)]
    depths = [(i + 0.5) / n_facts for i in range(n_facts)]
    hidden = hide(tokenizer, length, lines, depths, rng)
    facts = []
    for key, value, line, span in zip(keys, values, lines, hidden.facts, strict=True):
        text = _asked(WORDINGS[0], key)
        asked = ask(tokenizer, NEW_LINE + text, (value,))
        question = asked.ids[: asked.answers[0].start]
        place = (span.start, span.stop)
        facts.append(Fact(key, value, line.strip(), *place, text.strip(), question))
    return Facts(hidden.context_ids, tuple(facts))


@dataclass(frozen=True, eq=False)
class Hidden:
    """A context of which the tokens of every slice in `facts` say that fact, in the order given."""

    context_ids: Ids
    facts: tuple[slice, ...]


def hide(
    tokenizer: Any,
    length: int,
    facts: Sequence[str],
    depths: Sequence[float],
    rng: np.random.Generator,
    haystack_ids: Ids | None = None,
) -> Hidden:
    """Exactly `length` tokens with every fact at the sentence end that is nearest to its depth.

    depths: 0 = start, 1 = end; facts of one place keep their order. The begin-of-text token comes
    first; the filler is generated, or a random window of `haystack_ids`.

    Raises:
        BadInput: too short a length or haystack, or a depth outside [0, 1].
    """
    if not all(0 <= depth <= 1 for depth in depths):
        raise BadInput(f"depth must be in [0, 1], got {list(depths)}")
    said = [encode(tokenizer, fact) for fact in facts]
    bos = _bos(tokenizer)
    filler = _filler(tokenizer, _room(length, bos, said), rng, haystack_ids)
    ends = _sentence_ends(tokenizer, filler)
    places = [int(ends[np.abs(ends - depth * len(filler)).argmin()]) for depth in depths]
    order = sorted(range(len(said)), key=places.__getitem__)
    pieces = np.split(filler, [places[i] for i in order])
    parts = [bos, pieces[0]]
    for i, piece in zip(order, pieces[1:], strict=True):
        parts += [said[i], piece]
    bounds = np.cumsum([len(part) for part in parts]).tolist()
    spans = [slice(*pair) for pair in pairwise(bounds)][1::2]
    return Hidden(np.concatenate(parts), tuple(spans[order.index(i)] for i in range(len(said))))


@dataclass(frozen=True, eq=False)
class Asked:
    """A question with its answers, as tokens; answers: where in `ids` each of them stands."""

    ids: Ids
    answers: tuple[slice, ...]


def ask(tokenizer: Any, question: str, answers: Sequence[str]) -> Asked:
    """Question and answers as they stand in one tokenisation of all of them.

    Tokenizers differ in what they do with a space before a number: where it is a token of its own,
    it belongs to the question, and between two answers to the second.

    Raises:
        BadInput: a tokenizer that merges an answer with what comes before it.
    """
    ids = encode(tokenizer, question + "".join(answers))
    # Stripped: some tokenizers decode no space at the start.
    rests = [str(tokenizer.decode(ids[i:].tolist())).strip() for i in range(len(ids))]
    starts = []
    for number in range(len(answers)):
        rest = "".join(answers[number:]).strip()
        places = [i for i, found in enumerate(rests) if found == rest]
        if not places:
            raise BadInput(
                f"this tokenizer merges the answer {answers[number]!r} with what comes before it "
                f"in {question + ''.join(answers)!r}; choose other words"
            )
        starts.append(places[0] if number else places[-1])
    return Asked(ids, tuple(slice(*pair) for pair in pairwise([*starts, len(ids)])))


def _check(distractors: int, template: str) -> None:
    if not 0 <= distractors < len(KEYS):
        raise BadInput(f"distractors must be 0 to {len(KEYS) - 1}, got {distractors}")
    if not 0 <= template.find("{key}") < template.find("{value}"):
        raise BadInput(f"a needle template needs {{key}} and then {{value}}, got {template!r}")


def _bos(tokenizer: Any) -> Ids:
    return np.array([] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id], np.int64)


def _room(length: int, bos: Ids, facts: Sequence[Ids]) -> int:
    """Tokens left for filler."""
    n_filler = length - len(bos) - sum(len(fact) for fact in facts)
    if n_filler < 1:
        raise BadInput(
            f"length {length} holds no text beside {len(facts)} needles; at least "
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


def _sentence_ends(tokenizer: Any, ids: Ids) -> Ids:
    """Places after a full stop, and both ends of the text; ascending."""
    present = np.unique(ids)
    stops = [
        token for token in present if tokenizer.decode([int(token)]).rstrip()[-1:] in (*".!?",)
    ]
    after = np.flatnonzero(np.isin(ids, stops)) + 1
    return np.unique(np.concatenate([[0], after, [len(ids)]])).astype(np.int64)


def _asked(template: str, key: str) -> str:
    return template[: template.index("{value}")].format(key=key)


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
