"""The table from name to value."""

import pytest

from kvprism.errors import UnknownName
from kvprism.registry import Registry


def test_rows_are_looked_up_by_name_in_their_order() -> None:
    table = Registry("colour", [("red", 1), ("blue", 2)])
    assert list(table) == ["red", "blue"] and len(table) == 2
    assert table["blue"] == 2 and "red" in table and "green" not in table


def test_an_unknown_name_lists_those_that_are_known() -> None:
    with pytest.raises(UnknownName, match="unknown colour 'green'; known: red, blue") as raised:
        Registry("colour", [("red", 1), ("blue", 2)])["green"]
    assert isinstance(raised.value, ValueError)
    assert raised.value.known == ["red", "blue"]


def test_two_rows_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="duplicate colour"):
        Registry("colour", [("red", 1), ("red", 2)])
