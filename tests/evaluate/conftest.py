"""What the evaluation's tests share: the built-in model as a subject, and text of our own."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvprism.evaluate.haystack import sentences
from kvprism.evaluate.measure import LoadedModel


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """The built-in model's kernels are small: two threads mostly wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def subject(tiny: tuple[Any, Any]) -> LoadedModel:
    return LoadedModel("tiny", *tiny)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 9,000 tokens of generated filler."""
    path = tmp_path_factory.mktemp("text") / "filler.txt"
    path.write_text(sentences(np.random.default_rng(7), 400))
    return path
