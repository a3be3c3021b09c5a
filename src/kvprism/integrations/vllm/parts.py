"""Parts of prompts on their way to a courier: whole, layer by layer, or chunk by chunk."""

import queue
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from kvprism.core import KVShape
from kvprism.pipeline import Transfer
from kvprism.planning import PlanOptions
from kvprism.tensors import LayerKV, LayerView, RequestKV


@dataclass(frozen=True, eq=False)
class Part:
    """Tokens of a prompt, from `start` on, all of whose layers are here."""

    binding: bytes
    start: int
    options: PlanOptions
    views: tuple[LayerView, ...]

    @property
    def nbytes(self) -> int:
        return self.kv.resident_nbytes

    @property
    def kv(self) -> RequestKV:
        layers = tuple(view.kv for view in self.views)
        return RequestKV(layers, int(layers[0].positions[-1]) + 1)


@dataclass(eq=False)
class LayeredPart:
    """The same, whose layers come one after the other while a step is computed; `put` them all.

    taken: how many of them were sent, or tried; computed: the step is past its last layer.
    """

    binding: bytes
    start: int
    options: PlanOptions
    shape: KVShape
    taken: int = 0
    computed: bool = False
    given: set[int] = field(default_factory=set)
    _waiting: queue.SimpleQueue[LayerView] = field(default_factory=queue.SimpleQueue)

    @property
    def nbytes(self) -> int:
        return self.shape.native_nbytes

    def put(self, view: LayerView) -> None:
        self.given.add(view.kv.layer_id)
        self.computed |= len(self.given) == len(self.shape.layers)
        self._waiting.put(view)

    def take(self, transfer: Transfer, patience_s: float) -> LayerView:
        """The next layer; as `Transfer.wait_for`."""
        view = transfer.wait_for(self._waiting, patience_s)
        self.taken += 1
        return view


# Layer id -> its last queries and its softmax scale.
Queries = Mapping[int, tuple[torch.Tensor, float]]


@dataclass(frozen=True, eq=False)
class Asked:
    """How a prompt's tokens are ranked, and by which queries."""

    importance: str
    queries: Queries


@dataclass(eq=False)
class ChunkedPart:
    """A prompt whose chunks come one after the other, over several steps; `end` or `give_up` it.

    taken: how many chunks were sent, or tried; computed: the last one is here; failed: nobody takes
    more of it.
    """

    binding: bytes
    start: int
    shape: KVShape
    taken: int = 0
    computed: bool = False
    failed: bool = False
    _waiting: queue.SimpleQueue[tuple[LayerKV, ...] | Asked | None] = field(
        default_factory=queue.SimpleQueue
    )

    @property
    def nbytes(self) -> int:
        return self.shape.native_nbytes

    def put(self, chunk: tuple[LayerKV, ...]) -> None:
        """All layers of the next tokens."""
        self.computed = int(chunk[0].positions[-1]) + 1 == self.shape.next_position
        self._waiting.put(chunk)

    def end(self, asked: Asked) -> None:
        """The last chunk was put."""
        self._waiting.put(asked)

    def give_up(self) -> None:
        """The request ended before its prompt was whole."""
        self._waiting.put(None)

    def take(self, transfer: Transfer, patience_s: float) -> tuple[LayerKV, ...] | Asked | None:
        """What comes next, None: it was given up; as `Transfer.wait_for`."""
        item = transfer.wait_for(self._waiting, patience_s)
        self.taken += 1
        return item


AnyPart = Part | LayeredPart | ChunkedPart


def joined(
    chunks: Sequence[tuple[LayerKV, ...]], queries: Queries
) -> tuple[RequestKV, tuple[LayerView, ...]]:
    """The whole of a prompt that came in chunks."""
    layers = tuple(LayerKV.joined(parts) for parts in zip(*chunks, strict=True))
    views = tuple(view_of(kv, queries) for kv in layers)
    return RequestKV(layers, int(layers[0].positions[-1]) + 1), views


def view_of(kv: LayerKV, queries: Queries) -> LayerView:
    """A layer with its queries, where there are any."""
    own = queries.get(kv.layer_id)
    return LayerView(kv) if own is None else LayerView(kv, *own)
