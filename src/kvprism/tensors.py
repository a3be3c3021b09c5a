"""What the tensors of a request are called: LayerKV, LayerView, RequestKV. Arrays compare by identity."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from kvprism.core import ComponentShape, KVShape, LayerShape
from kvprism.errors import BadInput, ShapeMismatch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, eq=False)
class LayerKV:
    """One layer of one request.

    components: name -> `[head, token, channel]`, all of one dtype; positions: int64 `[token]`,
    ascending, the *original* positions of the tokens that are present.

    Raises:
        ShapeMismatch: components disagree on tokens or dtype, or positions do not ascend.
    """

    layer_id: int
    components: Mapping[str, torch.Tensor]
    positions: torch.Tensor

    def __post_init__(self) -> None:
        for name, x in self.components.items():
            if x.dim() != 3 or x.shape[1] != len(self.positions) or x.dtype not in DTYPE_NAMES:
                raise ShapeMismatch(
                    f"layer {self.layer_id} component {name!r}: expected [head, {len(self.positions)}, "
                    f"channel] in {list(DTYPES)}, got {list(x.shape)} {x.dtype}"
                )
        if len({x.dtype for x in self.components.values()}) != 1:
            raise ShapeMismatch(f"layer {self.layer_id}: components must share one dtype")
        if len(self.positions) > 1 and not bool((self.positions[1:] > self.positions[:-1]).all()):
            raise ShapeMismatch(f"layer {self.layer_id}: positions must ascend")

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.components.values())).dtype

    def shape(self) -> LayerShape:
        """The layer's shape over its contiguous token range; `ShapeMismatch` when tokens are missing."""
        start, stop = int(self.positions[0]), int(self.positions[-1]) + 1
        if stop - start != len(self.positions):
            raise ShapeMismatch(
                f"layer {self.layer_id}: tokens are missing between {start} and {stop}; only a complete "
                "cache has a shape (was this one decoded from a plan that drops tokens?)"
            )
        components = tuple(
            ComponentShape(name, x.shape[0], x.shape[2]) for name, x in self.components.items()
        )
        return LayerShape(self.layer_id, components, (start, stop), DTYPE_NAMES[self.dtype])


@dataclass(frozen=True, eq=False)
class RequestKV:
    """The cache of one request: its layers and the true position at which decode goes on."""

    layers: tuple[LayerKV, ...]
    next_position: int

    def __post_init__(self) -> None:
        for layer in self.layers:
            if len(layer.positions) and int(layer.positions[-1]) >= self.next_position:
                raise BadInput(
                    f"layer {layer.layer_id} holds position {int(layer.positions[-1])}, but the next "
                    f"position is {self.next_position}"
                )

    def shape(self) -> KVShape:
        return KVShape(tuple(layer.shape() for layer in self.layers))

    @property
    def resident_nbytes(self) -> int:
        """Bytes that this cache occupies in memory after decode."""
        return sum(
            x.numel() * x.element_size() for la in self.layers for x in la.components.values()
        )


@dataclass(frozen=True, eq=False)
class LayerView:
    """All that a scorer may see of one layer.

    queries: post-RoPE `[q_head, window, channel]` of the last prompt positions, or None;
    softmax_scale: what the model multiplies query-key products with; softcap: its logit soft cap.
    """

    kv: LayerKV
    queries: torch.Tensor | None = None
    softmax_scale: float = field(default=1.0)
    softcap: float | None = None
