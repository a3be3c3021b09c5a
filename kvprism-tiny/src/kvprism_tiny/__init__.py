"""The trained weights that kvprism carries: folders in the transformers checkpoint format."""

from pathlib import Path

__all__ = ["names", "path"]

_HERE = Path(__file__).parent


def names() -> list[str]:
    """Names of the models in this distribution, sorted."""
    return sorted(config.parent.name for config in _HERE.glob("*/config.json"))


def path(name: str) -> Path:
    """The checkpoint folder of `name`.

    Raises:
        ValueError: no such model here.
    """
    if name not in names():
        raise ValueError(f"unknown model {name!r}; known: {', '.join(names())}")
    return _HERE / name
