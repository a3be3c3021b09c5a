"""What every test stands on. torch is touched only once a test module has imported it."""

import os
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

ROOT = Path(__file__).parents[1]

# Set before torch loads, and inherited by the worker processes that tests start. The tests' tensors
# are small: a second thread mostly waits for the first, and `make test` runs two tests at a time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Threads that spin while they wait starve each other on busy cores: four times the processor time.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"

settings.register_profile("ci", deadline=None, derandomize=True, max_examples=50)
settings.register_profile("dev", deadline=None, max_examples=200)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Every test starts from the same seeds, whichever tests ran before it."""
    random.seed(0)
    torch: Any = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(0)
        torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def derived_models(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Models derived from `tiny` are written here, not to the home folder."""
    os.environ["KVPRISM_CACHE"] = str(tmp_path_factory.mktemp("derived"))


@pytest.fixture(scope="session")
def tiny() -> tuple[Any, Any]:
    """The built-in model and its tokenizer; loaded once, so a test must not change them."""
    from kvprism.integrations.hf import load

    return load("tiny")


@pytest.fixture(scope="session")
def wikitext_valid() -> Path:
    """WikiText-2 valid as one text file; `KVPRISM_WIKITEXT` names it where it lies elsewhere."""
    default = ROOT.parent / "shared" / "data" / "wikitext-2" / "valid.txt"
    path = Path(os.environ.get("KVPRISM_WIKITEXT", default))
    if not path.is_file():
        pytest.skip(f"WikiText-2 is not part of this repository and {path} is absent")
    return path
