"""A table from name to value: duplicates raise, unknown names list the known ones."""

from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

from kvprism.errors import UnknownName

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """Read-only after import: rows are given once, at construction.

    Raises:
        ValueError: two rows share a name.
        UnknownName: a look-up by a name that is not there.
    """

    def __init__(self, kind: str, rows: list[tuple[str, T]]) -> None:
        self.kind = kind
        self._rows = dict(rows)
        if len(self._rows) != len(rows):
            raise ValueError(f"duplicate {kind} in {[name for name, _ in rows]}")

    def __getitem__(self, name: str) -> T:
        if name not in self._rows:
            raise UnknownName(self.kind, name, list(self._rows))
        return self._rows[name]

    def __contains__(self, name: object) -> bool:
        return name in self._rows

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)
