"""What the tensors of a request refuse to be."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from strategies import cache

from kvprism.errors import BadInput, ShapeMismatch
from kvprism.tensors import LayerKV, LayerView, RequestKV


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    "components, positions, message",
    [
        ({"k": zeros(2, 3, 4)}, [0, 1], r"'k': expected \[head, 2, channel\].*got \[2, 3, 4\]"),
        ({"k": zeros(3, 4)}, [0, 1, 2], r"got \[3, 4\]"),
        ({"k": zeros(1, 2, 4, dtype=torch.float64)}, [0, 1], "torch.float64"),
        ({"k": zeros(1, 2, 4), "v": zeros(1, 2, 4).half()}, [0, 1], "float16.*float32"),
        ({}, [0, 1], "share one dtype, got"),
        ({"k": zeros(1, 2, 4)}, [1, 1], "must ascend from 0 on, got 1 as number 1"),
        ({"k": zeros(1, 2, 4)}, [-1, 1], "must ascend from 0 on, got -1 as number 0"),
        ({"k": zeros(1, 2, 4)}, [0.0, 1.0], r"int64 \[token\] positions, got torch.float32"),
        ({"k": zeros(1, 1, 4)}, [[0]], r"int64 \[token\] positions, got torch.int64 \[1, 1\]"),
    ],
)
def test_impossible_layers_are_refused(
    components: dict[str, torch.Tensor], positions: list[Any], message: str
) -> None:
    with pytest.raises(ShapeMismatch, match=message):
        LayerKV(3, components, torch.tensor(positions))


def test_a_layer_knows_its_token_range() -> None:
    shape = cache(tokens=5, start=7).layers[0].shape()
    assert shape.token_range == (7, 12) and shape.dtype == "bfloat16"


@pytest.mark.parametrize(
    "positions, message", [([0, 2], "missing between 0 and 3"), ([], "holds no token")]
)
def test_a_layer_with_missing_tokens_has_no_shape(positions: list[int], message: str) -> None:
    n = len(positions)
    layer = LayerKV(0, {"k": zeros(1, n, 4)}, torch.tensor(positions, dtype=torch.int64))
    with pytest.raises(ShapeMismatch, match=message):
        layer.shape()


def test_the_next_position_lies_beyond_every_token() -> None:
    layers = cache(tokens=5).layers
    with pytest.raises(BadInput, match="holds position 4, so the next position must be larger"):
        RequestKV(layers, 4)
    assert RequestKV(layers, 5).resident_nbytes == 2 * 2 * 2 * 5 * 8 * 2


@pytest.mark.parametrize("shape", [(3, 4, 8), (2, 17, 8), (2, 0, 8), (2, 4, 6), (4, 8)])
def test_queries_of_another_model_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeMismatch, match=r"expected queries .multiple of 2 heads, 1 to 16"):
        LayerView(cache().layers[0], torch.zeros(shape))
    LayerView(cache().layers[0], torch.zeros(6, 16, 8))


def test_what_is_found_of_a_view_is_found_once_and_not_for_another() -> None:
    found: list[str] = []

    def find() -> int:
        found.append("again")
        return len(found)

    one, other = LayerView(cache().layers[0]), LayerView(cache().layers[0])
    assert [one.once("a", find), one.once("a", find), one.once("b", find)] == [1, 1, 2]
    # Nor for a copy that sees something else.
    assert (other.once("a", find), replace(one, softmax_scale=2.0).once("a", find)) == (3, 4)
