"""Text files, and text as token ids. No torch here."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvprism.errors import BadInput

Ids = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class TextFile:
    """A text file in a tokenizer's ids, read when first asked for.

    Raises:
        BadInput: by any property, when it cannot be read as UTF-8.
    """

    path: Path
    tokenizer: Any

    @cached_property
    def text(self) -> str:
        return read_text(self.path)

    @cached_property
    def ids(self) -> Ids:
        return encode(self.tokenizer, self.text)

    @property
    def digest(self) -> str:
        """SHA-256, for headers: a path says nothing about contents."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def read_text(path: Path) -> str:
    """A text file; `BadInput` when it cannot be read as UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read {path} as UTF-8 text: {error}") from error


def encode(tokenizer: Any, text: str) -> Ids:
    """Token ids without special tokens."""
    # Not verbose: it is no mistake that a whole text is longer than the model's context.
    ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    return np.array(ids, np.int64)
