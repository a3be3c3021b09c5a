"""The evaluation commands: rows to the contract, tables that fit, records that resume."""

import shlex
from pathlib import Path

import longbench_rows
import pytest

from .conftest import Run, failure, read_json

CONTRACT = shlex.split(
    "task model policy budget metric value baseline delta ci_low ci_high n wire_bytes "
    "reference_bytes fraction fraction_native resident_bytes length distractors seed commit "
    "versions"
)
LABELS = shlex.split(
    "codec importance fixed_rate wire_only reason subtask query_aware phase decode protection"
)
TABLE_COLUMNS = 120

PERPLEXITY = shlex.split(
    "eval perplexity --model tiny --context 256 --continuation 64 --documents 2 "
    "--policy raw,int8,spectrum,sinks-recent --budget 0.10,0.30 --seed 0"
)
NEEDLE = shlex.split(
    "eval needle --model tiny --length 256 --depths 2 --trials 1 --distractors 0,1 "
    "--policy int4,pdtrim --budget 0.30"
)
RULER = shlex.split(
    "eval ruler --model tiny --length 200 --trials 1 --task needle,multi-value "
    "--policy int4,pdtrim --budget 0.30"
)


def widest(text: str) -> int:
    """The widest line of the tables; sentences may be longer, they fold."""
    return max(len(line) for line in text.splitlines() if "  " in line)


