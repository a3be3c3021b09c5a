"""Which bytes a tier map stands for: planes, rows, maps and exact sizes. numpy only.

A block (one component of one layer over a head range and a token range) is laid out as planes. Each
plane holds one row per (head, token) whose tier uses it, head-major; a dropped token has no row.
`docs/format.md` says the same for strangers.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from kvprism.core import (
    ABSMAX_CODEC,
    AFFINE_CODEC,
    CONDITIONED_CODEC,
    DROP,
    DROP_CODEC,
    EMBEDDED,
    FP8_CODEC,
    GROUPED_CODEC,
    HADAMARD_CODEC,
    KEYS,
    KIVI_CODEC,
    MAX_MENU,
    NATIVE,
    NATIVE_CODEC,
    NESTED_CODEC,
    UPGRADE_CODEC,
    KVShape,
    Tier,
)
from kvprism.errors import BadInput, ProtocolViolation, Unsupported
from kvprism.wire.messages import TierMap

TierArray = NDArray[np.uint8]
UNIFORM, PACKED, INDEX_LIST = 0, 1, 2


class Plane(IntEnum):
    """One uniform array of rows; the names are those of `docs/format.md`."""

    NATIVE = 0
    SCALE = 1
    ANCHOR = 2
    RESIDUAL = 3
    BYTE = 4


PLANES: Mapping[tuple[str, int], tuple[Plane, ...]] = {
    (NATIVE_CODEC, 16): (Plane.NATIVE,),
    (DROP_CODEC, 0): (),
    (NESTED_CODEC, 8): (Plane.SCALE, Plane.ANCHOR, Plane.RESIDUAL),
    (NESTED_CODEC, 4): (Plane.SCALE, Plane.ANCHOR),
    (CONDITIONED_CODEC, 8): (Plane.SCALE, Plane.ANCHOR, Plane.RESIDUAL),
    (CONDITIONED_CODEC, 4): (Plane.SCALE, Plane.ANCHOR),
    (UPGRADE_CODEC, 0): (),
    (UPGRADE_CODEC, 4): (Plane.RESIDUAL,),
    (UPGRADE_CODEC, 16): (Plane.NATIVE,),
    (ABSMAX_CODEC, 8): (Plane.SCALE, Plane.BYTE),
    (ABSMAX_CODEC, 4): (Plane.SCALE, Plane.ANCHOR),
    (AFFINE_CODEC, 8): (Plane.SCALE, Plane.BYTE),
    (AFFINE_CODEC, 4): (Plane.SCALE, Plane.ANCHOR),
    (HADAMARD_CODEC, 8): (Plane.SCALE, Plane.BYTE),
    (HADAMARD_CODEC, 4): (Plane.SCALE, Plane.ANCHOR),
    (GROUPED_CODEC, 8): (Plane.SCALE, Plane.BYTE),
    (GROUPED_CODEC, 4): (Plane.SCALE, Plane.ANCHOR),
    (KIVI_CODEC, 4): (Plane.SCALE, Plane.ANCHOR),
    (FP8_CODEC, 8): (Plane.SCALE, Plane.BYTE),
}


class Scales(NamedTuple):
    """What shares a scale: `tokens` quantised rows of a head, `channels` of a row (0: all of it).

    numbers: float16 each; 1 is a scale, 2 are a scale and an offset.
    """

    tokens: int = 1
    channels: int = 0
    numbers: int = 1

    def nbytes(self, rows: int, channels: int) -> int:
        """Of the scales of this many rows of one head."""
        groups = channels // self.channels if self.channels else 1
        return -(-rows // self.tokens) * groups * self.numbers * 2


GROUP = 32
_GROUPED = Scales(channels=GROUP, numbers=2)
_IN_GROUPS = (GROUPED_CODEC, KIVI_CODEC)
_SCALES = {
    AFFINE_CODEC: Scales(numbers=2),
    HADAMARD_CODEC: Scales(numbers=2),
    GROUPED_CODEC: _GROUPED,
    KIVI_CODEC: _GROUPED,
}


def scales_of(codec: str, component: str) -> Scales:
    """What shares a scale in a component; KIVI's keys have scales per channel, all else per row."""
    if codec == KIVI_CODEC and component == KEYS:
        return Scales(tokens=GROUP, channels=1, numbers=2)
    return _SCALES.get(codec, Scales())


