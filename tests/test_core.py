"""Shapes, budgets and capabilities: what they refuse, and that sums are exact."""

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kvprism.core import (
    MENU,
    Budget,
    Capability,
    ComponentShape,
    KVShape,
    LayerShape,
    apportion,
    least_total,
)
from kvprism.errors import BadInput, ShapeMismatch, UnknownName

K = ComponentShape("k", 2, 8)
WEIGHTS = st.lists(st.integers(1, 50) | st.floats(0.01, 100), min_size=1, max_size=6)


def layer(**changes: Any) -> LayerShape:
    values = {"layer_id": 0, "components": (K,), "token_range": (0, 4), "dtype": "bfloat16"}
    return LayerShape(**{**values, **changes})


def test_sizes_count_every_value_of_every_component() -> None:
    components = (ComponentShape("k", 2, 8), ComponentShape("v", 3, 4))
    shape = layer(components=components, token_range=(10, 15), dtype="float32")
    assert shape.n_tokens == 5
    assert shape.n_values == 5 * (2 * 8 + 3 * 4)
    assert shape.reference_nbytes == 2 * shape.n_values
    assert shape.native_nbytes == 4 * shape.n_values


def test_token_ranges_come_once_each_in_the_order_of_their_layers() -> None:
    found = [(6, 10), (0, 10), (6, 10)]
    shape = KVShape(tuple(layer(layer_id=i, token_range=each) for i, each in enumerate(found)))
    assert shape.token_ranges == ((6, 10), (0, 10))
    assert shape.next_position == 10


def test_the_next_position_is_the_end_of_the_tokens_not_their_number() -> None:
    assert KVShape((layer(token_range=(10, 15)),)).next_position == 15


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"layer_id": -1}, "layer ids count from 0, got -1"),
        ({"token_range": (4, 4)}, r"\[4, 4\) holds no token"),
        ({"token_range": (-1, 4)}, r"\[-1, 4\) holds no token"),
        ({"dtype": "float8"}, "'float8' is not in .*bfloat16"),
        ({"components": ()}, "named once"),
        ({"components": (K, K)}, "named once"),
        ({"components": (ComponentShape("k", 0, 8),)}, "got 0 heads of 8"),
        ({"components": (ComponentShape("k", 1, 7),)}, "even number of channels, got 1 heads of 7"),
        ({"components": (ComponentShape("k", 1, 0),)}, "got 1 heads of 0"),
    ],
)
def test_impossible_layers_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        layer(**changes)


@pytest.mark.parametrize("ids", [(), (1, 0), (0, 0)])
def test_layers_must_ascend(ids: tuple[int, ...]) -> None:
    with pytest.raises(BadInput, match="ascending order"):
        KVShape(tuple(layer(layer_id=i) for i in ids))


def test_a_component_that_is_not_there_is_named_with_those_that_are() -> None:
    assert layer().component("k") == K
    with pytest.raises(ShapeMismatch, match=r"layer 0 has components \['k'\], not 'q'"):
        layer().component("q")


SHAPE = KVShape.dense(layers=2, heads=1, channels=100, tokens=10)  # 8000 reference bytes


@pytest.mark.parametrize(
    "text, nbytes",
    [
        ("0.30", 2400),
        (0.3, 2400),
        (1, 8000),
        (".5", 4000),
        ("30%", 2400),
        (" 30 % ", 2400),
        ("0.29", 2320),
        ("29%", 2320),
        ("250%", 20_000),
        ("100b", 100),
        ("1.5KiB", 1536),
        ("2kb", 2000),
        ("512MiB", 2**29),
        ("1GiB", 2**30),
        ("3tok", 2400),
        ("0.5tok", 400),
        (Budget(7), 7),
    ],
)
def test_budgets_are_converted_exactly(text: str | float | Budget, nbytes: int) -> None:
    assert Budget.parse(text, SHAPE).nbytes == nbytes


