"""LongBench's rows and tasks: read from each place they can be in; what is malformed is named."""

import json
from pathlib import Path
from typing import Any

import longbench_rows
import pytest
from huggingface_hub import constants

from kvprism.errors import BadInput, UnknownName
from kvprism.evaluate import longbench_data
from kvprism.evaluate.longbench_data import CONTEXT, INPUT, TASKS, LongBenchRow, read_task
from kvprism.evaluate.longbench_scores import SCORES

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return longbench_rows.write_directory(tmp_path_factory.mktemp("longbench"))


@pytest.fixture
def archive(folder: Path, tmp_path: Path) -> Path:
    return longbench_rows.write_archive(tmp_path / "data.zip", folder)


def test_there_are_the_21_tasks_each_with_its_prompt_limit_and_score() -> None:
    assert len(TASKS) == 21 and set(TASKS) == set(longbench_rows.TASKS)
    assert {task.score for task in TASKS.values()} == set(SCORES)
    tokens = {
        n: [name for name in TASKS if TASKS[name].new_tokens == n] for n in (32, 64, 128, 512)
    }
    assert {n: len(names) for n, names in tokens.items()} == {32: 7, 64: 6, 128: 4, 512: 4}
    assert tokens[512] == ["gov_report", "qmsum", "multi_news", "vcsum"]
    assert tokens[128] == ["narrativeqa", "qasper", "dureader", "samsum"]


def test_few_shot_tasks_and_code_take_no_chat_template_and_few_shot_counts_one_line() -> None:
    few_shot = {"trec", "triviaqa", "samsum", "lsht"}
    assert {name for name, task in TASKS.items() if task.first_line} == few_shot
    assert {name for name, task in TASKS.items() if not task.chat} == {
        *few_shot,
        *("lcc", "repobench-p"),
    }
    assert [name for name, task in TASKS.items() if task.ends_at_newline] == ["samsum"]


@pytest.mark.parametrize("name", TASKS)
def test_a_prompt_has_the_context_once_and_the_question_after_it(name: str) -> None:
    prompt = TASKS[name].prompt
    assert prompt.count(CONTEXT) == 1
    assert prompt.count(INPUT) == (1 if any(r["input"] for r in longbench_rows.TASKS[name]) else 0)
    assert prompt.find(INPUT) == -1 or prompt.index(INPUT) > prompt.index(CONTEXT)
    assert prompt.count("{") == prompt.count(CONTEXT) + prompt.count(INPUT)


def test_braces_of_a_text_stay_as_they_are() -> None:
    row = LongBenchRow("lcc", "{context}", "int f() { return 1; }", ("}",))
    before, after = TASKS["repobench-p"].fill(row)
    assert before == "Please complete the code given below. \nint f() { return 1; }"
    assert after == "{context}Next line of code:\n"


@pytest.mark.parametrize("name", TASKS)
def test_rows_are_read_from_a_directory_and_from_the_archive(
    folder: Path, archive: Path, name: str
) -> None:
    read = read_task(str(folder), name)
    assert read == read_task(str(archive), name)
    made = longbench_rows.TASKS[name]
    assert [(r.context, r.input, list(r.answers)) for r in read.rows] == [
        (row["context"], row["input"], row["answers"]) for row in made
    ]


def test_a_file_that_changes_has_another_digest(folder: Path, tmp_path: Path) -> None:
    rows = {"hotpotqa": longbench_rows.TASKS["hotpotqa"][:1]}
    fewer = longbench_rows.write_directory(tmp_path / "fewer", rows)
    whole = read_task(str(folder), "hotpotqa")
    assert read_task(str(fewer), "hotpotqa").digest != whole.digest


