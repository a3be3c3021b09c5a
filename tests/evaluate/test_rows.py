"""Rows on disk, and where they say they come from."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvprism.errors import BadInput
from kvprism.evaluate.rows import Row, provenance, read_rows, write_rows

RESULTS = Path(__file__).parents[2] / "bench" / "results"
ROW = Row(
    task="perplexity",
    model="tiny",
    policy="int8",
    budget=None,
    metric="kl_mean",
    value=1e-5,
    baseline=0.0,
    delta=1e-5,
    ci_low=0.0,
    ci_high=2e-5,
    n=40,
    wire_bytes=508,
    reference_bytes=1000,
    fraction=0.508,
    fraction_native=0.508,
    resident_bytes=1000,
    length=1536,
    distractors=None,
    seed=0,
    commit="unknown",
    versions={"python": "3.11"},
    codec="nested",
    importance="attention",
    fixed_rate=True,
    wire_only=True,
)


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    write_rows(path, [ROW, ROW])
    assert read_rows(path) == [ROW, ROW]
    assert [p.name for p in tmp_path.iterdir()] == ["rows.json"]


def test_a_row_has_the_contracts_keys(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.json", [ROW])
    [row] = json.loads((tmp_path / "rows.json").read_text())
    contract = """task model policy budget metric value baseline delta ci_low ci_high n
        wire_bytes reference_bytes fraction fraction_native resident_bytes length distractors seed
        commit versions reason codec importance fixed_rate wire_only subtask query_aware
            phase decode protection"""
    assert set(row) == set(contract.split())
    assert row["budget"] is row["reason"] is None


# Comparisons of arms are no rows.
ROWS = sorted(path for path in RESULTS.glob("*.json") if "compare" not in path.name)


@pytest.mark.parametrize("path", ROWS, ids=lambda path: path.name)
def test_the_rows_of_this_repository_are_still_read(path: Path) -> None:
    assert read_rows(path)


def test_rows_of_before_there_were_subtasks_have_none(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    write_rows(path, [ROW])
    [row] = json.loads(path.read_text())
    del row["subtask"], row["query_aware"]
    path.write_text(json.dumps([row]))
    assert read_rows(path) == [ROW]


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_row_holds_no_number_that_json_lacks(number: float) -> None:
    with pytest.raises(BadInput, match="int8 kl_mean: value is"):
        msgspec.structs.replace(ROW, value=number)


def test_a_place_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot write"):
        write_rows(tmp_path / "absent" / "rows.json", [ROW])


@pytest.mark.parametrize("contents", ["", "{}", '[{"task": "needle"}]', "[1, 2"])
def test_another_file_is_not_rows(tmp_path: Path, contents: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(contents)
    with pytest.raises(BadInput, match="not a file of evaluation rows"):
        read_rows(path)


def test_provenance_names_what_computes(tiny: tuple[Any, Any]) -> None:
    versions = provenance(tiny[0]).versions
    assert list(versions) == ["kvprism", "torch", "transformers", "python", "attention"]
    assert versions["attention"] == "sdpa"
    assert versions["torch"] == sys.modules["torch"].__version__


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    command = ["git", *identity, *arguments]
    return subprocess.run(
        command, cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


PRINT = "from kvprism.evaluate.rows import provenance; print(provenance().commit)"


def commit_seen_from(source: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PRINT],
        check=True,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(source), "PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"},
    )
    return done.stdout.strip()


def copy_of_the_package(folder: Path) -> None:
    source = Path(__file__).parents[2] / "src" / "kvprism"
    shutil.copytree(source, folder / "kvprism", ignore=shutil.ignore_patterns("__pycache__"))


def test_the_commit_is_that_of_the_checkout_and_says_when_files_differ(tmp_path: Path) -> None:
    copy_of_the_package(tmp_path / "src")
    git(tmp_path, "init", "--quiet")
    assert commit_seen_from(tmp_path / "src") == "unknown"  # a repository without a commit
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "all")
    head = git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "results.json").write_text("[]")
    assert commit_seen_from(tmp_path / "src") == head
    (tmp_path / "src" / "kvprism" / "core.py").write_text("")
    assert commit_seen_from(tmp_path / "src") == f"{head}-dirty"


def test_another_projects_commit_is_not_ours(tmp_path: Path) -> None:
    copy_of_the_package(tmp_path / "site-packages")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "all")
    assert commit_seen_from(tmp_path / "site-packages") == "unknown"
