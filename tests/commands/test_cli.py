"""What every command has in common: help, outputs, and one clear line for what goes wrong."""

import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from kvprism import cli

from .conftest import Run, failure, read_json

HELP_SECONDS = 0.3


def commands() -> Iterator[tuple[str, Any]]:
    group: Any = typer.main.get_command(cli.app)
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from ((f"{name} {sub}", each) for sub, each in command.commands.items())
        elif not command.hidden:
            yield name, command


def test_every_option_is_explained_and_every_command_has_an_example() -> None:
    for name, command in commands():
        assert command.help and command.epilog.startswith(f"Example: kvprism {name}"), name
        assert [each.name for each in command.params if not each.help] == [], name


def test_summaries_are_not_cut_in_the_list_of_commands(run: Run) -> None:
    listed = run("--help").stdout + run("eval", "--help").stdout
    assert [line for line in listed.splitlines() if line.endswith("...")] == [
        "Usage: kvprism [OPTIONS] COMMAND [ARGS]...",
        "Usage: kvprism eval [OPTIONS] COMMAND [ARGS]...",
    ]


def test_examples_name_real_options() -> None:
    for name, command in commands():
        known = {option for each in command.params for option in each.opts}
        used = {word for word in command.epilog.split() if word.startswith("--")}
        assert used <= known, name


@pytest.mark.parametrize("command", ["", "eval ruler", "decode"])
def test_help_answers_at_once(command: str) -> None:
    """By processor time, which other work on this machine does not change much: it never waits."""
    arguments = [sys.executable, "-m", "kvprism", *command.split(), "--help"]
    # As installed: pip compiles what it installs, so nobody waits for that twice.
    compiled = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}

    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(arguments, env=compiled, capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert any(seconds() < HELP_SECONDS for _ in range(10))  # the best of ten


def test_version_is_the_distribution_s(run: Run) -> None:
    from importlib.metadata import version

    assert run("--version").stdout == f"kvprism {version('kvprism')}\n"


def test_policies_are_listed(run: Run, tmp_path: Path) -> None:
    from kvprism.policies import POLICIES

    result = run("policies", "--json", tmp_path / "policies.json")
    assert [row["policy"] for row in read_json(tmp_path / "policies.json")] == list(POLICIES)
    assert all(name in result.stdout for name in POLICIES)


@pytest.mark.usefixtures("small_speed_test")
def test_doctor_finds_nothing_broken(run: Run, tmp_path: Path) -> None:
    result = run("doctor", "--json", tmp_path / "doctor.json")
    assert result.exit_code == 0
    states = {finding["name"]: finding["state"] for finding in read_json(tmp_path / "doctor.json")}
    assert states["loopback transfer"] == states["built-in models"] == "ok"
    assert states["shared memory transfer"] == ("ok" if hasattr(os, "memfd_create") else "missing")


def test_plan_shows_bytes_smallest_budget_and_links(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    result = run("plan", "--budget", "30%", "--tokens", 1024, "--link", "8Gbps", "--json", file)
    plan = read_json(file)
    assert (
        sum(tier["payload_bytes"] for tier in plan["tiers"]) + plan["overhead_bytes"]
        == (plan["wire_bytes"])
    )
    assert plan["smallest_bytes"] <= plan["wire_bytes"] <= plan["budget_bytes"]
    assert plan["links"] == [
        {
            "link": "8Gbps",
            "ms": pytest.approx(plan["wire_bytes"] / 1e6),
            "raw_ms": pytest.approx(plan["native_bytes"] / 1e6),
        }
    ]
    assert f"smallest feasible budget: {plan['smallest_bytes']:,}" in result.stdout


def test_the_smallest_budget_of_a_plan_is_feasible_and_one_byte_less_is_not(
    run: Run, tmp_path: Path
) -> None:
    file = tmp_path / "plan.json"
    assert run("plan", "--budget", "50%", "--json", file).exit_code == 0
    smallest = read_json(file)["smallest_bytes"]
    assert run("plan", "--budget", f"{smallest}B").exit_code == 0
    result = run("plan", "--budget", f"{smallest - 1}B")
    assert result.exit_code == 2
    assert f"at least {smallest}" in failure(result)


def test_plan_in_chunks_bills_what_is_sent_twice(run: Run, tmp_path: Path) -> None:
    file, chunks = tmp_path / "plan.json", ["--tokens", 1024, "--chunk", 256]
    assert run("plan", "--budget", "40%", *chunks, "--json", file).exit_code == 0
    plan = read_json(file)
    payload = sum(tier["payload_bytes"] for tier in plan["tiers"])
    assert plan["base_bytes"] < payload + plan["overhead_bytes"] == plan["wire_bytes"]
    assert plan["wire_bytes"] <= plan["budget_bytes"]
    smallest = plan["smallest_bytes"]
    assert run("plan", "--budget", f"{smallest}B", *chunks).exit_code == 0
    result = run("plan", "--budget", f"{smallest - 1}B", *chunks)
    assert result.exit_code == 2 and f"at least {smallest}" in failure(result)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "none-such"], "unknown model 'none-such'; known: "),
        (["--policy", "best"], "unknown policy 'best'; known: raw, int8"),
        (["--codec", "zip"], "unknown codec 'zip'; known: nested, conditioned, published"),
        (["--budget", "lots"], "budget 'lots' is none of 0.30, 30%, 512MiB, 512tok"),
        (["--budget", "0"], "a budget must be at least 1 byte"),
        (["--budget", "1%"], "budget too small for policy 'spectrum'"),
        (["--policy", "int8"], "budget too small for policy 'int8'"),
        (["--link", "fast"], "link 'fast' is not a speed such as"),
        (["--link", "0Gbps"], "link '0Gbps' is not a speed such as"),
        (["--tokens", "5000"], "5000 tokens: this model takes 1 to 4352"),
    ],
)
def test_bad_input_of_plan_is_one_line(run: Run, arguments: list[str], said: str) -> None:
    result = run("plan", "--budget", "30%", *arguments)
    assert result.exit_code == 2
    assert said in failure(result)


