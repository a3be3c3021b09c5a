"""The tensors of a request: LayerKV, RequestKV, LayerView. They compare by identity."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch

from kvprism.core import ComponentShape, KVShape, LayerShape
from kvprism.errors import BadInput, ShapeMismatch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# What a capture records only when it is asked to, because it costs time on every prompt.
Signal = Literal["mass", "future_queries", "output_norms"]
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class LayerKV:
    """One layer of one request.

    components: name -> `[head, token, channel]`, all of one dtype; positions: int64 `[token]`,
    ascending, the *original* positions of the tokens that are present.

    held: where heads hold different tokens, bool `[head, token]`: a token is present when some head
    holds it, and the rows of the others are padding, zeros that no query may attend to.

    Raises:
        ShapeMismatch: components disagree on tokens or dtype, or positions do not ascend from 0 on.
    """

    layer_id: int
    components: Mapping[str, torch.Tensor]
    positions: torch.Tensor
    held: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.positions.dim() != 1 or self.positions.dtype != torch.int64:
            raise ShapeMismatch(
                f"layer {self.layer_id}: expected int64 [token] positions, got "
                f"{self.positions.dtype} {list(self.positions.shape)}"
            )
        for name, x in self.components.items():
            if x.dim() != 3 or x.shape[1] != len(self.positions) or x.dtype not in DTYPE_NAMES:
                raise ShapeMismatch(
                    f"layer {self.layer_id} component {name!r}: expected [head, "
                    f"{len(self.positions)}, channel] in {list(DTYPES)}, got {list(x.shape)} "
                    f"{x.dtype}"
                )
        dtypes = sorted(str(x.dtype) for x in self.components.values())
        if len(set(dtypes)) != 1:
            raise ShapeMismatch(
                f"layer {self.layer_id}: expected components that share one dtype, got {dtypes}"
            )
        self._check_held()
        steps = self.positions.diff(prepend=self.positions.new_tensor([-1]))
        if bool((steps < 1).any()):
            at = int((steps < 1).nonzero()[0])
            raise ShapeMismatch(
                f"layer {self.layer_id}: positions must ascend from 0 on, got "
                f"{int(self.positions[at])} as number {at}"
            )

    def _check_held(self) -> None:
        shapes = {tuple(x.shape[:2]) for x in self.components.values()}
        if self.held is not None and (
            self.held.dtype != torch.bool or shapes != {tuple(self.held.shape)}
        ):
            raise ShapeMismatch(
                f"layer {self.layer_id}: expected held rows as bool [head, token] of components of "
                f"one such shape, got {self.held.dtype} {list(self.held.shape)} for "
                f"{sorted(shapes)}"
            )

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.components.values())).dtype

    def part(self, start: int, stop: int) -> "LayerKV":
        """The tokens `[start, stop)` of those that are present, as views."""
        bounds = torch.tensor([start, stop], device=self.positions.device)
        low, high = torch.searchsorted(self.positions, bounds).tolist()
        components = {name: x[:, low:high] for name, x in self.components.items()}
        held = None if self.held is None else self.held[:, low:high]
        return LayerKV(self.layer_id, components, self.positions[low:high], held)

    @classmethod
    def joined(cls, parts: "Sequence[LayerKV]") -> "LayerKV":
        """A layer of the tokens of its parts, in their order; every part holds all its rows."""
        components = {
            name: torch.cat([part.components[name] for part in parts], dim=1)
            for name in parts[0].components
        }
        return cls(parts[0].layer_id, components, torch.cat([part.positions for part in parts]))

    def shape(self) -> LayerShape:
        """The layer's shape over its token range; `ShapeMismatch` when tokens are missing."""
        if not len(self.positions):
            raise ShapeMismatch(f"layer {self.layer_id} holds no token; every one was dropped")
        start, stop = int(self.positions[0]), int(self.positions[-1]) + 1
        if stop - start != len(self.positions) or self.held is not None:
            raise ShapeMismatch(
                f"layer {self.layer_id}: tokens are missing between {start} and {stop}; only a "
                "complete cache has a shape (was this one decoded from a plan that drops tokens?)"
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
                    f"layer {layer.layer_id} holds position {int(layer.positions[-1])}, so the "
                    f"next position must be larger, got {self.next_position}"
                )

    def shape(self) -> KVShape:
        return KVShape(tuple(layer.shape() for layer in self.layers))

    @property
    def resident_nbytes(self) -> int:
        """Bytes that this cache occupies in memory after decode, padding of heads included."""
        return sum(
            x.numel() * x.element_size() for la in self.layers for x in la.components.values()
        )


