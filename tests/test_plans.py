"""Plans and their exact cost, before any data exists."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import DROP, INT4, INT8, NATIVE, cache, caches, plan_of, plans

from kvprism.core import MENU, Capability, ComponentShape, Drop, KVShape, LayerShape
from kvprism.errors import BadInput, ShapeMismatch, Unsupported
from kvprism.layout import Split
from kvprism.plans import (
    LayerCounts,
    LayerPlan,
    Plan,
    layer_nbytes,
    manifests_of,
    n_manifests,
    offer_of,
    sent_after,
    stream_nbytes,
)
from kvprism.wire.frames import frame_nbytes

SHAPE = KVShape.dense(layers=1, heads=2, channels=8, tokens=4).layers[0]


def layer_of(k: Any, v: Any | None = None, shape: LayerShape = SHAPE) -> LayerPlan:
    tiers = {"k": np.array(k, np.uint8), "v": np.array(k if v is None else v, np.uint8)}
    return LayerPlan(shape, tiers)


ALL = np.full((2, 4), NATIVE, np.uint8)


@pytest.mark.parametrize(
    "tier_of, message",
    [
        ({"k": ALL}, r"expected tiers for \['k', 'v'\], got \['k'\]"),
        ({"k": ALL, "v": ALL, "q": ALL}, r"got \['k', 'v', 'q'\]"),
        ({"k": ALL, "v": ALL[:1]}, r"'v': expected uint8 \[2, 4\] tiers, got uint8 \[1, 4\]"),
        ({"k": ALL.astype(np.int64), "v": ALL}, "'k': expected uint8 .* got int64"),
    ],
)
def test_tiers_that_do_not_fit_their_layer_are_refused(
    tier_of: dict[str, Any], message: str
) -> None:
    with pytest.raises(ShapeMismatch, match=message):
        LayerPlan(SHAPE, tier_of)


def test_a_tier_beyond_the_menu_is_refused() -> None:
    with pytest.raises(ShapeMismatch, match="layer 0 takes tier 4, the menu has 0 to 3"):
        Plan((layer_of(np.full((2, 4), 4)),))


def test_layers_that_do_not_ascend_are_refused() -> None:
    with pytest.raises(BadInput, match="ascending order"):
        Plan((layer_of(ALL), layer_of(ALL)))
    with pytest.raises(BadInput, match="ascending order"):
        Plan(())


def test_a_quantised_tier_that_is_larger_than_native_is_refused() -> None:
    narrow = KVShape.dense(layers=1, heads=2, channels=2, tokens=4).layers[0]
    with pytest.raises(BadInput, match="'int8' takes 4 bytes"):
        Plan((layer_of(ALL, shape=narrow),))


@given(st.data())
def test_counting_tokens_is_enough_for_the_exact_size(data: st.DataObject) -> None:
    n, start = data.draw(st.integers(1, 70)), data.draw(st.integers(0, 300))
    heads = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    components = (ComponentShape("k", heads[0], 16), ComponentShape("v", heads[1], 64))
    layer = LayerShape(data.draw(st.integers(0, 200)), components, (start, start + n), "bfloat16")
    few = data.draw(st.sets(st.integers(0, 3), min_size=1))
    drawn = st.lists(st.sampled_from(sorted(few)), min_size=n, max_size=n)
    row = np.array(data.draw(drawn), np.uint8)
    split = Split(data.draw(st.none() | st.integers(1, 80)), data.draw(st.none() | st.just(1)))
    sequence = data.draw(st.sampled_from([0, 120, 255]))

    def counts(tokens: tuple[int, int]) -> tuple[int, ...]:
        own = row[tokens[0] - start : tokens[1] - start]
        return tuple(np.bincount(own, minlength=4).tolist())

    laid_out = LayerPlan(layer, {c.name: np.broadcast_to(row, (c.heads, n)) for c in components})
    expected = layer_nbytes(laid_out, MENU, split, sequence)
    assert layer_nbytes(LayerCounts(layer, counts), MENU, split, sequence) == expected
    # Layers that share their counts are sized once, whatever their numbers and manifests' take.
    shapes = [replace(layer, layer_id=number) for number in (0, 127, 128, 300)]
    counted = [LayerCounts(shape, counts) for shape in shapes]
    planned = [LayerPlan(shape, laid_out.tier_of) for shape in shapes]
    assert sent_after(counted, MENU, split, 7, sequence) == sent_after(
        planned, MENU, split, 7, sequence
    )


@given(st.data())
def test_the_size_is_the_sum_of_its_parts(data: st.DataObject) -> None:
    plan = data.draw(plans(data.draw(caches())))
    sequence = nbytes = 0
    for layer in plan.layers:
        more, count = layer_nbytes(layer, plan.menu, plan.split, sequence)
        assert count == n_manifests(layer.shape, plan.split)
        assert count == len(list(manifests_of(layer, plan.menu, plan.split, sequence)))
        nbytes, sequence = nbytes + more, sequence + count
    frames = plan.nbytes - nbytes - frame_nbytes(offer_of(plan.shape, plan.menu))
    assert plan.nbytes == stream_nbytes(plan.layers, plan.menu, plan.split)
    assert 0 < frames < 100, "what remains is END"


def test_fractions_are_of_the_reference_and_of_native() -> None:
    plan = plan_of(cache(tokens=400, channels=64, dtype="float32"), NATIVE)
    assert plan.fraction == plan.nbytes / plan.shape.reference_nbytes
    assert plan.fraction == 2 * plan.fraction_native
    assert 2.0 < plan.fraction < 2.02


def test_the_histogram_counts_rows() -> None:
    plan = Plan((layer_of([[0, 1, 1, 3], [2, 2, 2, 3]], [[1, 1, 1, 3], [1, 1, 1, 3]]),))
    assert plan.histogram() == {"native": 1, "int8": 8, "int4": 3, "drop": 4}


def test_keys_and_values_of_one_map_share_it_on_the_wire() -> None:
    [manifest] = manifests_of(layer_of([[0, 1, 2, 3]] * 2), MENU)
    assert len(manifest.maps) == 1 and [block.map for block in manifest.blocks] == [0, 0]
    [manifest] = manifests_of(layer_of([[0, 1, 2, 3]] * 2, [[1] * 4] * 2), MENU)
    assert len(manifest.maps) == 2 and [block.map for block in manifest.blocks] == [0, 1]


def test_components_of_fewer_heads_stand_only_in_the_ranges_that_they_have() -> None:
    components = (ComponentShape("k", 1, 8), ComponentShape("v", 3, 8))
    shape = LayerShape(0, components, (0, 2), "bfloat16")
    tiers = {"k": np.zeros((1, 2), np.uint8), "v": np.zeros((3, 2), np.uint8)}
    manifests = list(manifests_of(LayerPlan(shape, tiers), MENU, Split(heads=2)))
    found = [[(block.component, block.heads) for block in m.blocks] for m in manifests]
    assert found == [[("k", (0, 1)), ("v", (0, 2))], [("v", (2, 3))]]


@pytest.mark.parametrize(
    "shape, message",
    [
        (KVShape.dense(layers=1, heads=2**16, channels=4, tokens=1), "65535"),
        (KVShape.dense(layers=1, heads=1, channels=2**16, tokens=1), "65535"),
        (KVShape.dense(layers=1, heads=1, channels=4, tokens=2**32), "4294967295"),
        (KVShape.dense(layers=4097, heads=1, channels=4, tokens=1), "length <= 4096"),
        (KVShape((LayerShape(2**16, SHAPE.components, (0, 1), "float32"),)), "65535"),
        (
            KVShape((LayerShape(0, (ComponentShape("k" * 65, 1, 4),), (0, 1), "float32"),)),
            "length <= 64",
        ),
    ],
)
def test_what_the_format_cannot_name_is_refused_by_the_sender(shape: KVShape, message: str) -> None:
    with pytest.raises(BadInput, match=f"the format has no room .*{message}"):
        offer_of(shape, MENU)


def test_names_of_another_length_are_refused_by_the_sender() -> None:
    shape = KVShape((SHAPE,))
    for ids in [(b"short",), (bytes(16), b"f"), (bytes(16), bytes(32), bytes(31))]:
        with pytest.raises(BadInput, match="the format has no room"):
            offer_of(shape, MENU, *ids)


UNIFORM_DROP = layer_of([[NATIVE, DROP, INT8, INT4]] * 2)
DROP_BY_HEAD = layer_of([[NATIVE, DROP, INT8, INT4], [DROP, NATIVE, INT8, INT4]])
DROP_BY_COMPONENT = layer_of([[NATIVE, DROP, INT8, INT4]] * 2, [[NATIVE] * 4] * 2)


@pytest.mark.parametrize(
    "layer, drop, block, refused",
    [
        (layer_of([[NATIVE, INT8, INT8, INT4]] * 2), "none", 16, None),
        (UNIFORM_DROP, "none", 1, "drops tokens and the receiver's capability is drop=none"),
        (UNIFORM_DROP, "uniform", 1, None),
        (UNIFORM_DROP, "per_head", 1, None),
        (UNIFORM_DROP, "uniform", 16, "blocks of 16 and only blocks of 1 are built"),
        (DROP_BY_HEAD, "uniform", 1, "other tokens in some heads or components"),
        (DROP_BY_HEAD, "per_head", 1, None),
        (DROP_BY_COMPONENT, "uniform", 1, "other tokens in some heads or components"),
        (DROP_BY_COMPONENT, "per_head", 1, None),
    ],
)
def test_missing_tokens_are_refused_where_the_receiver_cannot_hold_them(
    layer: LayerPlan, drop: Drop, block: int, refused: str | None
) -> None:
    capability = Capability(drop=drop, block=block)
    if refused is None:
        layer.check_drops(MENU, capability)
    else:
        with pytest.raises(Unsupported, match=refused):
            layer.check_drops(MENU, capability)
