"""Small caches, views and plans for the tests of the middle rooms; nothing here needs a model."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from kvprism.core import MENUS, Tier
from kvprism.layout import WHOLE, Split, TierArray
from kvprism.plans import LayerPlan, Plan
from kvprism.tensors import (
    DTYPES,
    KeyConditioning,
    LayerKV,
    LayerView,
    QueryStatistics,
    RequestKV,
)

NATIVE, INT8, INT4, DROP = range(4)


def cache(
    *,
    layers: int = 2,
    heads: int = 2,
    tokens: int = 16,
    channels: int = 8,
    dtype: str = "bfloat16",
    start: int = 0,
    seed: int = 0,
) -> RequestKV:
    """Normal values; the tokens `[start, start + tokens)`."""
    generator = torch.Generator().manual_seed(seed)
    shape = (heads, tokens, channels)
    made = [
        LayerKV(
            layer_id,
            {name: torch.randn(shape, generator=generator).to(DTYPES[dtype]) for name in "kv"},
            torch.arange(start, start + tokens),
        )
        for layer_id in range(layers)
    ]
    return RequestKV(tuple(made), start + tokens)


def view_of(kv: RequestKV, *, window: int | None = 8, group: int = 2) -> tuple[LayerView, ...]:
    """`group` query heads for each KV head over the last `window` positions, and every signal."""
    generator = torch.Generator().manual_seed(99)
    views = []
    for layer in kv.layers:
        heads, tokens, channels = layer.components["k"].shape
        queries = None
        if window is not None:
            shape = (heads * group, min(window, tokens), channels)
            queries = torch.randn(shape, generator=generator)
        signals = {} if window is None else _signals(heads, group, tokens, channels, generator)
        views.append(LayerView(layer, queries, channels**-0.5, **signals))
    return tuple(views)


def _signals(
    heads: int, group: int, tokens: int, channels: int, generator: torch.Generator
) -> dict[str, Any]:
    factor = torch.randn(heads * group, channels, channels, generator=generator)
    mean = torch.randn(heads * group, channels, generator=generator)
    return {
        "mass": torch.rand(heads, tokens, generator=generator),
        "future_queries": QueryStatistics(mean, factor @ factor.mT / channels),
        "output_norms": 1 + torch.rand(heads, tokens, generator=torch.Generator().manual_seed(5)),
    }


def plan_of(
    kv: RequestKV,
    tiers: Callable[[LayerKV, str], Any] | Any,
    menu: tuple[Tier, ...] = MENUS["nested"],
    split: Split = WHOLE,
) -> Plan:
    """A plan by hand: `tiers` is one array for all, broadcast, or a function of layer and name."""
    planned = []
    for layer in kv.layers:
        tier_of = {}
        for name, x in layer.components.items():
            chosen = tiers(layer, name) if callable(tiers) else tiers
            tier_of[name] = np.broadcast_to(np.asarray(chosen, np.uint8), x.shape[:2])
        planned.append(LayerPlan(layer.shape(), tier_of))
    return Plan(tuple(planned), menu, split)


def same_cache(got: RequestKV, expected: RequestKV) -> bool:
    """Bit for bit, positions included; a NaN equals itself."""
    if got.next_position != expected.next_position or len(got.layers) != len(expected.layers):
        return False
    return all(
        a.layer_id == b.layer_id
        and torch.equal(a.positions, b.positions)
        and list(a.components) == list(b.components)
        and all(same_bits(a.components[name], b.components[name]) for name in a.components)
        for a, b in zip(got.layers, expected.layers, strict=True)
    )


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(
        a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
    )


@st.composite
def caches(draw: st.DrawFn) -> RequestKV:
    """Odd shapes, every dtype, with and without a missing prefix, values of many magnitudes."""
    kv = cache(
        layers=draw(st.integers(1, 3)),
        heads=draw(st.integers(1, 4)),
        tokens=draw(st.integers(1, 20)),
        channels=draw(st.sampled_from([4, 6, 8, 10, 16])),
        dtype=draw(st.sampled_from(list(DTYPES))),
        start=draw(st.sampled_from([0, 3, 1000])),
        seed=draw(st.integers(0, 2**16)),
    )
    scale = draw(st.sampled_from([1e-6, 1.0, 200.0]))
    return RequestKV(
        tuple(
            LayerKV(la.layer_id, {n: x * scale for n, x in la.components.items()}, la.positions)
            for la in kv.layers
        ),
        kv.next_position,
    )


@st.composite
def plans(draw: st.DrawFn, kv: RequestKV) -> Plan:
    """Any tier for any row, but tokens are dropped for all heads and components of a layer."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    palette = draw(st.lists(st.sampled_from([NATIVE, INT8, INT4]), min_size=1, unique=True))
    dropped = draw(st.sampled_from([0.0, 0.3]))
    kept = {layer.layer_id: rng.random(len(layer.positions)) >= dropped for layer in kv.layers}

    def tiers(layer: LayerKV, name: str) -> TierArray:
        chosen = rng.choice(np.array(palette, np.uint8), layer.components[name].shape[:2])
        return np.where(kept[layer.layer_id], chosen, np.uint8(DROP))

    menu = MENUS[draw(st.sampled_from(["nested", "published"]))]
    return plan_of(kv, tiers, menu, draw(splits()))


def splits() -> st.SearchStrategy[Split]:
    size = st.none() | st.integers(1, 9)
    return st.builds(Split, size, size)


def conditioning_of(
    kv: RequestKV, *, seed: int = 0, rotate: bool = False, offset: float = 3.0, scale: float = 4.0
) -> tuple[KeyConditioning, ...]:
    """Drawn key conditioning for every layer; scales lie within a factor of `scale` around 1."""
    drawn = torch.Generator().manual_seed(seed)
    made = []
    for layer in kv.layers:
        heads, _, channels = layer.components["k"].shape
        half = channels // 2
        exponents = 2 * torch.rand(heads, half, generator=drawn) - 1
        made.append(
            KeyConditioning(
                offset=offset * torch.randn(heads, channels, generator=drawn),
                scale=scale**exponents,
                inverse_frequencies=10000.0 ** (-torch.arange(half).float() / half),
                rotate=rotate,
            )
        )
    return tuple(made)


def histogram(tiers: TierArray) -> dict[int, int]:
    """Tier index -> how many take it."""
    values, counts = np.unique(tiers, return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))
