"""What the evaluation's tests share: the built-in model as a subject, and text of our own."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from kvprism.evaluate.haystack import sentences
from kvprism.evaluate.measure import LoadedModel


@pytest.fixture(scope="session")
def subject(tiny: tuple[Any, Any]) -> LoadedModel:
    return LoadedModel("tiny", *tiny)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 9,000 tokens of generated filler."""
    path = tmp_path_factory.mktemp("text") / "filler.txt"
    path.write_text(sentences(np.random.default_rng(7), 400))
    return path


@pytest.fixture(scope="session")
def merging_tokenizer() -> Any:
    """A tokenizer that joins a space with the digits after it, and has no begin-of-text token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    rng = np.random.default_rng(0)
    numbers = "".join(f" {rng.integers(10**5):05d}" for _ in range(3000))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([sentences(rng, 500), numbers], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe)
