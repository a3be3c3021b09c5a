"""The suite: every case is what it claims to be, whatever the tokenizer, and is measured so."""

from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from kvprism.errors import BadInput, UnknownName
from kvprism.evaluate.arms import arms_of
from kvprism.evaluate.lexicon import HELD_OUT_WORDINGS
from kvprism.evaluate.measure import LoadedModel
from kvprism.evaluate.records import collect, load_records
from kvprism.evaluate.ruler import DEPTHS, SUBTASKS, Ruler, RulerCase, RulerId
from kvprism.evaluate.summary import rows_of
from kvprism.evaluate.tasks import KINDS
from kvprism.planning import PlanOptions

RAW = arms_of(["raw"], [])
LENGTH = 700


def text_of(tokenizer: Any, ids: torch.Tensor) -> str:
    return str(tokenizer.decode(ids.tolist()))


@pytest.fixture(scope="module", params=["own", "merging"])
def suite(request: pytest.FixtureRequest, subject: LoadedModel) -> Ruler:
    """With our tokenizer, and with one that joins a space and a number."""
    if request.param == "merging":
        merging = request.getfixturevalue("merging_tokenizer")
        subject = LoadedModel("tiny", subject.model, merging)
    return Ruler(subject, RAW, lengths=(LENGTH,))


@cache
def cases(suite: Ruler, subtask: str) -> list[RulerCase]:
    return [suite.case(RulerId(LENGTH, subtask, number)) for number in range(DEPTHS + 1)]


def test_the_subtasks_are_the_kinds_and_the_wordings_that_nothing_was_trained_on() -> None:
    assert list(SUBTASKS) == [*KINDS, "needle-unseen"]


@pytest.mark.parametrize("subtask", SUBTASKS)
def test_the_context_has_the_length_asked_for_and_every_fact_in_its_place(
    suite: Ruler, subtask: str
) -> None:
    tokenizer = suite.subject.tokenizer
    for made in cases(suite, subtask):
        context = made.case.context
        assert len(context) == LENGTH
        said = [text_of(tokenizer, context[span]) for span in made.facts]
        assert said == list(made.sample.facts)
        starts = [span.start for span in made.facts]
        if SUBTASKS[subtask].kind.ordered:
            assert starts == sorted(starts)


@pytest.mark.parametrize("subtask", SUBTASKS)
def test_questions_and_answers_follow_as_a_new_paragraph(suite: Ruler, subtask: str) -> None:
    tokenizer, kind = suite.subject.tokenizer, SUBTASKS[subtask].kind
    for made in cases(suite, subtask):
        exchanges = made.sample.exchanges if kind.asks_all else made.sample.exchanges[:1]
        asked = " .".join(question + "".join(answers) for question, answers in exchanges)
        assert text_of(tokenizer, made.case.continuation) == f" \n{asked}"
        found = [text_of(tokenizer, made.case.continuation[span]) for span in made.case.answers]
        expected = [answer for _, answers in exchanges for answer in answers]
        assert [answer.strip() for answer in found] == [answer.strip() for answer in expected]
        assert text_of(tokenizer, made.case.question).strip() == exchanges[0].question.strip()
        assert made.case.answers[-1].stop == len(made.case.continuation)


@pytest.mark.parametrize("subtask", ["needle", "multi-query", "kv-recall", "needle-unseen"])
def test_no_number_begins_with_a_space_of_its_own(subject: LoadedModel, subtask: str) -> None:
    suite = Ruler(subject, RAW, lengths=(LENGTH,))
    for made in cases(suite, subtask):
        for span in made.case.answers:
            assert text_of(subject.tokenizer, made.case.continuation[span]).isdigit()


def test_the_first_fact_is_at_its_depth(subject: LoadedModel) -> None:
    suite = Ruler(subject, RAW, lengths=(LENGTH,))
    for subtask in ("needle", "multi-key", "multi-query", "kv-recall"):
        for number, made in enumerate(cases(suite, subtask)):
            filler = LENGTH - sum(span.stop - span.start for span in made.facts)
            first = made.facts[0].start
            before = first - sum(s.stop - s.start for s in made.facts if s.start < first)
            # The nearest sentence end is half a sentence away; a generated one has at most 60.
            assert abs(before / filler - number % DEPTHS / (DEPTHS - 1)) < 60 / filler


def test_unseen_needles_are_said_in_the_wordings_held_out(subject: LoadedModel) -> None:
    suite = Ruler(subject, RAW, lengths=(LENGTH,))
    parts = [wording.replace("{value} .", "").split("{key}") for wording in HELD_OUT_WORDINGS]
    for made in cases(suite, "needle-unseen"):
        [fact] = made.sample.facts
        assert any(fact.startswith(a) and b in fact for a, b in parts)