@pytest.fixture(scope="module")
def perplexity(run: Run, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("perplexity")
    files = ["--json", folder / "rows.json", "--records", folder / "records.jsonl"]
    result = run(*PERPLEXITY, "--text", text, *files)
    assert result.exit_code == 0, result.output
    (folder / "stdout").write_text(result.stdout)
    return folder


def test_perplexity_rows_have_the_keys_of_the_contract(perplexity: Path) -> None:
    rows = read_json(perplexity / "rows.json")
    for row in rows:
        assert set(row) == {*CONTRACT, *LABELS}
    metrics = ["perplexity", "kl_mean", "kl_p99", "top1_flips_per_1000"]
    assert [row["metric"] for row in rows[:4]] == metrics
    arms = list(dict.fromkeys((row["policy"], row["budget"]) for row in rows))
    assert arms == [
        *(("raw", None), ("int8", None), ("spectrum", 0.1), ("spectrum", 0.3)),
        *(("sinks-recent", 0.1), ("sinks-recent", 0.3)),
    ]


def test_an_infeasible_budget_has_no_value_and_a_reason(perplexity: Path) -> None:
    rows = [row for row in read_json(perplexity / "rows.json") if row["policy"] == "spectrum"]
    infeasible = [row for row in rows if row["budget"] == 0.1]
    assert {row["value"] for row in infeasible} == {None}
    assert all("budget too small" in row["reason"] for row in infeasible)
    shown = (perplexity / "stdout").read_text()
    assert "spectrum 0.1: infeasible, 2 of 2 documents: budget too small" in shown


def test_the_table_of_perplexity_survives_a_narrow_log(perplexity: Path) -> None:
    assert widest((perplexity / "stdout").read_text()) <= TABLE_COLUMNS


def test_a_second_run_measures_only_what_is_missing(run: Run, text: Path, perplexity: Path) -> None:
    records, again = perplexity / "records.jsonl", perplexity / "again.json"
    whole = records.read_bytes()
    header, *lines = whole.splitlines(keepends=True)
    records.write_bytes(header + b"".join(lines[: len(lines) // 2]))
    result = run(*PERPLEXITY, "--text", text, "--json", again, "--records", records)
    assert result.exit_code == 0
    assert records.read_bytes() == whole
    assert read_json(again) == read_json(perplexity / "rows.json")


def test_records_of_another_run_are_not_mixed_in(run: Run, text: Path, perplexity: Path) -> None:
    records = perplexity / "records.jsonl"
    result = run(*PERPLEXITY, "--text", text, "--records", records, "--documents", 3)
    assert result.exit_code == 2
    assert "documents: 2, now 3" in failure(result)


def test_compare_gives_paired_differences(run: Run, perplexity: Path) -> None:
    json = perplexity / "comparisons.json"
    arguments = ["--policy", "spectrum", "--versus", "int8,sinks-recent", "--json", json]
    result = run("eval", "compare", perplexity / "records.jsonl", *arguments)
    assert result.exit_code == 0
    found = [c for c in read_json(json) if c["metric"] == "kl_mean" and c["budget"] == 0.3]
    assert {c["versus"]: c["delta"] > 0 for c in found} == {"int8": True, "sinks-recent": False}
    assert "worse" in result.stdout and "better" in result.stdout
    assert "infeasible: 256 tokens: spectrum 0.1 from int8" in result.stdout
    assert widest(result.stdout) <= TABLE_COLUMNS


def test_needle_rows_have_a_cell_per_count_of_distractors(run: Run, tmp_path: Path) -> None:
    records, json = tmp_path / "records.jsonl", tmp_path / "rows.json"
    result = run(*NEEDLE, "--json", json, "--records", records)
    assert result.exit_code == 0, result.output
    rows = read_json(json)
    assert {(row["length"], row["distractors"], row["n"]) for row in rows} == {
        (256, 0, 2),
        (256, 1, 2),
    }
    assert [row["metric"] for row in rows[:3]] == ["exact_match", "digit_nll", "kl_mean"]
    assert {row["policy"] for row in rows} == {"raw", "int4", "pdtrim"}
    assert widest(result.stdout) <= TABLE_COLUMNS
    compared = run("eval", "compare", records, "--policy", "int4", "--versus", "pdtrim")
    assert "not ranked: 256 tokens, 0 distractors: n = 2 is below 100" in compared.stdout


@pytest.fixture(scope="module")
def ruler(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ruler")
    files = ["--json", folder / "rows.json", "--records", folder / "records.jsonl"]
    result = run(*RULER, *files)
    assert result.exit_code == 0, result.output
    (folder / "stdout").write_text(result.stdout)
    return folder


def test_ruler_has_a_cell_per_subtask_and_their_average(ruler: Path) -> None:
    rows = read_json(ruler / "rows.json")
    for row in rows:
        assert set(row) == {*CONTRACT, *LABELS}
        assert (row["task"], row["query_aware"], row["distractors"]) == ("ruler", False, None)
    cells = list(dict.fromkeys((row["length"], row["subtask"], row["n"]) for row in rows))
    assert cells == [(200, "needle", 11), (200, "multi-value", 11), (200, "average", 22)]
    metrics = ["exact_match", "answers_right", "answer_nll", "kl_mean", "top1_flips_per_1000"]
    assert [row["metric"] for row in rows[:5]] == metrics
    shown = (ruler / "stdout").read_text()
    assert "ruler: 200 tokens, multi-value, n = 11" in shown
    assert widest(shown) <= TABLE_COLUMNS


def test_a_second_run_of_ruler_measures_only_what_is_missing(run: Run, ruler: Path) -> None:
    records, again = ruler / "records.jsonl", ruler / "again.json"
    whole = records.read_bytes()
    lines = whole.splitlines(keepends=True)
    records.write_bytes(b"".join(lines[:-4]))
    assert run(*RULER, "--json", again, "--records", records).exit_code == 0
    assert records.read_bytes() == whole
    assert read_json(again) == read_json(ruler / "rows.json")


def test_compare_names_the_subtask(run: Run, ruler: Path) -> None:
    json = ruler / "comparisons.json"
    arguments = ["--policy", "int4", "--versus", "pdtrim", "--json", json]
    result = run("eval", "compare", ruler / "records.jsonl", *arguments)
    assert result.exit_code == 0
    assert {c["subtask"] for c in read_json(json)} == {"needle", "multi-value", "average"}
    assert "not ranked: 200 tokens, needle: n = 11 is below 100" in result.stdout
    assert "ruler, answers right %: int4 against others" in result.stdout
    assert widest(result.stdout) <= TABLE_COLUMNS


def test_records_of_several_tasks_are_compared_in_tables_of_their_own(
    run: Run, ruler: Path, perplexity: Path
) -> None:
    files = [ruler / "records.jsonl", perplexity / "records.jsonl"]
    result = run("eval", "compare", *files, "--policy", "raw", "--versus", "raw")
    assert result.exit_code == 0
    for task in ("ruler", "perplexity"):
        assert f"{task}, KL to raw x1000: raw against others" in result.stdout


def test_ruler_with_the_question_known_says_so(run: Run, tmp_path: Path) -> None:
    arguments = ["--task", "needle", "--policy", "raw", "--json", tmp_path / "rows.json"]
    result = run(*RULER, *arguments, "--query-aware")
    assert result.exit_code == 0, result.output
    assert all(row["query_aware"] for row in read_json(tmp_path / "rows.json"))
    assert "ruler (query-aware): 200 tokens, needle, n = 11" in result.stdout


def test_policies_under_one_protection_say_so(run: Run, tmp_path: Path) -> None:
    """KeyDiff keeps one token of its own; under 4+32 as many bytes, other tokens."""
    records, files = tmp_path / "records.jsonl", {}
    for protect in (None, "4+32"):
        files[protect] = tmp_path / f"{protect}.json"
        given = [] if protect is None else ["--protect", protect, "--records", records]
        result = run("eval", "ruler", "--model", "tiny", "--length", 200, "--trials", 1, "--task",
                     "needle", "--policy", "raw,keydiff", "--budget", "64tok",
                     "--json", files[protect], *given)  # fmt: skip
        assert result.exit_code == 0, result.output
    assert "ruler (protecting 4+32): 200 tokens, needle, n = 11" in result.stdout
    own, same = (read_json(path) for path in files.values())
    assert {row["protection"] for row in own} == {None}
    assert {row["protection"] for row in same} == {"4+32"}
    sizes, losses = (
        [[r[field] for r in rows if (r["policy"], r["metric"]) == ("keydiff", "kl_mean")]
         for rows in (own, same)]
        for field in ("wire_bytes", "value")
    )  # fmt: skip
    assert sizes[0] == pytest.approx(sizes[1], rel=0.02) and losses[0] != losses[1]
    result = run("eval", "compare", records, "--policy", "keydiff", "--versus", "raw")
    assert "ruler (protecting 4+32), exact match %: keydiff against others" in result.stdout
    result = run("eval", "recovery", records, "--policy", "keydiff", "--versus", "keydiff")
    assert "protecting 4+32" in result.stdout
    result = run("eval", "ruler", "--model", "tiny", "--protect", "36")
    assert result.exit_code == 2 and "such as 4+32: '36'" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--task", "sorting"], "unknown ruler task 'sorting'; known: needle, multi-key"),
        (["--length", "1k"], "--length takes whole numbers such as 1024,2048, got '1k'"),
        (["--length", "20"], "length 20 holds no text"),
        (["--length", "9000"], "the model has 4352"),
        (["--query-aware", "--importance", "norm"], "no question changes importance ['norm']"),
        (["--haystack", "no-such-file"], "cannot read no-such-file"),
    ],
)
def test_bad_settings_of_ruler_are_one_line(run: Run, arguments: list[str], said: str) -> None:
    result = run(*RULER, *arguments)
    assert result.exit_code == 2
    assert said in failure(result)


LONGBENCH = shlex.split(
    "eval longbench --model tiny --tasks passage_count,lcc --max-length 200 --documents 1 "
    "--policy int4"
)


@pytest.fixture(scope="module")
def longbench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return longbench_rows.write_directory(tmp_path_factory.mktemp("longbench"))


def test_longbench_has_a_cell_per_task_and_their_average(
    run: Run, longbench: Path, tmp_path: Path
) -> None:
    json, records = tmp_path / "rows.json", tmp_path / "records.jsonl"
    files = ["--data", longbench, "--json", json, "--records", records]
    result = run(*LONGBENCH, *files, "--query-aware", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    rows = read_json(json)
    for row in rows:
        assert set(row) == {*CONTRACT, *LABELS}
        assert (row["task"], row["length"], row["query_aware"]) == ("longbench", 200, True)
    assert [row["metric"] for row in rows[:3]] == ["score", "kl_mean", "top1_flips_per_1000"]
    assert [row["subtask"] for row in rows[::6]] == ["passage_count", "lcc", "average"]
    assert "longbench (query-aware): up to 200 tokens, lcc, n = 1" in result.stdout
    assert widest(result.stdout) <= TABLE_COLUMNS
    compared = run("eval", "compare", records, "--policy", "int4", "--versus", "raw")
    assert "longbench (query-aware), score: int4 against others" in compared.stdout
    assert "not ranked: up to 200 tokens, lcc: n = 1 is below 100" in compared.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tasks", "chess"], "unknown LongBench task 'chess'; known: narrativeqa"),
        (["--data", "nowhere"], "neither a directory, nor a file, nor a data set's name"),
        (["--max-length", "5000"], "this model has positions for 2 to 4289"),
        (["--chat"], "no chat template; leave out --chat"),
        (["--dtype", "int3"], "dtype 'int3' is not in"),
        (["--device", "nowhere"], "device 'nowhere'"),
    ],
)
def test_bad_settings_of_longbench_are_one_line(
    run: Run, longbench: Path, arguments: list[str], said: str
) -> None:
    result = run(*LONGBENCH, "--data", longbench, *arguments)
    assert result.exit_code == 2
    assert said in failure(result)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--policy", "best"], "unknown policy 'best'"),
        (["--importance", "luck"], "unknown importance 'luck'; known: attention"),
        (["--codec", "zip"], "unknown codec 'zip'"),
        (["--budget", ""], "policy 'spectrum' needs a budget"),
        (["--documents", "99"], "99 documents of 256 + 64 need"),
        (["--context", "5000"], "ask for at most"),
        (["--model", "none-such"], "unknown model 'none-such'"),
        (["--cache-dtype", "int3"], "cache dtype 'int3' is not in"),
    ],
)
def test_bad_settings_of_perplexity_are_one_line(
    run: Run, text: Path, arguments: list[str], said: str
) -> None:
    result = run(*PERPLEXITY, "--text", text, *arguments)
    assert result.exit_code == 2
    assert said in failure(result)


