"""Models for these tests: the built-in one, and random ones saved as genuine checkpoints."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from kvprism.integrations import hf

MODELS = Path(__file__).parents[2] / "kvprism-tiny" / "src" / "kvprism_tiny"
SHAPE = {
    "vocab_size": 2048,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 2,
    "bos_token_id": 0,
    "eos_token_id": None,
    # Attention far from uniform, so that a dropped token shows, and yet rounding stays near 1e-5.
    "initializer_range": 0.15,
}


def save_random(config: transformers.PreTrainedConfig, folder: Path) -> Path:
    """A checkpoint with random weights (norms too, seed 0) and the tokenizer of `tiny`."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder)
    for file in (MODELS / "tiny").glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def _built_in_models() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVPRISM_MODELS", str(MODELS))
        yield


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What `load` takes, by short name."""
    folder = tmp_path_factory.mktemp("checkpoints")
    llama = transformers.LlamaConfig(**SHAPE, head_dim=16)
    qwen3 = transformers.Qwen3Config(**SHAPE, head_dim=12, tie_word_embeddings=True)
    return {
        "tiny": "tiny",
        "llama": os.fspath(save_random(llama, folder / "llama")),
        "qwen3": os.fspath(save_random(qwen3, folder / "qwen3")),
    }


@pytest.fixture(params=["tiny", "llama", "qwen3"])
def name(request):
    return request.param


@pytest.fixture(params=["sdpa", "eager"])
def attention(request):
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