def test_cases_differ_and_do_not_depend_on_what_else_is_measured(subject: LoadedModel) -> None:
    small = Ruler(subject, RAW, lengths=(300,), subtasks=["copying"], trials=1)
    large = Ruler(subject, RAW, lengths=(400, 300), trials=2, query_aware=True)
    seen = set()
    for number in range(DEPTHS):
        which = RulerId(300, "copying", number)
        ours, theirs = small.case(which).case, large.case(which).case
        assert torch.equal(ours.context, theirs.context)
        assert torch.equal(ours.continuation, theirs.continuation)
        seen.add(tuple(ours.context.tolist()))
    assert len(seen) == DEPTHS
    again = replace(small, seed=1).case(RulerId(300, "copying", 0)).case
    assert tuple(again.context.tolist()) not in seen


def test_documents_are_every_case_once_and_some_of_each_subtask_come_first(
    subject: LoadedModel,
) -> None:
    suite = Ruler(subject, RAW, lengths=(400, 300), trials=2)
    assert len(set(suite.documents)) == len(suite.documents) == 2 * len(SUBTASKS) * 2 * DEPTHS
    assert suite.documents[: len(SUBTASKS)] == [f"400-{name}-0" for name in SUBTASKS]


def test_from_settings_to_rows(subject: LoadedModel, tmp_path: Path) -> None:
    arms = arms_of(["spectrum"], ["0.3"])
    names = ["needle", "multi-value"]
    suite = Ruler(subject, arms, lengths=(200,), subtasks=names, trials=1)
    found = collect(suite, tmp_path / "records")
    assert load_records(tmp_path / "records").records == found.records
    rows = {(r.subtask, r.policy, r.metric): r for r in rows_of(found)}
    assert {key[0] for key in rows} == {*names, "average"}
    needle = rows["needle", "raw", "exact_match"]
    assert (needle.task, needle.length, needle.n, needle.distractors) == ("ruler", 200, 11, None)
    assert needle.value == rows["needle", "raw", "answers_right"].value
    assert needle.value  # nobody guesses five digits
    kl = rows["needle", "spectrum", "kl_mean"].value
    assert kl is not None and kl > 0


def test_what_is_measured_first_or_alone_is_the_same(subject: LoadedModel) -> None:
    """Random orders too."""
    arms = arms_of(["random-drop"], ["0.3"])
    whole = Ruler(subject, arms, lengths=(300,), subtasks=["multi-key", "needle"])
    alone = Ruler(subject, arms, lengths=(300,), subtasks=["needle"], trials=1)
    found = list(islice(whole.records(), 3 * 2 * len(arms)))
    assert [record for record in found if record.cell.subtask == "needle"] == list(
        islice(alone.records(), 3 * len(arms))
    )


def test_a_known_question_makes_another_plan_and_another_run(
    subject: LoadedModel, tmp_path: Path
) -> None:
    arms = arms_of(["spectrum"], ["0.3"])
    blind = Ruler(subject, arms, lengths=(300,), subtasks=["needle"], trials=1)
    aware = replace(blind, query_aware=True)
    for a, b in islice(zip(blind.records(), aware.records(), strict=True), 6):
        assert (a.document, a.arm) == (b.document, b.arm)
        assert (a.outcome == b.outcome) == (a.arm.policy == "raw")
    header = msgspec.json.encode(blind.header)
    (tmp_path / "records").write_bytes(header + b"\n")
    with pytest.raises(BadInput, match="query_aware: False, now True"):
        collect(aware, tmp_path / "records")


def test_a_question_cannot_change_an_importance_that_does_not_look_at_it(
    subject: LoadedModel,
) -> None:
    arms = arms_of(["spectrum"], ["0.3"], PlanOptions(importance="norm"))
    with pytest.raises(BadInput, match=r"no question changes importance \['norm'\]"):
        Ruler(subject, arms, query_aware=True)


def test_a_haystack_of_ones_own(subject: LoadedModel, text_file: Path) -> None:
    own = Ruler(subject, RAW, lengths=(300,), haystack=text_file)
    generated = Ruler(subject, RAW, lengths=(300,))
    made = own.case(RulerId(300, "needle", 5))
    before = text_of(subject.tokenizer, made.case.context[1 : made.facts[0].start])
    assert before in text_file.read_text()
    assert own.header.digest != generated.header.digest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trials": 0}, "must be positive"),
        ({"lengths": ()}, "must be positive"),
        ({"lengths": (0,)}, "must be positive"),
        ({"subtasks": ()}, "at least one task is needed"),
        ({"seed": -1}, "seed must not be negative, got -1"),
        ({"lengths": (100,)}, "length 100 holds no text beside 1 needles; at least"),
        ({"lengths": (4346,)}, "the model has 4352"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(
    subject: LoadedModel, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        Ruler(subject, RAW, **change)


def test_an_unknown_subtask_is_refused_at_once(subject: LoadedModel) -> None:
    with pytest.raises(UnknownName, match="unknown ruler task 'sorting'; known: needle"):
        Ruler(subject, RAW, subtasks=["sorting"])
