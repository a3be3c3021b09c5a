"""The nouns that every room shares: shapes, tiers, budgets, capabilities. No torch here.

Axis order everywhere is `[head, token, channel]`; sizes are bytes; fractions are of the
*reference*, which is the same cache at 16 bits per value.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, isfinite
from typing import Literal, NamedTuple, get_args

from kvprism.errors import BadInput, ShapeMismatch, UnknownName

ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}
REFERENCE_ITEMSIZE = 2
MAX_MENU = 16

NATIVE_CODEC = "kvp.native/1"
DROP_CODEC = "kvp.drop/1"
NESTED_CODEC = "kvp.nested/1"
CONDITIONED_CODEC = "kvp.conditioned/1"
ABSMAX_CODEC = "kvp.absmax/1"
# What others do, for comparison: a scale and an offset per row, per group of channels, or (keys in
# KIVI) per channel and group of tokens; bytes of 8-bit floating point.
AFFINE_CODEC = "kvp.affine/1"
HADAMARD_CODEC = "kvp.affine-hadamard/1"
GROUPED_CODEC = "kvp.affine-g32/1"
KIVI_CODEC = "kvp.kivi/1"
FP8_CODEC = "kvp.fp8-e4m3/1"

# No code of its own: what becomes of rows that came before in four bits of an embedded code.
UPGRADE_CODEC = "kvp.upgrade/1"
# Those whose 4-bit code is a part of their 8-bit code.
EMBEDDED = frozenset({NESTED_CODEC, CONDITIONED_CODEC})

# The component that key conditioning is for.
KEYS = "k"
# What a decode-phase policy goes on with: sent and billed as a component, but no part of the cache.
MASS, MASS_CHANNELS = "mass", 2
STATE = frozenset({MASS})


class ComponentShape(NamedTuple):
    """One named tensor of a layer: `k` and `v` in dense attention, and what is in `STATE`."""

    name: str
    heads: int
    channels: int


@dataclass(frozen=True)
class LayerShape:
    """What one layer of one request holds: components over the tokens `[start, stop)`.

    Raises:
        BadInput: empty or negative ranges, odd channel counts, an unknown dtype.
    """

    layer_id: int
    components: tuple[ComponentShape, ...]
    token_range: tuple[int, int]
    dtype: str

    def __post_init__(self) -> None:
        start, stop = self.token_range
        if self.layer_id < 0:
            raise BadInput(f"layer ids count from 0, got {self.layer_id}")
        if not 0 <= start < stop:
            raise BadInput(f"layer {self.layer_id}: token range [{start}, {stop}) holds no token")
        if self.dtype not in ITEMSIZE:
            raise BadInput(
                f"layer {self.layer_id}: dtype {self.dtype!r} is not in {list(ITEMSIZE)}"
            )
        if not self.components or len({c.name for c in self.components}) != len(self.components):
            raise BadInput(
                f"layer {self.layer_id}: components must be named once, got {self.components}"
            )
        for name, heads, channels in self.components:
            if heads < 1 or channels < 2 or channels % 2:
                raise BadInput(
                    f"layer {self.layer_id} component {name!r}: needs at least one head and an "
                    f"even number of channels, got {heads} heads of {channels}"
                )
        self._check_state()

    def _check_state(self) -> None:
        heads = {c.name: c.heads for c in self.components}
        for name, own, channels in self.components:
            if name in STATE and (own, channels) != (heads.get(KEYS), MASS_CHANNELS):
                raise BadInput(
                    f"layer {self.layer_id}: state {name!r} has the heads of {KEYS!r} and "
                    f"{MASS_CHANNELS} channels, got {own} heads of {channels} beside "
                    f"{heads.get(KEYS)}"
                )

    def __str__(self) -> str:
        start, stop = self.token_range
        return f"layer {self.layer_id} ({self.named_components}; [{start}, {stop}), {self.dtype})"

    @property
    def named_components(self) -> str:
        """Such as `k 8 x 128, v 8 x 128`: heads and channels."""
        return ", ".join(f"{c.name} {c.heads} x {c.channels}" for c in self.components)

    @property
    def n_tokens(self) -> int:
        return self.token_range[1] - self.token_range[0]

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]

    @property
    def n_values(self) -> int:
        """Of the cache: state is billed, and is in no denominator."""
        cache = [c for c in self.components if c.name not in STATE]
        return self.n_tokens * sum(c.heads * c.channels for c in cache)

    @property
    def reference_nbytes(self) -> int:
        return self.n_values * REFERENCE_ITEMSIZE

    @property
    def native_nbytes(self) -> int:
        return self.n_values * self.itemsize

    def component(self, name: str) -> ComponentShape:
        """The component called `name`; `ShapeMismatch` when this layer has none."""
        for component in self.components:
            if component.name == name:
                return component
        names = [component.name for component in self.components]
        raise ShapeMismatch(f"layer {self.layer_id} has components {names}, not {name!r}")


@dataclass(frozen=True)
class KVShape:
    """The whole cache of one request, layer by layer in ascending `layer_id`.

    Example:
        >>> KVShape.dense(layers=4, heads=2, channels=64, tokens=2048).reference_nbytes
        4194304
    """

    layers: tuple[LayerShape, ...]

    def __post_init__(self) -> None:
        ids = [layer.layer_id for layer in self.layers]
        if not ids or ids != sorted(set(ids)):
            raise BadInput(f"layers must be named once, in ascending order, got {ids}")

    @classmethod
    def dense(
        cls, *, layers: int, heads: int, channels: int, tokens: int, dtype: str = "bfloat16"
    ) -> "KVShape":
        """Equal layers of keys and values over `[0, tokens)`."""
        components = (ComponentShape("k", heads, channels), ComponentShape("v", heads, channels))
        return cls(tuple(LayerShape(i, components, (0, tokens), dtype) for i in range(layers)))

    @property
    def reference_nbytes(self) -> int:
        return sum(layer.reference_nbytes for layer in self.layers)

    @property
    def native_nbytes(self) -> int:
        return sum(layer.native_nbytes for layer in self.layers)

    @property
    def token_ranges(self) -> tuple[tuple[int, int], ...]:
        """The different token ranges, in the order of their first layers."""
        return tuple(dict.fromkeys(layer.token_range for layer in self.layers))

    @property
    def next_position(self) -> int:
        """The true position of the next token: the original length, not the kept length."""
        return max(layer.token_range[1] for layer in self.layers)


@dataclass(frozen=True)
class Tier:
    """One precision that a (component, head, token) row may take on the wire.

    `bits` is nominal (16 stands for the cache's own dtype); the exact bytes of a row are
    `kvprism.layout.row_nbytes`.
    """

    name: str
    codec: str
    bits: int


NATIVE = Tier("native", NATIVE_CODEC, 16)
INT8 = Tier("int8", NESTED_CODEC, 8)
INT4 = Tier("int4", NESTED_CODEC, 4)
DROP = Tier("drop", DROP_CODEC, 0)
MENU = (NATIVE, INT8, INT4, DROP)
# A row stays as it came, goes from 4 bits to 8, or comes again in the cache's own dtype.
KEEP = Tier("keep", UPGRADE_CODEC, 0)
REFINE = Tier("refine", UPGRADE_CODEC, 4)
REPLACE = Tier("replace", UPGRADE_CODEC, 16)
UPGRADES = (KEEP, REFINE, REPLACE)


def _menu(codec: str) -> tuple[Tier, ...]:
    return (NATIVE, Tier("int8", codec, 8), Tier("int4", codec, 4), DROP)


CONDITIONED_MENU = _menu(CONDITIONED_CODEC)
PUBLISHED_MENU = _menu(ABSMAX_CODEC)
MENUS = {
    "nested": MENU,
    "conditioned": CONDITIONED_MENU,
    "published": PUBLISHED_MENU,
    "affine": _menu(AFFINE_CODEC),
    "hadamard": _menu(HADAMARD_CODEC),
    "grouped": _menu(GROUPED_CODEC),
}
# Codes of one width: the place of the other holds no bits.
ONE_WIDTH_MENUS = {
    "kivi": (NATIVE, DROP, Tier("int4", KIVI_CODEC, 4), DROP),
    "fp8": (NATIVE, Tier("fp8", FP8_CODEC, 8), DROP, DROP),
}

_UNITS = {"b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}
# float32 is twice the reference: a larger bare number is a percentage or a size without its unit.
_MAX_FRACTION = 4


@dataclass(frozen=True)
class Budget:
    """A cap on *all* wire bytes of one request.

    Raises:
        BadInput: not a positive number of bytes.
    """

    nbytes: int

    def __post_init__(self) -> None:
        if self.nbytes < 1:
            raise BadInput(f"a budget must be at least 1 byte, got {self.nbytes}")

    @classmethod
    def parse(cls, text: "str | float | Budget", shape: KVShape) -> "Budget":
        """Convert `0.30`, `30%` (of the 16-bit reference), `512MiB` or `512tok` (at 16 bits) once.

        Fractions of a byte are cut off. A layer that holds fewer tokens than the longest one never
        counts for more than it holds.

        Example:
            >>> Budget.parse("25%", KVShape.dense(layers=1, heads=1, channels=64, tokens=16)).nbytes
            1024
        """
        if isinstance(text, Budget):
            return text
        match = re.fullmatch(
            r"\s*([0-9]*\.?[0-9]+)\s*(%|tok|([kmg]i?)?b)?\s*", str(text), re.IGNORECASE
        )
        if match is None:
            raise BadInput(f"budget {text!r} is none of 0.30, 30%, 512MiB, 512tok")
        # Exact, because 0.29 * 100 is 28.999999999999996 in floating point.
        number, unit = Fraction(match[1]), (match[2] or "").lower()
        if unit in _UNITS:
            return cls(int(number * _UNITS[unit]))
        if unit == "tok":
            longest = max(layer.n_tokens for layer in shape.layers)
            return cls(sum(_nbytes_of_tokens(layer, number, longest) for layer in shape.layers))
        if unit == "" and number > _MAX_FRACTION:
            raise BadInput(
                f"budget {text} is {text} times the cache at 16 bits; name the unit: "
                f"{text}%, {text}MiB or {text}tok"
            )
        return cls(int(shape.reference_nbytes * number / (100 if unit == "%" else 1)))

    def split(self, weights: Sequence[float]) -> "tuple[Budget, ...]":
        """Shares in proportion to `weights` that sum exactly to this budget; see `apportion`."""
        return tuple(Budget(share) for share in apportion(self.nbytes, weights))


def _nbytes_of_tokens(layer: LayerShape, number: Fraction, longest: int) -> int:
    held = number if layer.n_tokens == longest else min(number, Fraction(layer.n_tokens))
    return int(layer.reference_nbytes * held / layer.n_tokens)


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """Whole shares of `total` in proportion to positive `weights`; they sum exactly to it.

    By highest averages (D'Hondt), so that a larger total never makes a share smaller, as largest
    remainders can: a budget that suffices then suffices at every larger size too.

    Raises:
        BadInput: no weights, or one that is not positive and finite.
    """
    exact = _positive(weights)
    whole = sum(exact)
    shares = [int(total * weight / whole) for weight in exact]
    for _ in range(total - sum(shares)):
        averages = [weight / (share + 1) for weight, share in zip(exact, shares, strict=True)]
        shares[averages.index(max(averages))] += 1
    return shares


def least_total(needs: Sequence[int], weights: Sequence[float]) -> int:
    """The smallest total of which `apportion` gives everybody at least his positive need."""
    exact = _positive(weights)
    averages = [weight / need for weight, need in zip(exact, needs, strict=True)]
    # The need with the lowest average is met last; of equal ones, the last in order.
    lowest = min(averages)
    last = max(i for i, average in enumerate(averages) if average == lowest)
    before = [int(weight / lowest) for weight in exact[: last + 1]]
    return sum(before) + sum(ceil(weight / lowest) - 1 for weight in exact[last + 1 :])


def _positive(weights: Sequence[float]) -> list[Fraction]:
    if not weights or not all(isfinite(weight) and weight > 0 for weight in weights):
        raise BadInput(f"budget weights must be positive and finite, got {list(weights)}")
    return [Fraction(weight) for weight in weights]


Drop = Literal["none", "uniform", "per_head"]


@dataclass(frozen=True)
class Capability:
    """What the receiver can hold: solvers obey it, and the handshake states it.

    `drop`: `none` (paged attention has no missing token), `uniform` (the same tokens for all heads
    and components of a layer), `per_head`. `block`: dropped tokens come in multiples of this.

    Raises:
        UnknownName: no such kind of drop.
        BadInput: no codec, or a block of no token.
    """

    drop: Drop = "uniform"
    codecs: tuple[str, ...] = (
        NATIVE_CODEC,
        DROP_CODEC,
        NESTED_CODEC,
        CONDITIONED_CODEC,
        UPGRADE_CODEC,
        ABSMAX_CODEC,
        AFFINE_CODEC,
        HADAMARD_CODEC,
        GROUPED_CODEC,
        KIVI_CODEC,
        FP8_CODEC,
    )
    block: int = 1

    def __post_init__(self) -> None:
        if self.drop not in get_args(Drop):
            raise UnknownName("drop capability", self.drop, list(get_args(Drop)))
        if not self.codecs or self.block < 1:
            raise BadInput(f"a receiver reads a codec and blocks of at least 1 token, got {self}")

    def allows(self, tier: Tier) -> bool:
        """Whether rows of this tier can be held."""
        return tier.codec in self.codecs and not (tier.codec == DROP_CODEC and self.drop == "none")


# What a restored cache can hold: heads with tokens of their own, padded in memory, so that eviction
# policies choose as their papers do.
HOLDS = Capability(drop="per_head")
