"""The command line in this process: torch is imported once, and every result can be looked at."""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from strategies import cache, conditioning_of
from typer.testing import CliRunner, Result

from kvprism.cli import app
from kvprism.commands import doctor
from kvprism.evaluate.haystack import sentences
from kvprism.integrations import worker
from kvprism.integrations.hf import fingerprint, load, shape_of
from kvprism.integrations.worker import ANYWHERE, Pair, Place, worker_pair
from kvprism.profiles import ProbeRecord, Profile

Run = Callable[..., Result]
Lend = Callable[..., AbstractContextManager[Pair]]


@pytest.fixture(scope="session")
def run() -> Run:
    """`run("plan", "--budget", "30%")` -> exit code, stdout and stderr."""
    runner = CliRunner()
    return lambda *arguments: runner.invoke(app, [str(each) for each in arguments])


@pytest.fixture(scope="session")
def lend() -> Iterator[Lend]:
    """As `worker_pair`, but one pair serves all who ask for the same: each starts for seconds."""
    started: dict[tuple[Any, ...], Pair] = {}
    with ExitStack() as stack:

        def lent(
            model: str,
            dtype: str = "bfloat16",
            profile: Path | None = None,
            places: tuple[Place, Place] = (ANYWHERE, ANYWHERE),
        ) -> Any:
            asked = (model, dtype, profile, places)
            if asked not in started:
                started[asked] = stack.enter_context(worker_pair(*asked))
            return nullcontext(started[asked])

        yield lent


@pytest.fixture
def lent_workers(lend: Lend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands take workers that run already; test_processes.py has commands that start them."""
    monkeypatch.setattr(worker, "worker_pair", lend)


@pytest.fixture
def small_speed_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """Doctor times its codec on 2 MiB: the figures mean nothing, their sentences are the same."""
    monkeypatch.setattr(doctor, "SPEED_TOKENS", 1024)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few thousand tokens of generated text."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(sentences(np.random.default_rng(0), 120))
    return path


@pytest.fixture(scope="session")
def prompt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few hundred tokens of generated text."""
    path = tmp_path_factory.mktemp("prompt") / "prompt.txt"
    path.write_text(sentences(np.random.default_rng(1), 12))
    return path


@pytest.fixture(scope="session")
def profiles(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Two profiles of the built-in model, and one of another model."""
    model, tokenizer = load("tiny")
    made = fingerprint(model, tokenizer).hex()
    shape = shape_of(model, 16).layers
    heads, channels = shape[0].components[0].heads, shape[0].components[0].channels
    kv = cache(layers=len(shape), heads=heads, channels=channels)
    probe = ProbeRecord("no", "yes", ("conditioned",) * len(shape), "as this test needs it")
    folder = tmp_path_factory.mktemp("profiles")
    paths = folder / "ours", folder / "theirs", folder / "of another model"
    drawn = [conditioning_of(kv, seed=seed, offset=0.1) for seed in (0, 1)]
    for path, name, given in zip(paths, (made, made, "ab" * 32), [*drawn, drawn[0]], strict=True):
        Profile(name, None, given, probe).save(path)
    return paths


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def failure(result: Result) -> str:
    """The one line that says what went wrong."""
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    assert result.stderr.splitlines()[-1] == lines[0]
    assert "Traceback" not in result.output
    return lines[0]
