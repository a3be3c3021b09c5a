"""Prompts, and caches that lost tokens, for the tests of this folder."""

import torch

from kvprism.tensors import LayerKV, RequestKV

N_PROMPT = 60


def tokens(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(4, 2048, (1, n), generator=torch.Generator().manual_seed(seed))


def drop(kv: RequestKV, seed: int = 1) -> RequestKV:
    """Each layer keeps other tokens, and another number of them."""
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for layer, fraction in zip(kv.layers, (0.8, 0.5, 0.65, 0.3), strict=False):
        n_tokens = len(layer.positions)
        kept = (
            torch.randperm(n_tokens, generator=generator)[: int(fraction * n_tokens)].sort().values
        )
        rows = {name: x[:, kept] for name, x in layer.components.items()}
        layers.append(LayerKV(layer.layer_id, rows, layer.positions[kept]))
    return RequestKV(tuple(layers), kv.next_position)


def kept_of(kv: RequestKV) -> list[torch.Tensor]:
    return [layer.positions for layer in kv.layers]


def remove(layer: LayerKV, position: int) -> LayerKV:
    held = layer.positions != position
    rows = {name: x[:, held] for name, x in layer.components.items()}
    return LayerKV(layer.layer_id, rows, layer.positions[held])
