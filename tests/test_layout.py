"""Planes, tier maps and sizes against brute force."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvprism.core import INT4, INT8, MENU, NATIVE, PUBLISHED_MENU, KVShape, Tier
from kvprism.errors import BadInput, ProtocolViolation, Unsupported
from kvprism.layout import (
    INDEX_LIST,
    MAX_MANIFEST_NBYTES,
    PACKED,
    UNIFORM,
    WHOLE,
    Plane,
    Split,
    check_menu,
    pack_tier_map,
    plane_nbytes,
    ranges,
    row_nbytes,
    rows_in,
    split_of,
    unpack_tier_map,
)
from kvprism.wire.messages import TierMap


@st.composite
def tier_maps(draw: st.DrawFn) -> NDArray[np.uint8]:
    """Maps of every kind: one tier, a few exceptions, many tiers, equal or different heads."""
    heads, tokens = draw(st.integers(1, 5)), draw(st.integers(1, 300))
    palette = draw(st.lists(st.integers(0, 15), min_size=1, max_size=16, unique=True))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    background = draw(st.sampled_from([0.0, 0.9, 0.99]))
    rows = 1 if draw(st.booleans()) else heads
    chosen = rng.choice(np.array(palette, np.uint8), (rows, tokens))
    chosen[rng.random((rows, tokens)) < background] = palette[0]
    return np.broadcast_to(chosen, (heads, tokens))


def smallest(tier_of: NDArray[np.uint8]) -> tuple[int, int, int]:
    """(bytes of data, mode, bits) of the best encoding, by trying them all."""
    agree = all((tier_of[0] == row).all() for row in tier_of)
    flat = (tier_of[:1] if agree else tier_of).reshape(-1)
    used, counts = np.unique(flat, return_counts=True)
    if len(used) == 1:
        return (0, UNIFORM, 0)
    found = [
        (-(-len(flat) * bits // 8), PACKED, bits) for bits in (1, 2, 4) if 2**bits >= len(used)
    ]
    found.append((sum(4 + 4 * n for n in np.sort(counts)[:-1].tolist()), INDEX_LIST, 0))
    return min(found)


@given(tier_maps())
def test_the_smallest_encoding_of_a_map_is_chosen_and_comes_back(
    tier_of: NDArray[np.uint8],
) -> None:
    packed = pack_tier_map(tier_of)
    assert (len(packed.data), packed.mode, packed.bits) == smallest(tier_of)
    agree = bool((tier_of == tier_of[:1]).all())
    assert packed.rows == (1 if agree else len(tier_of))
    assert sorted(packed.palette) == np.unique(tier_of).tolist()
    heads, tokens = tier_of.shape
    assert (unpack_tier_map(packed, heads, tokens, 16) == tier_of).all()


def test_each_mode_is_written_as_the_format_says() -> None:
    uniform = pack_tier_map(np.full((3, 5), 2, np.uint8))
    assert uniform == TierMap(1, UNIFORM, 0, b"\x02", b"")
    one_bit = pack_tier_map(np.array([[3, 1, 1, 3, 1, 1, 1, 1, 3]], np.uint8))
    assert one_bit == TierMap(1, PACKED, 1, b"\x01\x03", bytes([0b00001001, 1]))
    two_bits = pack_tier_map(np.array([[0, 1, 2], [2, 2, 0]], np.uint8))
    assert two_bits == TierMap(2, PACKED, 2, b"\x00\x01\x02", bytes([0b10100100, 0b0010]))
    four_bits = pack_tier_map(np.array([[0, 1, 2, 3, 9]], np.uint8))
    assert four_bits == TierMap(1, PACKED, 4, b"\x00\x01\x02\x03\x09", b"\x10\x32\x04")
    exceptions = np.full((1, 400), 2, np.uint8)
    exceptions[0, [7, 300]], exceptions[0, 9] = 1, 0
    listed = words(2, 7, 300, 1, 9)
    assert pack_tier_map(exceptions) == TierMap(1, INDEX_LIST, 0, b"\x02\x01\x00", listed)


@pytest.mark.parametrize("tokens, mode", [(64, PACKED), (65, INDEX_LIST)])
def test_of_two_encodings_of_one_size_the_lower_mode_is_written(tokens: int, mode: int) -> None:
    one_exception = np.zeros((1, tokens), np.uint8)
    one_exception[0, 5] = 1
    packed = pack_tier_map(one_exception)
    assert (len(packed.data), packed.mode) == (8, mode)


def words(*values: int) -> bytes:
    return np.array(values, "<u4").tobytes()


@pytest.mark.parametrize(
    "tier_map, message",
    [
        (TierMap(3, UNIFORM, 0, b"\x00", b""), "3 rows for 2 heads"),
        (TierMap(1, UNIFORM, 0, b"", b""), "palette of 0"),
        (TierMap(1, UNIFORM, 0, b"\x04", b""), "tier 4 in a menu of 4"),
        (TierMap(1, PACKED, 1, b"\x01\x01", b"\0"), "twice"),
        (TierMap(1, UNIFORM, 0, b"\x00\x01", b""), "uniform map with data"),
        (TierMap(1, UNIFORM, 0, b"\x00", b"x"), "uniform map with data"),
        (TierMap(1, 3, 0, b"\x00", b""), "mode 3"),
        (TierMap(1, PACKED, 3, b"\x00\x01", b"\0\0"), "3 bits"),
        (TierMap(1, PACKED, 0, b"\x00\x01", b""), "0 bits"),
        (TierMap(1, PACKED, 1, b"\x00\x01", b""), "0 bytes for 5 entries"),
        (TierMap(1, PACKED, 1, b"\x00\x01", b"\0\0"), "2 bytes for 5 entries"),
        (TierMap(1, PACKED, 1, b"\x00\x01", b"\x20"), "padding bits"),
        (TierMap(1, PACKED, 2, b"\x00\x01\x02", b"\x03\0"), "beyond the palette"),
        (TierMap(1, INDEX_LIST, 0, b"\x00\x01", b"\0\0\0"), "3 bytes"),
        (TierMap(1, INDEX_LIST, 0, b"\x00\x01", b""), "ends early"),
        (TierMap(1, INDEX_LIST, 0, b"\x00\x01", words(2, 1)), "ends early"),
        (TierMap(1, INDEX_LIST, 0, b"\x00\x01", words(2**32 - 1, 1)), "ends early"),
        (TierMap(1, INDEX_LIST, 0, b"\x00\x01", words(2, 3, 1)), "do not ascend"),
        (TierMap(1, INDEX_LIST, 0, b"\x00\x01", words(2, 3, 3)), "do not ascend"),
        (TierMap(1, INDEX_LIST, 0, b"\x00\x01", words(1, 5)), "beyond the block"),
        (TierMap(1, INDEX_LIST, 0, b"\x00\x01\x02", words(1, 3, 1, 3)), "listed twice"),
        (TierMap(1, INDEX_LIST, 0, b"\x00\x01", words(1, 3, 0)), "after the index list"),
    ],
)
def test_malformed_maps_are_refused(tier_map: TierMap, message: str) -> None:
    with pytest.raises(ProtocolViolation, match=f"(malformed tier map|tier map).*{message}"):
        unpack_tier_map(tier_map, 2, 5, 4)


@given(
    st.integers(0, 4),
    st.integers(0, 5),
    st.binary(max_size=17),
    st.binary(max_size=40),
    st.integers(0, 4),
)
def test_random_maps_are_well_formed_or_refused(
    rows: int, bits: int, palette: bytes, data: bytes, mode: int
) -> None:
    try:
        tier_of = unpack_tier_map(TierMap(rows, mode, bits, palette, data), 2, 9, 4)
    except ProtocolViolation:
        return
    assert tier_of.shape == (2, 9) and tier_of.max() < 4


@pytest.mark.parametrize("menu", [MENU, PUBLISHED_MENU], ids=["nested", "published"])
@given(heads=st.integers(1, 4), tokens=st.integers(1, 9), seed=st.integers(0, 999))
def test_plane_sizes_are_the_rows_times_their_bytes(
    menu: tuple[Tier, ...], heads: int, tokens: int, seed: int
) -> None:
    tier_of = np.random.default_rng(seed).integers(0, 4, (heads, tokens)).astype(np.uint8)
    channels, itemsize = 10, 4
    expected = dict.fromkeys(Plane, 0)
    for tier in (menu[i] for i in tier_of.reshape(-1)):
        quantised = tier.bits in (4, 8)
        published = tier.codec == "kvp.absmax/1"
        expected[Plane.NATIVE] += channels * itemsize * (tier.bits == 16)
        expected[Plane.SCALE] += 2 * quantised
        expected[Plane.ANCHOR] += channels // 2 * (tier.bits == 4 or (quantised and not published))
        expected[Plane.RESIDUAL] += channels // 2 * (tier.bits == 8 and not published)
        expected[Plane.BYTE] += channels * (tier.bits == 8 and published)
    got = plane_nbytes(tier_of, menu, channels, itemsize)
    assert got == {plane: size for plane, size in expected.items() if size}
    assert list(got) == sorted(got)
    for plane, size in got.items():
        rows = rows_in(plane, tier_of, menu)
        assert size % int(rows.sum()) == 0


def test_a_broadcast_map_costs_what_its_copy_costs() -> None:
    shared = np.broadcast_to(np.array([0, 1, 2, 3, 1], np.uint8), (4, 5))
    assert plane_nbytes(shared, MENU, 8, 2) == plane_nbytes(shared.copy(), MENU, 8, 2)
    assert pack_tier_map(shared) == pack_tier_map(shared.copy())


@pytest.mark.parametrize(
    "channels, eight, four", [(64, 0.516, 0.266), (128, 0.508, 0.258), (256, 0.504, 0.254)]
)
def test_rows_cost_what_the_design_says(channels: int, eight: float, four: float) -> None:
    assert round(row_nbytes(INT8, channels, 2) / (2 * channels), 3) == eight
    assert round(row_nbytes(INT4, channels, 2) / (2 * channels), 3) == four


@pytest.mark.parametrize(
    "menu, channels, itemsize, error, message",
    [
        ((), 8, 2, BadInput, "1 to 16 tiers, got 0"),
        ((NATIVE,) * 17, 8, 2, BadInput, "1 to 16 tiers, got 17"),
        ((INT8, PUBLISHED_MENU[2]), 8, 2, BadInput, "one quantised codec per menu"),
        (MENU, 2, 2, BadInput, "'int8' takes 4 bytes .* of 2 channels, native takes 4"),
        ((Tier("int2", "kvp.nested/1", 2),), 8, 2, Unsupported, "at 2 bits is not built"),
        ((Tier("native", "kvp.native/1", 8),), 8, 2, Unsupported, "at 8 bits is not built"),
    ],
)
def test_menus_that_make_no_sense_are_refused(
    menu: tuple[Tier, ...], channels: int, itemsize: int, error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        check_menu(menu, channels, itemsize)


def test_the_smallest_legal_rows() -> None:
    check_menu(MENU, 4, 2)
    check_menu(MENU, 2, 4)
    check_menu((NATIVE, INT4), 2, 2)


@given(st.integers(0, 50), st.integers(1, 50), st.none() | st.integers(1, 60))
def test_ranges_tile_without_gaps(start: int, n: int, size: int | None) -> None:
    found = list(ranges(start, start + n, size))
    assert list(itertools.chain.from_iterable(range(*r) for r in found)) == [
        *range(start, start + n)
    ]
    assert all(high - low <= (size or n) for low, high in found)


@pytest.mark.parametrize("split", [{"tokens": 0}, {"heads": 0}, {"tokens": -1}])
def test_empty_splits_are_refused(split: dict[str, int]) -> None:
    with pytest.raises(BadInput, match="at least one of"):
        Split(**split)


def test_long_layers_are_cut_and_short_ones_are_not() -> None:
    small = KVShape.dense(layers=4, heads=2, channels=64, tokens=4096)
    assert split_of(small) == WHOLE
    long = KVShape.dense(layers=2, heads=8, channels=128, tokens=131_072)
    tokens = split_of(long).tokens
    assert tokens is not None
    assert tokens * 8 * 128 * 2 * 2 <= MAX_MANIFEST_NBYTES < (tokens + 1) * 8 * 128 * 2 * 2
