"""A small recipe and a text of the project's own: a whole run takes seconds."""

from pathlib import Path

import numpy as np
import pytest

from kvprism.evaluate.haystack import sentences
from training.recipe import Recipe

RECIPE = """
name = "small"
about = "For tests."
seed = 1
vocabulary = 400
[model]
model_type = "llama"
hidden_size = 32
intermediate_size = 48
num_hidden_layers = 2
num_attention_heads = 2
num_key_value_heads = 1
head_dim = 16
max_position_embeddings = 128
tie_word_embeddings = true
[optimizer]
learning_rate = 1e-2
embedding_learning_rate = 1e-2
betas = [0.9, 0.98]
weight_decay = 0.05
clip = 1.0
warmup_steps = 5
[[stages]]
length = 64
batch = 2
tokens = [6400, 12800]
mixture = { text = 0.5, copy = 0.5 }
tasks = { needle = 1.0 }
gate = { "copy loss" = 6.5 }
[[stages]]
length = 128
batch = 1
tokens = [6400, 6400]
mixture = { text = 0.3, dense = 0.3, hidden = 0.4 }
tasks = { needle = 0.5, few-shot = 0.5 }
learning_rate = [1.0, 0.0]
"""


@pytest.fixture(scope="session")
def text() -> str:
    return sentences(np.random.default_rng(0), 6000)


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def recipe(recipe_file: Path) -> Recipe:
    return Recipe.read(str(recipe_file))
