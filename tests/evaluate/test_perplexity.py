"""Continuations of a text, from the file to rows."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from kvprism.errors import BadInput
from kvprism.evaluate.arms import arms_of
from kvprism.evaluate.measure import LoadedModel
from kvprism.evaluate.perplexity import Perplexity
from kvprism.evaluate.records import collect
from kvprism.evaluate.summary import rows_of

ARMS = arms_of(["int8", "int4", "spectrum", "random-drop"], ["0.1", "0.4"])
SMALL: dict[str, Any] = {"context": 200, "continuation": 50, "n_documents": 4}


@pytest.fixture(scope="module")
def task(subject: LoadedModel, text_file: Path) -> Perplexity:
    return Perplexity(subject, text_file, ARMS, **SMALL)


def test_documents_do_not_overlap_and_reach_over_the_text(task: Perplexity) -> None:
    cases = [task.case(i) for i in range(4)]
    whole = [torch.cat([case.context, case.continuation]) for case in cases]
    assert all(len(ids) == 250 and ids[0] == 0 for ids in whole)
    text = torch.tensor(task.subject.tokenizer.encode(task.text.read_text()))
    starts = [
        next(i for i in range(len(text)) if torch.equal(text[i : i + 249], ids[1:]))
        for ids in whole
    ]
    assert starts[0] == 0
    assert all(b - a >= 249 for a, b in pairwise(starts))
    assert starts[-1] > len(text) - 2 * 250


def test_the_last_context_token_is_computed_again_on_the_decode_side(task: Perplexity) -> None:
    case = task.case(1)
    assert len(case.context) == 199
    assert len(case.continuation) == 51
    assert case.answers == (slice(1, 51),)


def test_from_text_to_rows(task: Perplexity, tmp_path: Path) -> None:
    rows = {(r.policy, r.budget, r.metric): r for r in rows_of(collect(task, tmp_path / "r"))}
    kl = {key[:2]: row.value for key, row in rows.items() if key[2] == "kl_mean"}
    assert kl["raw", None] == 0
    assert kl["raw", None] < kl["int8", None] < kl["int4", None] < kl["random-drop", 0.4]
    infeasible = rows["spectrum", 0.1, "perplexity"]
    assert infeasible.value is None and "budget too small" in (infeasible.reason or "")
    row = rows["spectrum", 0.4, "kl_mean"]
    assert (row.n, row.length, row.distractors, row.model) == (4, 200, None, "tiny")
    assert row.fraction and 0.38 < row.fraction <= 0.4


def test_a_repeated_run_measures_the_same(task: Perplexity) -> None:
    first, second = (collect(task).records for _ in range(2))
    assert first == second


def test_random_orders_differ_from_document_to_document(
    subject: LoadedModel, tmp_path: Path
) -> None:
    """One word over and over: all documents are the same, so only the arms' seeds can differ."""
    path = tmp_path / "text"
    path.write_text(" the" * 1000)
    task = Perplexity(subject, path, arms_of(["random-drop"], ["0.3"]), **SMALL)
    nll: dict[str, list[float]] = {"raw": [], "random-drop": []}
    for record in collect(task).records:
        assert record.outcome is not None
        nll[record.arm.policy].append(record.outcome.nll)
    assert len(set(nll["raw"])) == 1
    assert len(set(nll["random-drop"])) == 4


def test_a_text_that_is_too_short_names_both_numbers(subject: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text(" one two three" * 100)
    n = len(subject.tokenizer.encode(path.read_text()))
    with pytest.raises(BadInput, match=f"has {n} tokens, 40 documents .* need {40 * 2047}"):
        Perplexity(subject, path, ARMS)


@pytest.mark.parametrize("contents", [None, b"\xff\xfe\x00"])
def test_a_text_that_cannot_be_read_is_an_error(
    subject: LoadedModel, tmp_path: Path, contents: bytes | None
) -> None:
    path = tmp_path / "text"
    if contents is not None:
        path.write_bytes(contents)
    with pytest.raises(BadInput, match="as UTF-8 text"):
        Perplexity(subject, path, ARMS)


def test_a_negative_seed_is_refused(subject: LoadedModel, text_file: Path) -> None:
    with pytest.raises(BadInput, match="seed must not be negative"):
        Perplexity(subject, text_file, ARMS, **SMALL, seed=-1)


@pytest.mark.parametrize("change", [{"context": 1}, {"continuation": 0}, {"n_documents": 0}])
def test_settings_that_are_not_positive_are_refused(
    subject: LoadedModel, text_file: Path, change: dict[str, int]
) -> None:
    with pytest.raises(BadInput, match="context must be at least 2"):
        Perplexity(subject, text_file, ARMS, **{**SMALL, **change})


def test_wikitext_is_as_easy_as_it_was(subject: LoadedModel, wikitext_valid: Path) -> None:
    """The model card gives about 21 to 25 per token, depending on the windows."""
    task = Perplexity(subject, wikitext_valid, arms_of(["int8"], []), n_documents=6)
    rows = {(row.policy, row.metric): row for row in rows_of(collect(task))}
    raw, int8 = (rows[policy, "perplexity"].value for policy in ("raw", "int8"))
    assert raw and int8
    assert 12 < raw < 40
    assert abs(int8 / raw - 1) < 1e-3
