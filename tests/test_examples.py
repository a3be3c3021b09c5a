"""The examples as a user runs them, on small random checkpoints in the genuine formats."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from kvprism.commands.probe import run_probe
from kvprism.evaluate.haystack import sentences
from kvprism.integrations.decode_role import DecodeWorker
from kvprism.integrations.hf import load
from kvprism.integrations.prefill_role import PrefillWorker
from kvprism.profiles import Profile

EXAMPLES = Path(__file__).parents[1] / "examples"
SHAPE: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 1024,
    "initializer_range": 0.15,
}
OUTLIER = 9  # the key channel whose bias stands out


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(sentences(np.random.default_rng(0), 400))
    return path


def checkpoint(folder: Path, config: Any, bias: float | None = None) -> Path:
    """Random weights; `bias` on one channel of layer 1's keys, as Qwen2.5's `k_proj.bias` has."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    if bias is not None:
        with torch.no_grad():
            model.model.layers[1].self_attn.k_proj.bias[OUTLIER] = bias
    model.save_pretrained(folder)
    _, tokenizer = load("tiny")
    tokenizer.save_pretrained(folder)
    return folder


def probed(model: Path, text: Path, out: Path) -> dict[str, Any]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        [EXAMPLES / "probe-checkpoint", model, text, out],
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": path, "TOKENS": "300"},
    )
    assert done.returncode == 0, done.stderr
    assert "verdict: " in done.stdout and "recommended: " in done.stdout
    return {name: json.loads((out / f"{name}.json").read_text()) for name in ("probe", "run")}


def test_a_qwen2_checkpoint_with_a_huge_key_bias(text: Path, tmp_path: Path) -> None:
    """The bias stands in the file, is found, and is taken away by an offset."""
    model = checkpoint(tmp_path / "qwen", transformers.Qwen2Config(**SHAPE), bias=300.0)
    stored = load_file(model / "model.safetensors")["model.layers.1.self_attn.k_proj.bias"]
    assert stored[OUTLIER] == 300.0
    found = probed(model, text, tmp_path)
    probe = found["probe"]
    assert probe["outlier_layers"] == [1]
    pair = {OUTLIER % 32, OUTLIER % 32 + 32}  # RoPE turns both
    assert {o["channel"] for o in probe["layers"][1]["outliers"]} <= pair
    assert "offset" in probe["conditioning"][1]
    assert probe["layers"][1]["conditioned"]["keys"] < probe["layers"][1]["int4"]["keys"] / 2
    assert found["run"]["profile"] == Profile.load(tmp_path / "profile.json").hash.hex()


def test_a_llama_checkpoint_with_the_rope_scaling_of_3_1(text: Path, tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    }
    config = transformers.LlamaConfig(**SHAPE, rope_parameters=rope)
    model = str(checkpoint(tmp_path / "llama", config))
    # What the script runs, in this process: four more would each import transformers.
    found = run_probe(model, text, say=lambda _: None)
    # Random weights find no needle, so that the verdict is none: the model itself does not find it.
    assert found.json["verdict"] == "inconclusive"
    assert found.json["raw"]["successes"] < found.json["raw"]["trials"] == 3
    prefill = PrefillWorker(model, bytes(32), profile=found.profile)
    prefill.prefill(list(range(5, 305)))
    planned = prefill.plan("spectrum-adaptive", "40%")
    with DecodeWorker(model, bytes(32), profile=found.profile) as decode:
        with ThreadPoolExecutor(1) as pool:
            received = pool.submit(decode.receive, 10.0)
            prefill.send(decode.address())
        assert received.result()["fraction"] == planned["fraction"] <= 0.4
        assert decode.generate(list(range(5, 305)), 4, ignore_eos=True)["text"]