def test_a_budgeted_policy_without_a_budget_says_how_to_give_one(run: Run) -> None:
    result = run("plan")
    assert result.exit_code == 2
    assert "policy 'spectrum' needs a budget, such as 0.30" in failure(result)


@pytest.mark.parametrize(
    "arguments",
    [
        ["demo", "--json"],
        ["demo", "--report"],
        ["run", "--file", "prompt.txt", "--save"],
        ["eval", "needle", "--records"],
        ["eval", "ruler", "--json"],
        ["inspect", "stream.kvp", "--json"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("place", ["", "no-such-folder/file", "file/below"])
def test_a_place_that_cannot_be_written_is_found_before_the_work(
    run: Run, tmp_path: Path, arguments: list[str], place: str
) -> None:
    (tmp_path / "file").touch()
    started = time.perf_counter()
    result = run(*arguments, tmp_path / place)
    assert time.perf_counter() - started < 1
    assert result.exit_code == 2
    assert f"cannot write {tmp_path / place}" in failure(result)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_existing_result_is_replaced_and_nothing_lies_beside_it(
    run: Run, tmp_path: Path
) -> None:
    file = tmp_path / "policies.json"
    file.write_text("old")
    assert run("policies", "--json", file).exit_code == 0
    assert len(read_json(file)) > 10
    assert list(tmp_path.iterdir()) == [file]


def test_a_missing_library_names_the_extra_that_brings_it(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("kvprism.report", "matplotlib"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "path_importer_cache", {})
    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    result = run("demo", "--report", "report.html")
    assert result.exit_code == 1
    assert failure(result) == (
        "error: this command needs matplotlib: pip install 'kvprism[report]'"
    )


class Absent:
    """An import system in which matplotlib is not installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
