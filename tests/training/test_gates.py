"""Gates hold on the right side, and figures are what they are called."""

import math
import sys
from typing import Any

import numpy as np
import pytest
import torch

from kvprism.evaluate.arms import RAW, Arm
from kvprism.evaluate.haystack import sentences
from kvprism.evaluate.measure import LoadedModel
from kvprism.evaluate.needle import Needle
from training.gates import (
    GATES,
    WINDOW,
    Figure,
    Gates,
    main,
    measure,
    outcomes_of,
    perplexity,
    share,
    wilson,
)
from training.recipe import FOLDER


@pytest.mark.parametrize(
    ("value", "gate", "lower", "held"),
    [
        (0.97, 0.97, False, True),
        (0.96, 0.97, False, False),
        (28.0, 28.0, True, True),
        (28.1, 28.0, True, False),
        (0.5, None, False, None),
    ],
)
def test_a_gate_is_a_bound_that_may_be_touched(value, gate, lower, held):
    assert Figure(name="x", value=value, n=1, gate=gate, lower_is_better=lower).held is held


def test_every_shipped_recipe_has_gates():
    assert set(GATES) == {path.stem for path in FOLDER.glob("*.toml")}


@pytest.mark.parametrize(("right", "n"), [(0, 209), (203, 209), (209, 209), (5, 11)])
def test_intervals_are_wilsons(right: int, n: int):
    """Its bounds are the shares from which the seen one is 1.96 of *their* deviations away."""
    for bound in wilson(right / n, n):
        distance = 1.959964 * math.sqrt(max(bound * (1 - bound), 0) / n)
        assert abs(bound - right / n) == pytest.approx(
            distance, abs=1e-7
        )  # a rounding under the root


def test_perplexity_counts_every_token_once_and_sees_nothing_across_windows(
    tiny: tuple[Any, Any],
):
    model, tokenizer = tiny
    ids = np.random.default_rng(0).integers(4, 2000, WINDOW + 88)
    total = 0.0
    with torch.no_grad():
        for window in (ids[:WINDOW], ids[WINDOW:]):
            whole = torch.from_numpy(np.concatenate([[tokenizer.bos_token_id], window]))[None]
            scores = model(whole).logits[0, :-1].log_softmax(-1)
            total -= float(scores.gather(1, whole[0, 1:, None]).sum())
    expected = math.exp(total / len(ids))
    assert perplexity(model, ids, tokenizer.bos_token_id) == pytest.approx(expected, rel=1e-4)


def test_a_share_is_of_cases_with_every_answer_right(tiny: tuple[Any, Any]):
    needle = Needle(LoadedModel("tiny", *tiny), (Arm(RAW),), (256,), trials=1, distractors=(0,))
    figure = share("needle", outcomes_of(needle), gate=0.9)
    exact = [record.outcome.exact for record in needle.records() if record.outcome is not None]
    assert (figure.value, figure.n) == (np.mean(exact), 11)
    assert figure.held, "the built-in model finds a needle in 256 tokens"


def test_a_model_may_have_to_be_as_good_as_another(tiny: tuple[Any, Any]):
    text = sentences(np.random.default_rng(0), 600)
    subject = LoadedModel("another", *tiny)
    found = next(measure(subject, Gates(as_good_as="tiny"), text, text))
    assert found.gate == pytest.approx(found.value) and found.held


def test_the_command_says_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    arguments = ["scripts/gate-tiny", "tiny", "--train", "none", "--valid", "none"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert main() == 2
    assert "cannot read none" in capsys.readouterr().err
