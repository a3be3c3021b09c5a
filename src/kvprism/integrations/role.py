"""What a prefill and a decode worker have in common."""

from typing import Any, TypeVar

from kvprism.errors import BadInput
from kvprism.integrations import hf
from kvprism.profiles import Profile

T = TypeVar("T")


class Role:
    """A model, its tokenizer, and the token and the profile that both ends share."""

    def __init__(self, model: str, token: bytes, profile: Profile | None) -> None:
        self._model, self._tokenizer = hf.load(model)
        self._token, self._profile = token, profile
        self._fingerprint = hf.fingerprint(self._model, self._tokenizer)
        if profile is not None:
            profile.check(self._fingerprint)

    def describe(self) -> dict[str, Any]:
        """The size of the model."""
        return {"parameters": sum(p.numel() for p in self._model.parameters())}


def required(value: T | None, what: str) -> T:
    """What an earlier operation left."""
    if value is None:
        raise BadInput(f"nothing was {what} yet")
    return value