def test_a_data_set_by_name_is_what_the_hub_keeps(
    archive: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's own cache, as a download leaves it, and its own offline mode."""
    kept = tmp_path / "hub" / "datasets--kvprism-test--LongBench"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text(COMMIT)
    (kept / "snapshots" / COMMIT).mkdir(parents=True)
    archive.rename(kept / "snapshots" / COMMIT / "data.zip")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert read_task("kvprism-test/LongBench", "lcc") == read_task(str(folder), "lcc")
    with pytest.raises(
        BadInput, match=r"kvprism-test/Other is no directory here, and data\.zip of"
    ):
        read_task("kvprism-test/Other", "lcc")


GOOD = longbench_rows.TASKS["hotpotqa"][0]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("hotpotqa", {"context": None}, "`str`, got `null` - at `$.context`"),
        ("hotpotqa", {"context": " \n"}, "`context` is empty"),
        ("hotpotqa", {"context": ...}, "missing required field `context`"),
        ("hotpotqa", {"input": 3}, "`str`, got `int` - at `$.input`"),
        ("hotpotqa", {"input": ...}, "missing required field `input`"),
        ("hotpotqa", {"answers": "Port Lew"}, "`array`, got `str` - at `$.answers`"),
        ("hotpotqa", {"answers": ["Port Lew", 4]}, r"`str`, got `int` - at `$.answers[1]`"),
        ("hotpotqa", {"answers": []}, "`answers` is empty"),
        ("hotpotqa", {"dataset": "musique"}, "`dataset` must be 'hotpotqa', got 'musique'"),
        ("trec", {"all_classes": None}, "`all_classes` must name the classes"),
        ("trec", {"all_classes": []}, "`all_classes` must name the classes"),
        ("trec", {"all_classes": "Animal"}, "got `str` - at `$.all_classes`"),
        ("passage_retrieval_en", {"answers": ["3"]}, r"`answers` must be like 'Paragraph \\d+'"),
        ("passage_retrieval_zh", {"answers": ["Paragraph 3"]}, r"must be like '段落\\d+', got"),
        ("passage_count", {"answers": ["four"]}, r"`answers` must be like '\\d+', got 'four'"),
    ],
)
def test_a_malformed_row_is_refused_by_line_and_field(
    tmp_path: Path, name: str, change: dict[str, Any], message: str
) -> None:
    bad = {**GOOD, "dataset": name, **change}
    bad = {key: value for key, value in bad.items() if value is not ...}
    rows = [longbench_rows.TASKS[name][0], bad]
    folder = longbench_rows.write_directory(tmp_path / "rows", {name: rows})
    with pytest.raises(BadInput) as caught:
        read_task(str(folder), name)
    assert f"{name}.jsonl, line 2: " in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize("line", ["", "not JSON", json.dumps(GOOD)[:-1], "[]"])
def test_a_line_that_is_no_row_is_refused_by_its_number(tmp_path: Path, line: str) -> None:
    (tmp_path / "hotpotqa.jsonl").write_text(f"{json.dumps(GOOD)}\n{line}\n{json.dumps(GOOD)}\n")
    with pytest.raises(BadInput, match=r"hotpotqa\.jsonl, line 2: "):
        read_task(str(tmp_path), "hotpotqa")


def test_data_that_is_not_there_is_refused(folder: Path, archive: Path, tmp_path: Path) -> None:
    (tmp_path / "lcc.jsonl").write_bytes(b"")
    with pytest.raises(BadInput, match=r"has no trec.jsonl; name the tasks that it has"):
        read_task(str(tmp_path), "trec")
    with pytest.raises(BadInput, match=r"lcc.jsonl is empty"):
        read_task(str(tmp_path), "lcc")
    with pytest.raises(BadInput, match="neither a directory, nor a file, nor a data set's name"):
        read_task("LongBench", "lcc")
    with pytest.raises(BadInput, match=r"cannot read lcc.jsonl of .*: File is not a zip file"):
        read_task(str(folder / "lcc.jsonl"), "lcc")
    with pytest.raises(UnknownName, match="unknown LongBench task 'chess'; known: narrativeqa"):
        read_task(str(archive), "chess")


def test_an_archive_that_would_fill_the_memory_is_refused(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(longbench_data, "MAX_FILE_NBYTES", 100)
    with pytest.raises(BadInput, match=r"lcc.jsonl would be \d+ bytes, at most 100 are read"):
        read_task(str(archive), "lcc")
