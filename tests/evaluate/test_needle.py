"""Needles, from the settings to rows."""

from pathlib import Path
from typing import Any

import pytest
import torch

from kvprism.errors import BadInput
from kvprism.evaluate.arms import arms_of
from kvprism.evaluate.measure import LoadedModel
from kvprism.evaluate.needle import Needle, NeedleId, case_of
from kvprism.evaluate.records import collect
from kvprism.evaluate.summary import rows_of

RAW = arms_of(["raw"], [])


def test_every_cell_has_every_depth_in_every_trial(subject: LoadedModel) -> None:
    task = Needle(subject, RAW, lengths=(128, 256), depths=5, trials=3, distractors=(0, 2))
    assert len(task.documents) == len(set(task.documents)) == 2 * 2 * 5 * 3
    depths = [task.needle(NeedleId(128, 0, i)).depth for i in range(15)]
    assert depths == [0.0, 0.25, 0.5, 0.75, 1.0] * 3


def test_one_depth_is_the_start(subject: LoadedModel) -> None:
    task = Needle(subject, RAW, lengths=(128,), depths=1, trials=1, distractors=(0,))
    assert task.needle(NeedleId(128, 0, 0)).depth == 0.0


def test_cases_differ_and_do_not_depend_on_what_else_is_measured(subject: LoadedModel) -> None:
    small = Needle(subject, RAW, lengths=(128,), depths=3, trials=1, distractors=(2,))
    large = Needle(subject, RAW, lengths=(256, 128), depths=3, trials=2, distractors=(0, 2))
    values = [small.needle(NeedleId(128, 2, i)).value for i in range(3)]
    assert values == [large.needle(NeedleId(128, 2, i)).value for i in range(3)]
    assert len(set(values)) == 3


def test_question_and_answer_are_fed_but_for_the_last_token(subject: LoadedModel) -> None:
    needle = Needle(subject, RAW, lengths=(128,)).needle(NeedleId(128, 0, 0))
    case = case_of(needle)
    assert len(case.context) == 128
    [answer] = case.answers
    assert case.continuation[answer].tolist() == needle.answer_ids.tolist()
    assert case.question.tolist() == needle.question_ids.tolist()
    assert torch.equal(torch.cat([case.fed, case.continuation[-1:]]), case.continuation)


def test_the_built_in_model_finds_needles_in_our_own_haystacks(subject: LoadedModel) -> None:
    """And keeping the most recent tokens alone does not, which is what makes it a test."""
    arms = arms_of(["int4", "sinks-recent"], ["0.3"])
    task = Needle(subject, arms, lengths=(1024,), depths=20, trials=1, distractors=(0,))
    rows = {(r.policy, r.metric): r for r in rows_of(collect(task))}
    exact = {policy: row.value for (policy, metric), row in rows.items() if metric == "exact_match"}
    assert exact["raw"] is not None and exact["raw"] >= 0.95
    assert exact["int4"] is not None and exact["int4"] >= 0.9
    assert exact["sinks-recent"] is not None and exact["sinks-recent"] < 0.6
    nll = rows["sinks-recent", "digit_nll"]
    assert nll.ci_low is not None and nll.ci_low > 0.5


def test_a_haystack_of_ones_own(subject: LoadedModel, text_file: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"lengths": (200,), "depths": 2, "trials": 1, "distractors": (1,)}
    task = Needle(subject, RAW, haystack=text_file, **settings)
    [first, _] = collect(task, tmp_path / "records").records
    assert first.cell == (200, 1, None)
    own = Needle(subject, RAW, **settings)
    assert own.header.digest != task.header.digest
    with pytest.raises(BadInput, match="haystack: "):
        collect(own, tmp_path / "records")


def test_a_haystack_that_is_too_short_is_refused_at_once(
    subject: LoadedModel, tmp_path: Path
) -> None:
    path = tmp_path / "short.txt"
    path.write_text("A short text .")
    with pytest.raises(BadInput, match=r"the haystack has [0-9]+ tokens, [0-9]+ are needed"):
        Needle(subject, RAW, lengths=(256,), haystack=path)


def test_a_length_beyond_the_models_positions_is_refused_at_once(subject: LoadedModel) -> None:
    with pytest.raises(BadInput, match=r"4352 context tokens and .* the model has 4352"):
        Needle(subject, RAW, lengths=(256, 4352))


@pytest.mark.parametrize(
    "change",
    [
        {"depths": 0},
        {"trials": 0},
        {"lengths": (0,)},
        {"lengths": ()},
        {"distractors": ()},
        {"distractors": (-1,)},
        {"seed": -1},
    ],
)
def test_settings_that_are_not_positive_are_refused(
    subject: LoadedModel, change: dict[str, Any]
) -> None:
    with pytest.raises(BadInput, match="must be positive"):
        Needle(subject, RAW, **change)