@dataclass(frozen=True, eq=False)
class QueryStatistics:
    """What is known of a layer's queries as a whole, float32.

    mean: `[q_head, channel]`; covariance: `[q_head, channel, channel]`, over positions.
    """

    mean: torch.Tensor
    covariance: torch.Tensor


@dataclass(frozen=True, eq=False)
class LayerView:
    """All that a scorer may see of one layer.

    queries: post-RoPE `[q_head, window, channel]` of the last prompt positions, or None; query
    heads that share a KV head stand together; softmax_scale: what the model multiplies query-key
    products with; softcap: its logit soft cap.

    Signals, None unless the capture was asked for them: mass: float32 `[head, token]`, the
    attention that each token got from all queries of the prompt; future_queries: what queries after
    the prompt are expected to be, RoPE included; output_norms: float32 `[head, token]`, the L1
    length of each value after the layer's output matrix.

    Raises:
        ShapeMismatch: queries or signals that do not go with the layer's keys.
    """

    kv: LayerKV
    queries: torch.Tensor | None = None
    softmax_scale: float = 1.0
    softcap: float | None = None
    mass: torch.Tensor | None = None
    future_queries: QueryStatistics | None = None
    output_norms: torch.Tensor | None = None
    _found: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

    def once(self, key: Hashable, find: Callable[[], T]) -> T:
        """What `find` makes of this layer, found once: a table plans one prompt many times."""
        if key not in self._found:
            self._found[key] = find()
        found: T = self._found[key]
        return found

    def __post_init__(self) -> None:
        self._check_signals()
        if self.queries is None:
            return
        heads, tokens, channels = self.kv.components["k"].shape
        got = list(self.queries.shape)
        if len(got) != 3 or got[0] % heads or not 1 <= got[1] <= tokens or got[2] != channels:
            raise ShapeMismatch(
                f"layer {self.kv.layer_id}: expected queries [multiple of {heads} heads, 1 to "
                f"{tokens} positions, {channels} channels], got {got}"
            )

    def _check_signals(self) -> None:
        heads, tokens, channels = self.kv.components["k"].shape
        rows = {"attention mass": self.mass, "output norms": self.output_norms}
        for name, signal in rows.items():
            if signal is not None and list(signal.shape) != [heads, tokens]:
                raise ShapeMismatch(
                    f"layer {self.kv.layer_id}: expected {name} [{heads} heads, {tokens} tokens], "
                    f"got {list(signal.shape)}"
                )
        if self.future_queries is not None:
            got = list(self.future_queries.covariance.shape)
            if len(got) != 3 or got[0] % heads or got[1:] != [channels, channels]:
                raise ShapeMismatch(
                    f"layer {self.kv.layer_id}: expected query statistics of [multiple of {heads} "
                    f"heads, {channels}, {channels}], got {got}"
                )


@dataclass(frozen=True, eq=False)
class KeyConditioning:
    """What makes one layer's keys easy to quantise, and can be undone.

    offset: float32 `[head, channel]`, subtracted from the keys before RoPE; scale: float32
    `[head, channel // 2]`, positive, what each pair of channels that RoPE turns together is divided
    by; rotate: whether a Hadamard rotation over the channels follows; inverse_frequencies: float32
    `[channel // 2]`, the model's RoPE in radians per position.

    Raises:
        ShapeMismatch: arrays that do not go together.
        BadInput: values that are not finite, a scale that is not positive, or a rotation of a
            number of channels that is no power of two.
    """

    offset: torch.Tensor
    scale: torch.Tensor
    inverse_frequencies: torch.Tensor
    rotate: bool = False

    def __post_init__(self) -> None:
        heads, channels = self.offset.shape if self.offset.dim() == 2 else (0, 0)
        expected = {"scale": [heads, channels // 2], "inverse_frequencies": [channels // 2]}
        for name in ("offset", *expected):
            x: torch.Tensor = getattr(self, name)
            shape = expected.get(name, [heads, channels])
            if not heads or channels % 2 or list(x.shape) != shape or x.dtype != torch.float32:
                raise ShapeMismatch(
                    f"key conditioning {name}: expected float32 {shape}, got {x.dtype} "
                    f"{list(x.shape)}"
                )
            if not bool(x.isfinite().all()):
                raise BadInput(f"key conditioning {name} has values that are not finite")
        if not bool((self.scale > 0).all()):
            raise BadInput("key conditioning divides by scales, which must be positive")
        if self.rotate and channels & (channels - 1):
            raise BadInput(f"a Hadamard rotation needs 2, 4, 8, ... channels, got {channels}")