def test_a_text_that_is_none_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    assert "as UTF-8 text" in failure(run(*PERPLEXITY, "--text", tmp_path / "binary"))
    assert "No such file" in failure(run(*PERPLEXITY, "--text", tmp_path / "missing"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--length", "1k"], "--length takes whole numbers such as 1024,2048, got '1k'"),
        (["--distractors", "few"], "--distractors takes whole numbers"),
        (["--length", "20"], "length 20 holds no text"),
        (["--length", "9000"], "the model has 4352"),
    ],
)
def test_bad_settings_of_needle_are_one_line(run: Run, arguments: list[str], said: str) -> None:
    result = run(*NEEDLE, *arguments)
    assert result.exit_code == 2
    assert said in failure(result)


def test_files_that_hold_no_records_are_refused(run: Run, text: Path) -> None:
    result = run("eval", "compare", text)
    assert result.exit_code == 2
    assert "is not a file of kvprism evaluation records" in failure(result)


def test_arms_take_the_profile(
    run: Run, text: Path, profiles: tuple[Path, ...], tmp_path: Path
) -> None:
    ours, theirs, foreign = profiles
    command = shlex.split(
        "eval perplexity --model tiny --context 256 --continuation 16 --documents 1 "
        "--policy spectrum,spectrum-conditioned,spectrum-adaptive --budget 0.35"
    )
    files = ["--text", text, "--json", tmp_path / "rows.json", "--records", tmp_path / "records"]
    result = run(*command, "--profile", ours, *files)
    assert result.exit_code == 0, result.output
    rows = {
        row["policy"]: row
        for row in read_json(tmp_path / "rows.json")
        if row["metric"] == "kl_mean"
    }
    assert rows["spectrum-conditioned"]["value"] == rows["spectrum-adaptive"]["value"]
    assert rows["spectrum-conditioned"]["value"] != rows["spectrum"]["value"]
    assert "saved" in failure(run(*command, "--profile", theirs, *files))
    assert "ProfileMismatch: profile is for KV" in failure(
        run(*command, "--profile", foreign, "--text", text)
    )
    assert "ProfileMismatch: kvp.conditioned/1 needs" in failure(run(*command, "--text", text))
