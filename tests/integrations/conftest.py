"""Models for these tests: the built-in one, and random ones saved as genuine checkpoints."""

import os
from collections.abc import Iterator

import pytest
import torch
from configs import CONFIGS, FULL, MODELS, SLIDING, save_random

from kvprism.integrations import hf


@pytest.fixture(scope="session", autouse=True)
def _built_in_models() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVPRISM_MODELS", str(MODELS))
        yield


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What `load` takes, by short name."""
    folder = tmp_path_factory.mktemp("checkpoints")
    random = {
        name: os.fspath(save_random(config, folder / name)) for name, config in CONFIGS.items()
    }
    return {"tiny": "tiny", **random}


@pytest.fixture(params=["tiny", *FULL, *SLIDING])
def name(request):
    return request.param


@pytest.fixture(params=["sdpa", "eager"])
def attention(request, name):
    if (name, request.param) == ("gemma2", "sdpa"):
        pytest.skip("sdpa has no soft cap, so kvprism refuses it for Gemma-2")
    return request.param


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def model(checkpoints, name):
    return hf.load(checkpoints[name])[0]


@pytest.fixture
def llama(checkpoints):
    return hf.load(checkpoints["llama"])[0]
