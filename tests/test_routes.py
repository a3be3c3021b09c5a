"""Routes as text: what is read is what was written, and what is no route is refused by its part."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvprism.errors import BadInput
from kvprism.routes import FULL, LayerRoute, Route, nearest, parse_layers, ranges_of


def test_ranges_join_neighbours_only() -> None:
    assert ranges_of(["plain", "conditioned", "conditioned", "plain"]) == (
        "0: plain, 1-2: conditioned, 3: plain"
    )


layers = st.builds(LayerRoute, st.sampled_from(["tova", "streaming-llm"]), st.integers(1, 9999))


@given(st.lists(st.one_of(layers, st.just(LayerRoute(FULL))), min_size=1, max_size=40))
def test_a_line_comes_back_as_its_layers(drawn: list[LayerRoute]) -> None:
    line = ranges_of([str(layer) for layer in drawn])
    assert parse_layers(line) == tuple(drawn)


@pytest.mark.parametrize(
    "line, why",
    [
        ("", "'' is not of the form"),
        ("0: snapkv", "a policy with one"),
        ("0: full@3", "full without a number"),
        ("0: snapkv@0", "snapkv. and 0"),
        ("1: snapkv@3", "'1: snapkv@3' where layer 0 was expected"),
        ("0-1: snapkv@3, 3: tova@3", "'3: tova@3' where layer 2 was expected"),
        ("0-2: snapkv@3, 2: tova@3", "where layer 3 was expected"),
        ("0: snapkv@3,1: tova@3", "is not of the form"),
        ("0: snapkv@3 ", "is not of the form"),
    ],
)
def test_other_lines_are_refused(line: str, why: str) -> None:
    with pytest.raises(BadInput, match=why):
        parse_layers(line)


def test_layers_sum_to_the_budget_exactly_unless_one_is_full() -> None:
    Route("polykv", 100, parse_layers("0: tova@60, 1-2: snapkv@120"))
    Route("polykv", 100, parse_layers("0: full, 1-2: snapkv@120"))
    with pytest.raises(BadInput, match=r"3 layers of 100 tokens on average are 300 .* are 299"):
        Route("polykv", 100, parse_layers("0: tova@59, 1-2: snapkv@120"))
    with pytest.raises(BadInput, match="at least one layer"):
        Route("polykv", 100, ())


def test_a_decode_phase_is_under_the_same_budget_and_for_the_same_layers() -> None:
    layers = parse_layers("0: tova@60, 1-2: snapkv@120")
    Route("polykv", 100, layers, decode=parse_layers("0-1: h2o@110, 2: tova@80"))
    Route("polykv", 100, layers, decode=parse_layers("0: full, 1-2: tova@80"))
    with pytest.raises(BadInput, match=r"route 0-2: h2o@110 .* are 300 tokens, these are 330"):
        Route("polykv", 100, layers, decode=parse_layers("0-2: h2o@110"))
    with pytest.raises(BadInput, match="decode phase is for 2 layers, expected 3"):
        Route("polykv", 100, layers, decode=parse_layers("0-1: h2o@100"))


def test_a_route_serves_budgets_near_its_own() -> None:
    routes = [Route("polykv", n, parse_layers(f"0-1: tova@{n}")) for n in (128, 256)]
    assert [nearest(routes, n) for n in (128, 180, 182, 256, 360)] == [
        routes[0], routes[0], routes[1], routes[1], routes[1]
    ]  # fmt: skip
    assert nearest(routes, 90) is None and nearest(routes, 363) is None and nearest([], 1) is None