def plane_row_nbytes(plane: Plane, channels: int, itemsize: int) -> int:
    """Bytes of one row of `plane`, which is not the scale plane."""
    return {
        Plane.NATIVE: channels * itemsize,
        Plane.ANCHOR: channels // 2,
        Plane.RESIDUAL: channels // 2,
        Plane.BYTE: channels,
    }[plane]


def planes_of(tier: Tier) -> tuple[Plane, ...]:
    """The planes that a row of this tier stands in; `Unsupported` for a code that is not built."""
    if (tier.codec, tier.bits) not in PLANES:
        built = ", ".join(f"{codec} at {bits}" for codec, bits in PLANES)
        raise Unsupported(
            f"tier {tier.name!r}: codec {tier.codec} at {tier.bits} bits is not built; {built} are"
        )
    return PLANES[tier.codec, tier.bits]


def upgrading(menu: Sequence[Tier]) -> NDArray[np.bool_]:
    """`[tier]`: which of a menu say what becomes of rows that came before."""
    return np.array([tier.codec == UPGRADE_CODEC for tier in menu])


def as_coded(menu: Sequence[Tier]) -> tuple[Tier, ...]:
    """A menu as the codecs see it: upgraded rows as what they become, kept ones as no rows."""
    if not any(upgrading(menu)):
        return tuple(menu)
    code = next(tier.codec for tier in menu if tier.codec in EMBEDDED)
    becomes = {0: DROP, 4: Tier("int8", code, 8), 16: NATIVE}
    return tuple(becomes[t.bits] if t.codec == UPGRADE_CODEC else t for t in menu)


def row_nbytes(tier: Tier, channels: int, itemsize: int, component: str = KEYS) -> int:
    """Payload bytes of one (head, token) row; exact, with its scales, unless rows share them.

    What rows share is left out: of them, each has at least so many bytes.
    """
    scales = scales_of(tier.codec, component)
    own = scales.nbytes(1, channels) if scales.tokens == 1 else 0
    planes = planes_of(tier)
    nbytes = sum(plane_row_nbytes(p, channels, itemsize) for p in planes if p != Plane.SCALE)
    return nbytes + own * (Plane.SCALE in planes)


def check_menu(menu: Sequence[Tier], channels: int, itemsize: int) -> None:
    """Refuse a menu that is too long, mixes quantised codecs, pays more than native, or cannot cut
    its rows.

    Raises:
        BadInput: any of these.
        Unsupported: a tier that is not built.
    """
    if not 1 <= len(menu) <= MAX_MENU:
        raise BadInput(f"a menu has 1 to {MAX_MENU} tiers, got {len(menu)}")
    plain = (NATIVE_CODEC, DROP_CODEC, UPGRADE_CODEC)
    quantised = [tier for tier in menu if tier.codec not in plain]
    codecs = {tier.codec for tier in quantised}
    if len(codecs) > 1:
        raise BadInput(f"one quantised codec per menu, got {sorted(codecs)}")
    if any(upgrading(menu)) and not codecs & EMBEDDED:
        raise BadInput(f"upgrades need one of {sorted(EMBEDDED)} in the menu, got {sorted(codecs)}")
    native = channels * itemsize
    for tier in menu:
        nbytes = row_nbytes(tier, channels, itemsize)
        _check_channels(tier, channels)
        if tier in quantised and nbytes >= native:
            raise BadInput(
                f"tier {tier.name!r} takes {nbytes} bytes for a row of {channels} channels, native "
                f"takes {native}; use a menu without this tier"
            )


def _check_channels(tier: Tier, channels: int) -> None:
    if tier.codec in _IN_GROUPS and channels % GROUP:
        needed = f"groups of {GROUP} channels"
    elif tier.codec == HADAMARD_CODEC and channels & (channels - 1):
        needed = "a power of two of channels"
    else:
        return
    raise BadInput(
        f"tier {tier.name!r}: codec {tier.codec} needs {needed}, a row has {channels}; use another "
        "codec"
    )


def rows_in(plane: Plane, tier_of: TierArray, menu: Sequence[Tier]) -> NDArray[np.bool_]:
    """`[head, token]`: which rows of the block stand in `plane`."""
    uses = np.array([plane in planes_of(tier) for tier in menu])
    return uses[tier_of]


