"""Record files: resumable, never mixed, never overwritten by mistake."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from synthetic import ARMS, Interrupted, Synthetic

from kvprism.errors import BadInput
from kvprism.evaluate.records import collect, load_records

TASK = Synthetic(n_documents=5)


def fresh(**changes: Any) -> Synthetic:
    return replace(TASK, measured=[], **changes)


def test_one_record_per_document_and_arm(tmp_path: Path) -> None:
    found = collect(TASK, tmp_path / "records.jsonl")
    assert len(found.records) == 5 * len(ARMS)
    assert len((tmp_path / "records.jsonl").read_text().splitlines()) == 1 + 5 * len(ARMS)


def test_records_come_back_as_they_were_measured(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    task = fresh(infeasible={1})
    found = collect(task, path)
    stored = load_records(path)
    assert stored.records == found.records
    assert stored.header.digest == task.header.digest


def test_without_a_path_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(collect(TASK).records) == 5 * len(ARMS)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    with pytest.raises(Interrupted):
        collect(fresh(stop_after=3), path)
    task = fresh()
    found = collect(task, path)
    assert task.measured == list(TASK.documents[3:])
    assert found.records == load_records(path).records == collect(TASK).records


def test_a_document_with_an_arm_missing_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    collect(TASK, path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-2]) + lines[-2][: len(lines[-2]) // 2])  # and one cut short
    task = fresh()
    assert collect(task, path).records == load_records(path).records
    assert task.measured == [TASK.documents[-1]]


def test_a_finished_run_measures_nothing_more(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    first = collect(TASK, path)
    before = path.read_bytes()
    task = fresh()
    assert collect(task, path).records == first.records
    assert (task.measured, path.read_bytes()) == ([], before)


@pytest.mark.parametrize(
    "change, difference",
    [
        ({"seed": 1}, "seed: 0, now 1"),
        ({"arms": ARMS[:2]}, r"arms\.2: .*random|arms\.2: .*spectrum"),
        ({"n_documents": 6}, "documents: 5, now 6"),
        ({"commit": "abc"}, "commit: unknown, now abc"),
        ({"task": "needle"}, "task: perplexity, now needle"),
    ],
)
def test_records_of_another_run_are_refused_and_kept(
    tmp_path: Path, change: dict[str, Any], difference: str
) -> None:
    path = tmp_path / "records.jsonl"
    collect(TASK, path)
    before = path.read_bytes()
    with pytest.raises(
        BadInput, match=f"records.jsonl holds records of another run .*{difference}"
    ):
        collect(fresh(**change), path)
    assert path.read_bytes() == before


def test_only_what_differs_is_named(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    collect(TASK, path)
    arms = (*ARMS[:2], replace(ARMS[2], budget=0.35), *ARMS[3:])
    with pytest.raises(BadInput, match=r"\(arms\.2\.budget: 0\.3, now 0\.35\)"):
        collect(fresh(arms=arms), path)


def test_many_differences_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    collect(TASK, path)
    with pytest.raises(BadInput, match=r"task: .*; seed: 0, now 1; .*; and [0-9]+ more\)"):
        collect(fresh(task="needle", seed=1, arms=ARMS[:1], commit="abc"), path)


def test_records_of_an_earlier_format_say_so(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    collect(TASK, path)
    path.write_bytes(path.read_bytes().replace(b"kvprism-records/2", b"kvprism-records/1"))
    with pytest.raises(BadInput, match="is of format 'kvprism-records/1', expected 'kvprism-rec"):
        load_records(path)


@pytest.mark.parametrize("contents", [b"", b"[]", b'{"a": 1}\n', b"\xff\n", b"my notes\n"])
def test_another_file_is_never_overwritten(tmp_path: Path, contents: bytes) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(contents)
    with pytest.raises(BadInput, match="not a file of kvprism evaluation records"):
        collect(TASK, path)
    assert path.read_bytes() == contents


def test_a_damaged_record_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    collect(TASK, path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:4], lines[4][:20] + b"\n", *lines[5:]]))
    with pytest.raises(BadInput, match="not a file of kvprism evaluation records"):
        load_records(path)


def test_an_absent_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="No such file"):
        load_records(tmp_path / "records.jsonl")


def test_a_place_that_cannot_be_written_is_an_error_before_anything_is_measured(
    tmp_path: Path,
) -> None:
    task = fresh()
    with pytest.raises(BadInput, match="cannot write"):
        collect(task, tmp_path / "absent" / "records.jsonl")
    assert task.measured == []


def test_progress_counts_what_was_there_already(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    with pytest.raises(Interrupted):
        collect(fresh(stop_after=2), path)
    seen: list[tuple[int, int]] = []
    collect(fresh(), path, lambda done, total: seen.append((done, total)))
    total = 5 * len(ARMS)
    assert seen == [(done, total) for done in range(2 * len(ARMS) + 1, total + 1)]
