"""The demo, with a short text."""

import inspect
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from kvprism import cli
from kvprism.commands.demo import ANSWER_TOKENS, ARMS, _facts
from kvprism.integrations import worker
from kvprism.integrations.decode_role import DecodeWorker
from kvprism.integrations.definitions import ttft_ms
from kvprism.integrations.prefill_role import PrefillWorker

from .conftest import Lend, Run, failure, read_json

TERMINAL_COLUMNS = 100
FIGURES = ("plan_ms", "encode_ms", "transfer_ms", "decode_ms", "first_token_ms", "second_token_ms")


@pytest.fixture(scope="module")
def folder(run: Run, lend: Lend, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    files = ["--json", folder / "demo.json", "--report", folder / "report.html"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "worker_pair", lend)
        result = run("demo", "--context", 512, *files)
    assert result.exit_code == 0, result.output
    (folder / "stdout").write_text(result.stdout)
    return folder


@pytest.fixture(scope="module")
def result(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = read_json(folder / "demo.json")
    return found


def test_every_arm_stays_within_its_budget_and_counts_its_bytes(result: dict[str, Any]) -> None:
    assert result["kind"] == "demo"
    assert [arm["label"] for arm in result["arms"]] == [arm.label for arm in ARMS]
    for arm in result["arms"]:
        assert arm["fraction"] == arm["wire_bytes"] / result["reference_bytes"]
        assert arm["fraction_native"] == arm["wire_bytes"] / result["native_bytes"]
        if arm["budget"] is not None:
            assert arm["fraction"] <= float(arm["budget"].rstrip("%")) / 100


def test_every_phase_took_time_and_the_sum_is_the_time_to_first_token(
    result: dict[str, Any],
) -> None:
    for arm in result["arms"]:
        assert min(arm[name] for name in FIGURES) > 0
        assert arm["ttft_ms"] == pytest.approx(ttft_ms(arm))
    assert {name for arm in result["arms"] for name in arm if name.endswith("_ms")} <= set(
        result["definitions"]
    )


def test_the_hidden_facts_stand_where_the_prompt_says(result: dict[str, Any]) -> None:
    assert len(result["prompt"]) == result["context_tokens"] == 512
    assert len(result["needles"]) == 4
    for needle in result["needles"]:
        assert "".join(result["prompt"][needle["start"] : needle["stop"]]).strip() == needle["line"]


def test_raw_answers_everything_and_is_its_own_reference(result: dict[str, Any]) -> None:
    raw = result["arms"][0]
    assert (raw["answers_right"], raw["answers_total"], raw["kl_to_raw"]) == (4, 4, 0)
    for arm in result["arms"]:
        assert arm["answers_right"] == sum(answer["right"] for answer in arm["answers"])
        for answer in arm["answers"]:
            assert answer["right"] == answer["got"].startswith(answer["expected"])
    assert all(arm["kl_to_raw"] > 0 for arm in result["arms"][1:])


def test_raw_answers_every_fact_of_the_default_demo() -> None:
    """Both workers in this process: what is sent is the same, and it takes a tenth of the time."""
    defaults = {p.name: p.default for p in inspect.signature(cli.demo).parameters.values()}
    facts, _ = _facts(defaults["model"], defaults["context"], defaults["seed"])
    ids = facts.context_ids.tolist()
    prefill = PrefillWorker("tiny", bytes(32))
    prefill.prefill(ids)
    prefill.plan("raw", None)
    with DecodeWorker("tiny", bytes(32)) as decode, ThreadPoolExecutor(1) as pool:
        received = pool.submit(decode.receive, 10.0)
        prefill.send(decode.address())
        received.result()
        for needle in facts.needles:
            said = decode.generate(ids + needle.question_ids.tolist(), ANSWER_TOKENS)
            assert said["text"].strip().startswith(needle.value)


def test_it_writes_the_page_and_tables_that_fit_a_terminal(folder: Path) -> None:
    assert "<html" in (folder / "report.html").read_text()
    shown = (folder / "stdout").read_text()
    tables, _, _ = shown.partition("Decoding goes on")
    assert max(map(len, tables.splitlines())) <= TERMINAL_COLUMNS
    assert all(arm.label in shown for arm in ARMS)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--context", 20], "length 20 holds no text beside 4 needles"),
        (["--context", 5000], "context 5000: tiny takes at most 4224 here"),
        (["--model", "none-such"], "unknown model 'none-such'"),
    ],
)
def test_bad_settings_are_one_line(run: Run, arguments: list[object], said: str) -> None:
    result = run("demo", *arguments)
    assert result.exit_code == 2
    assert said in failure(result)