def plane_nbytes(
    tier_of: TierArray, menu: Sequence[Tier], channels: int, itemsize: int, component: str = KEYS
) -> dict[Plane, int]:
    """Bytes of every non-empty plane of a block, in plane order."""
    rows = _distinct_rows(tier_of)
    repeated = len(tier_of) // len(rows)
    counts = tuple(tuple(np.bincount(row, minlength=len(menu)).tolist()) for row in rows)
    return dict(counted_nbytes(counts, repeated, tuple(menu), channels, itemsize, component))


# Layers and components that take the same tiers ask for the same sizes, again and again.
@lru_cache(maxsize=256)
def counted_nbytes(
    counts: tuple[tuple[int, ...], ...],
    repeated: int,
    menu: tuple[Tier, ...],
    channels: int,
    itemsize: int,
    component: str,
) -> Mapping[Plane, int]:
    """The same from how many tokens of each head take each tier; repeated: heads per row."""
    sizes = dict.fromkeys(Plane, 0)
    for tier, by_head in zip(menu, zip(*counts, strict=True), strict=True):
        count = repeated * sum(by_head)
        for plane in planes_of(tier):
            if plane != Plane.SCALE:
                sizes[plane] += count * plane_row_nbytes(plane, channels, itemsize)
                continue
            scales = scales_of(tier.codec, component)
            sizes[plane] += repeated * sum(scales.nbytes(n, channels) for n in by_head)
    return {plane: size for plane, size in sizes.items() if size}


def _distinct_rows(tier_of: TierArray) -> TierArray:
    """One row when all heads take the same tiers, else all of them."""
    # A broadcast row, which is what solvers make, is seen at once: they cost plans by the hundred.
    shared = tier_of.strides[0] == 0 or bool((tier_of == tier_of[:1]).all())
    return tier_of[:1] if shared else tier_of


@dataclass(frozen=True)
class Split:
    """How a request is cut into manifests: at most `tokens` tokens and `heads` heads each.

    Raises:
        BadInput: ranges of less than one.
    """

    tokens: int | None = None
    heads: int | None = None

    def __post_init__(self) -> None:
        for name, size in (("tokens", self.tokens), ("heads", self.heads)):
            if size is not None and size < 1:
                raise BadInput(f"a split needs at least one of {name}, got {size}")


WHOLE = Split()
# Far below the receiver's credit, and decoded long before the sender thinks that it fell silent.
MAX_MANIFEST_NBYTES = 2**25


