"""The command line in this process: torch is imported once, and every result can be looked at."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from kvprism.cli import app
from kvprism.evaluate.haystack import sentences

Run = Callable[..., Result]


@pytest.fixture(scope="session")
def run() -> Run:
    """`run("plan", "--budget", "30%")` -> exit code, stdout and stderr."""
    runner = CliRunner()
    return lambda *arguments: runner.invoke(app, [str(each) for each in arguments])


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


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def failure(result: Result) -> str:
    """The one line that says what went wrong."""
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    assert result.stderr.splitlines()[-1] == lines[0]
    assert "Traceback" not in result.output
    return lines[0]