def test_a_budget_in_tokens_counts_a_sliding_window_for_no_more_than_it_holds() -> None:
    window, whole = (layer(layer_id=i, token_range=(start, 10)) for i, start in enumerate((6, 0)))
    shape = KVShape((window, whole))
    token = whole.reference_nbytes // 10
    for number, counted in ((3, 3 + 3), (4, 4 + 4), (7, 4 + 7), (10, 4 + 10), (20, 4 + 20)):
        assert Budget.parse(f"{number}tok", shape).nbytes == counted * token


def test_no_byte_is_lost_to_binary_fractions() -> None:
    hundred = KVShape((layer(components=(ComponentShape("k", 1, 50),), token_range=(0, 1)),))
    for percent in range(1, 101):
        assert Budget.parse(f"{percent}%", hundred).nbytes == percent
        assert Budget.parse(f"{percent / 100:.2f}", hundred).nbytes == percent


@pytest.mark.parametrize(
    "text", ["", "much", "-0.3", "nan", "inf", "1e3", "30 percent", "5ib", "0x10", "%", "1,5"]
)
def test_what_is_no_budget_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match=r"is none of 0.30, 30%, 512MiB, 512tok"):
        Budget.parse(text, SHAPE)


@pytest.mark.parametrize("text", ["0", 0.0, "0%", "0tok", "0.4b", 1e-4])
def test_a_budget_below_one_byte_is_refused(text: str | float) -> None:
    with pytest.raises(BadInput, match="at least 1 byte, got 0"):
        Budget.parse(text, SHAPE)


@pytest.mark.parametrize("text", ["30", 30, 512, "4.1"])
def test_a_number_that_lost_its_unit_is_refused(text: str | float) -> None:
    with pytest.raises(BadInput, match=f"name the unit: {text}%, {text}MiB or {text}tok"):
        Budget.parse(text, SHAPE)


@given(st.integers(1, 10**12), WEIGHTS)
def test_shares_are_whole_proportional_and_sum_exactly(total: int, weights: list[float]) -> None:
    shares = apportion(total, weights)
    assert sum(shares) == total
    for share, weight in zip(shares, weights, strict=True):
        exact = total * weight / math.fsum(weights)
        assert exact * (1 - 1e-9) - 1 < share < exact * (1 + 1e-9) + len(weights)


@given(WEIGHTS)
def test_a_larger_total_makes_no_share_smaller(weights: list[float]) -> None:
    shares = [apportion(total, weights) for total in range(40)]
    for fewer, more in pairwise(shares):
        assert sum(b - a for a, b in zip(fewer, more, strict=True)) == 1
        assert all(b >= a for a, b in zip(fewer, more, strict=True))


@given(st.data(), WEIGHTS)
def test_the_least_total_meets_every_need_and_one_less_does_not(
    data: st.DataObject, weights: list[float]
) -> None:
    needs = data.draw(st.lists(st.integers(1, 30), min_size=len(weights), max_size=len(weights)))
    total = least_total(needs, weights)

    def meets(shares: list[int]) -> bool:
        return all(share >= need for share, need in zip(shares, needs, strict=True))

    assume(total < 10**5)
    assert meets(apportion(total, weights))
    assert not meets(apportion(total - 1, weights))


def test_a_budget_is_split_into_budgets() -> None:
    assert [part.nbytes for part in Budget(10).split([1, 1, 2])] == [3, 2, 5]
    with pytest.raises(BadInput, match="at least 1 byte"):
        Budget(2).split([1, 1, 1])


@pytest.mark.parametrize("weights", [[], [1, 0], [1, -1], [1, math.nan], [math.inf]])
def test_impossible_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(BadInput, match="positive and finite"):
        Budget(10).split(weights)


def test_a_capability_allows_what_can_be_held() -> None:
    assert [tier.name for tier in MENU if Capability().allows(tier)] == [
        "native",
        "int8",
        "int4",
        "drop",
    ]
    assert not Capability(drop="none").allows(MENU[3])
    assert not Capability(codecs=("kvp.native/1",)).allows(MENU[1])


def test_impossible_capabilities_are_refused() -> None:
    with pytest.raises(UnknownName, match="'some'; known: none, uniform, per_head"):
        Capability(drop="some")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="at least 1 token"):
        Capability(block=0)
    with pytest.raises(BadInput, match="reads a codec"):
        Capability(codecs=())
