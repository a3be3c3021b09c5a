"""State that decoding goes on with, as one more component of a layer: `docs/format.md`, 6.1."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from kvprism.core import KEYS, MASS, MASS_CHANNELS, ComponentShape, KVShape
from kvprism.errors import CodecError, MissingSignal
from kvprism.tensors import LayerKV, LayerView, RequestKV


def with_mass(
    kv: RequestKV, view: Sequence[LayerView], layers: Sequence[bool] | None = None
) -> tuple[RequestKV, tuple[LayerView, ...]]:
    """A captured request with its attention mass as a component, and the views of that.

    layers: which of them, all if None. A plan for it bills the mass with the tokens: 2 values a
    kept row, in the cache's dtype.

    Raises:
        MissingSignal: the capture was not asked for the mass.
    """
    views = []
    for layer, wanted in zip(view, layers or [True] * len(view), strict=True):
        if not wanted:
            views.append(layer)
            continue
        if layer.mass is None:
            raise MissingSignal(
                f"layer {layer.kv.layer_id}: a decode phase that counts attention goes on with the "
                "mass of the prompt's queries, which was not captured; capture with "
                "signals={'mass'}"
            )
        components = {**layer.kv.components, MASS: _packed(layer.mass, layer.kv.dtype)}
        own = LayerKV(layer.kv.layer_id, components, layer.kv.positions, layer.kv.held)
        views.append(replace(layer, kv=own))
    return RequestKV(tuple(layer.kv for layer in views), kv.next_position), tuple(views)


def _packed(mass: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`[head, token]` -> `[head, token, 2]`: the nearest number of the dtype, and what is left."""
    mass = torch.nan_to_num(mass.float()).clamp(0, torch.finfo(dtype).max)
    nearest = mass.to(dtype)
    return torch.stack([nearest, (mass - nearest.float()).to(dtype)], dim=-1)


def mass_of(kv: LayerKV) -> torch.Tensor | None:
    """The mass that a layer came with, float32 `[head, token]`; padding has none.

    Raises:
        CodecError: a mass that is negative or not finite.
    """
    if MASS not in kv.components:
        return None
    mass = kv.components[MASS].float().sum(dim=-1)
    if kv.held is not None:
        mass = mass * kv.held
    if not bool(mass.isfinite().all()) or bool((mass < 0).any()):
        raise CodecError(
            f"layer {kv.layer_id}: state {MASS!r} has a value that is negative or not finite; send "
            "the request again"
        )
    return mass


def expecting_mass(shape: KVShape) -> KVShape:
    """A model's shape with the state that its cache is to come with, for `Receiver(expected=)`."""
    layers = []
    for layer in shape.layers:
        mass = ComponentShape(MASS, layer.component(KEYS).heads, MASS_CHANNELS)
        layers.append(replace(layer, components=(*layer.components, mass)))
    return KVShape(tuple(layers))
