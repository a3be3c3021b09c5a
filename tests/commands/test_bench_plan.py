"""`bench plan`: rows for every policy, shape and length; and what it refuses."""

from pathlib import Path
from typing import Any

import pytest

from kvprism.commands.bench_plan import SHAPES, Case

from .conftest import Run, failure, read_json


def test_a_row_for_every_policy_shape_and_length(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    arguments = ["--tokens", "256,512", "--policy", "spectrum,spectrum-layer,ada-kv"]
    result = run("bench", "plan", *arguments, "--budget", "0.4", "--repeats", "1", "--json", file)
    assert result.exit_code == 0, result.stderr
    rows: list[dict[str, Any]] = read_json(file)["rows"]
    cases = [(row["policy"], row["shape"], row["tokens"]) for row in rows]
    assert len(set(cases)) == len(cases) == 3 * len(SHAPES) * 2
    for row in rows:
        case = Case(row["policy"], "0.4", row["shape"], row["tokens"])
        assert row["solve_cpu_s"] > 0
        assert 0.3 < row["wire_bytes"] / case.shape.reference_nbytes <= 0.4
        assert (row["exponent"] is None) == (row["tokens"] == 256)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--policy", "raw"], "ranks no scores"),
        (["--policy", "pdtrim"], "ranks no scores"),
        (["--policy", "no-such"], "unknown policy"),
        (["--tokens", "0"], "at least one token"),
        (["--tokens", "64", "--budget", "0.01"], "budget too small"),
    ],
)
def test_what_cannot_be_planned_is_refused(run: Run, arguments: list[str], message: str) -> None:
    result = run("bench", "plan", *arguments)
    assert result.exit_code != 0
    assert message in failure(result)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--shaping", "magic"], "unknown shaping"),
        (["--link", "fast"], "is not a speed"),
        (["--policy", "no-such"], "unknown policy"),
        (["--context", "1"], "at least 2 tokens"),
    ],
)
def test_bench_ttft_refuses_before_it_starts_a_worker(
    run: Run, arguments: list[str], message: str
) -> None:
    result = run("bench", "ttft", *arguments)
    assert result.exit_code == 2
    assert message in failure(result)
