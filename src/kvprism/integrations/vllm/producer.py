"""The prefill side of the worker half: copy blocks after a step, or each layer's within it."""

import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from kvprism.core import ComponentShape, KVShape, LayerShape
from kvprism.integrations.vllm.config import Address, ConnectorConfig
from kvprism.integrations.vllm.counts import Counts
from kvprism.integrations.vllm.courier import Courier
from kvprism.integrations.vllm.layouts import PagedCache
from kvprism.integrations.vllm.parts import (
    Asked,
    ChunkedPart,
    LayeredPart,
    Part,
    joined,
    view_of,
)
from kvprism.integrations.vllm.queries import QueryTap, last_slots
from kvprism.integrations.vllm.scheduler import Save
from kvprism.planning import PlanOptions
from kvprism.score.attention import last_queries
from kvprism.tensors import DTYPE_NAMES, LayerKV


class Producer:
    """Copies what a step computed, and gives it to the courier of its destination.

    Blocks are free again when `save` returns. What waits to be sent is bounded: a part beyond
    `max_outbox_nbytes` is not sent, and the decode side computes the prompt itself. tap: where
    importance is `attention`, what the layers were asked.
    """

    def __init__(
        self,
        config: ConnectorConfig,
        fingerprint: bytes,
        cache: PagedCache,
        counts: Counts,
        tap: QueryTap | None = None,
    ) -> None:
        self._config, self._fingerprint = config, fingerprint
        self._cache, self._counts, self._tap = cache, counts, tap
        self._layered = config.settings.send == "layer"
        self._upgrades = config.settings.send == "upgrade"
        self._begun: dict[str, ChunkedPart] = {}  # whose last chunk has not come
        self._copied: dict[str, list[tuple[LayerKV, ...]]] = {}
        self._open: dict[str, LayeredPart | None] = {}  # of this step; None: not to be sent
        self._queries: dict[str, dict[int, tuple[torch.Tensor, float]]] = {}  # `Queries`
        self._couriers: dict[Address, Courier] = {}

    def save_layer(self, saves: Sequence[Save], layer: int, slot_mapping: torch.Tensor) -> None:
        """A layer of this step is computed; slot_mapping: where its tokens are in the cache."""
        for save in saves:
            if self._tap is not None:
                self._remember(self._tap, save, layer, slot_mapping)
            if self._layered:
                self._hand_over(save, layer, computed=False)

    def save(self, saves: Sequence[Save]) -> None:
        """After the step: copy to host memory what `save_layer` did not; send what is complete."""
        for save in saves:
            if self._layered:
                for layer in sorted(self._cache.layers):
                    self._hand_over(save, layer, computed=True)
                self._open.pop(save.request_id, None)
                self._queries.pop(save.request_id, None)
                continue
            if self._upgrades:
                self._hand_over_chunk(save)
                continue
            self._copied.setdefault(save.request_id, []).append(self._layers(save))
            if save.last or self._config.settings.send == "chunk":
                self._courier(save.address).put(self._joined(save))

    def forget(self, request_ids: set[str]) -> None:
        """Drop what was copied of requests that ended before their prompt was whole."""
        for request_id in request_ids:
            self._copied.pop(request_id, None)
            self._queries.pop(request_id, None)
            if (begun := self._begun.pop(request_id, None)) is not None:
                begun.give_up()

    def close(self) -> None:
        for courier in self._couriers.values():
            courier.close()

    def _layers(self, save: Save) -> tuple[LayerKV, ...]:
        return tuple(self._layer(save, layer) for layer in sorted(self._cache.layers))

    def _layer(self, save: Save, layer: int) -> LayerKV:
        """A step's tokens of one layer, copied."""
        started = time.perf_counter()
        keys, values = self._cache.gather(layer, save.blocks, save.start, save.stop)
        components = {"k": keys.cpu(), "v": values.cpu()}
        self._counts.add(hold_seconds=time.perf_counter() - started)
        return LayerKV(layer, components, torch.arange(save.start, save.stop))

    def _hand_over(self, save: Save, layer: int, *, computed: bool) -> None:
        """One layer of a part that is under way; the first one opens it. computed: all are."""
        if save.request_id not in self._open:
            part = self._opened(save)
            accepted = self._courier(save.address).put(part)
            self._open[save.request_id] = part if accepted else None
        taker = self._open[save.request_id]
        if taker is not None and layer not in taker.given:
            taker.computed |= computed
            queries = self._queries.get(save.request_id, {})
            taker.put(view_of(self._layer(save, layer), queries))

    def _hand_over_chunk(self, save: Save) -> None:
        """All layers of a step's tokens; the first chunk of a prompt opens its transfer."""
        if save.start == save.whole[0]:
            part = ChunkedPart(save.binding, save.start, self._shape(*save.whole))
            if self._courier(save.address).put(part):
                self._begun[save.request_id] = part
        begun = self._begun.get(save.request_id)
        if begun is not None and not begun.failed:
            begun.put(self._layers(save))
        if save.last:
            self._begun.pop(save.request_id, None)
            importance = self._options(save.request_id).importance
            asked = Asked(importance, self._queries.pop(save.request_id, {}))
            if begun is not None:
                begun.end(asked)

    def _opened(self, save: Save) -> LayeredPart:
        shape, options = self._shape(save.start, save.stop), self._options(save.request_id)
        return LayeredPart(save.binding, save.start, options, shape)

    def _shape(self, start: int, stop: int) -> KVShape:
        layers = []
        for layer, (keys, _) in sorted(self._cache.layers.items()):
            components = tuple(ComponentShape(x, keys.shape[1], keys.shape[3]) for x in ("k", "v"))
            layers.append(LayerShape(layer, components, (start, stop), DTYPE_NAMES[keys.dtype]))
        return KVShape(tuple(layers))

    def _joined(self, save: Save) -> Part:
        """All that was copied of a request since its last part."""
        options = self._options(save.request_id)
        queries = self._queries.pop(save.request_id, {})
        kv, views = joined(self._copied.pop(save.request_id), queries)
        return Part(save.binding, int(kv.layers[0].positions[0]), options, views)

    def _remember(self, tap: QueryTap, save: Save, layer: int, slot_mapping: torch.Tensor) -> None:
        """The last window of what a part was asked so far, over its steps."""
        slots = last_slots(save.blocks, save.start, save.stop, self._cache.slots)
        queries = tap.window(layer, slots, slot_mapping)
        known = self._queries.setdefault(save.request_id, {})
        before, _ = known.pop(layer, (None, 0.0))
        if queries is not None:
            known[layer] = last_queries(before, queries), tap.scales[layer]

    def _options(self, request_id: str) -> PlanOptions:
        """Where a prefix cache had the prompt there are no queries: planned by position then."""
        options = self._config.options
        if options.importance != "attention" or self._queries.get(request_id):
            return options
        self._counts.add(without_queries=1)
        return replace(options, importance="position")

    def _courier(self, address: Address) -> Courier:
        if address not in self._couriers:
            self._couriers[address] = Courier(
                address, self._config, self._fingerprint, self._counts
            )
        return self._couriers[address]