def split_of(shape: KVShape) -> Split:
    """Whole layers while they are small, else token ranges of at most 32 MiB in native bytes."""
    token_nbytes = max(layer.native_nbytes // layer.n_tokens for layer in shape.layers)
    tokens = max(1, MAX_MANIFEST_NBYTES // token_nbytes)
    return WHOLE if all(layer.n_tokens <= tokens for layer in shape.layers) else Split(tokens)


def ranges(start: int, stop: int, size: int | None) -> Iterator[tuple[int, int]]:
    """Cut `[start, stop)` into consecutive ranges of at most `size`."""
    step = size or stop - start
    for low in range(start, stop, step):
        yield low, min(low + step, stop)


def pack_tier_map(tier_of: TierArray) -> TierMap:
    """The smallest encoding of a `[head, token]` tier map; ties go to the lower mode and bits."""
    rows = _distinct_rows(tier_of)
    flat = rows.reshape(-1)
    counts = np.bincount(flat, minlength=MAX_MENU)
    empty = counted_tier_map(tuple(counts.tolist()), len(rows))
    palette = np.frombuffer(empty.palette, np.uint8)
    if empty.mode == UNIFORM:
        return empty
    if empty.mode == INDEX_LIST:
        return replace(empty, data=_index_list(flat, palette))
    index = np.searchsorted(palette, flat).astype(np.uint8)
    return replace(empty, data=_pack_bits(index, empty.bits))


@lru_cache(maxsize=256)
def counted_tier_map(counts: tuple[int, ...], rows: int = 1) -> TierMap:
    """A map with as many entries of each tier, in the smallest encoding; its data is zeros."""
    n = sum(counts)
    used = [tier for tier, count in enumerate(counts) if count]
    if len(used) == 1:
        return TierMap(rows, UNIFORM, 0, bytes(used), b"")
    bits = 1 if len(used) <= 2 else 2 if len(used) <= 4 else 4
    listed, packed = 4 * (n - max(counts) + len(used) - 1), -(-n * bits // 8)
    if listed < packed:
        used.sort(key=lambda tier: -counts[tier])
        return TierMap(rows, INDEX_LIST, 0, bytes(used), bytes(listed))
    return TierMap(rows, PACKED, bits, bytes(used), bytes(packed))


def unpack_tier_map(tier_map: TierMap, heads: int, tokens: int, n_menu: int) -> TierArray:
    """The `[head, token]` array that a map stands for.

    Raises:
        ProtocolViolation: a map that does not fit the block or is not well formed.
    """
    palette = np.frombuffer(tier_map.palette, np.uint8)
    _require(tier_map.rows in (1, heads), f"{tier_map.rows} rows for {heads} heads")
    _require(0 < len(palette) <= MAX_MENU, f"a palette of {len(palette)} tiers")
    _require(int(palette.max()) < n_menu, f"tier {palette.max()} in a menu of {n_menu}")
    _require(len(set(tier_map.palette)) == len(palette), "a tier twice in the palette")
    n = tier_map.rows * tokens
    if tier_map.mode == UNIFORM:
        _require(len(palette) == 1 and not tier_map.data, "a uniform map with data")
        flat = np.full(n, palette[0], np.uint8)
    elif tier_map.mode == PACKED:
        flat = palette[_unpack_bits(tier_map.data, tier_map.bits, n, len(palette))]
    elif tier_map.mode == INDEX_LIST:
        flat = _from_index_list(tier_map.data, palette, n)
    else:
        raise ProtocolViolation(f"tier map mode {tier_map.mode} is none of 0, 1, 2")
    return np.broadcast_to(flat.reshape(tier_map.rows, tokens), (heads, tokens))


def _require(condition: bool, found: str) -> None:
    if not condition:
        raise ProtocolViolation(f"malformed tier map: {found}")


def _index_list(flat: TierArray, palette: TierArray) -> bytes:
    parts = []
    for tier in palette[1:]:
        where = np.flatnonzero(flat == tier).astype("<u4")
        parts += [np.array([len(where)], "<u4").tobytes(), where.tobytes()]
    return b"".join(parts)


def _from_index_list(data: bytes, palette: TierArray, n: int) -> TierArray:
    _require(len(data) % 4 == 0, f"an index list of {len(data)} bytes")
    words = np.frombuffer(data, "<u4")
    flat = np.full(n, palette[0], np.uint8)
    at = 0
    for tier in palette[1:]:
        _require(at < len(words), "an index list that ends early")
        where = words[at + 1 : at + 1 + int(words[at])]
        _require(len(where) == words[at], "an index list that ends early")
        _require(bool((np.diff(where.astype(np.int64)) > 0).all()), "indices that do not ascend")
        _require(not len(where) or int(where[-1]) < n, "an index beyond the block")
        _require(bool((flat[where] == palette[0]).all()), "an index listed twice")
        flat[where] = tier
        at += 1 + len(where)
    _require(at == len(words), "bytes after the index list")
    return flat


def _pack_bits(index: TierArray, bits: int) -> bytes:
    per_byte = 8 // bits
    padded = np.zeros(-(-len(index) // per_byte) * per_byte, np.uint8)
    padded[: len(index)] = index
    shifts = np.arange(per_byte, dtype=np.uint8) * np.uint8(bits)
    packed: TierArray = np.bitwise_or.reduce(padded.reshape(-1, per_byte) << shifts, axis=1)
    return packed.tobytes()


def _unpack_bits(data: bytes, bits: int, n: int, n_palette: int) -> TierArray:
    _require(bits in (1, 2, 4), f"{bits} bits an entry")
    _require(len(data) == -(-n * bits // 8), f"{len(data)} bytes for {n} entries of {bits} bits")
    shifts = np.arange(8 // bits, dtype=np.uint8) * np.uint8(bits)
    spread = (np.frombuffer(data, np.uint8)[:, None] >> shifts) & np.uint8((1 << bits) - 1)
    index = spread.reshape(-1)
    _require(not index[n:].any(), "padding bits that are not zero")
    _require(int(index[:n].max()) < n_palette, "an entry beyond the palette")
    return index[:n]
