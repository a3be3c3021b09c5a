"""`KVPrismConnector`: vLLM's connector interface on top of the scheduler and worker halves."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)
from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import FullAttentionSpec

from kvprism.codec.backend import refuse_slow
from kvprism.core import KVShape
from kvprism.errors import Unsupported
from kvprism.integrations.families import fingerprint, shape_of, windows_of
from kvprism.integrations.hf import load_tokenizer
from kvprism.integrations.vllm.config import TRIED_VLLM, Address, ConnectorConfig
from kvprism.integrations.vllm.consumer import Consumer
from kvprism.integrations.vllm.counts import Counts
from kvprism.integrations.vllm.layouts import PagedCache, layer_number, layout_of
from kvprism.integrations.vllm.metrics import KVPrismMetrics, KVPrismStats
from kvprism.integrations.vllm.producer import Producer
from kvprism.integrations.vllm.queries import QueryTap
from kvprism.integrations.vllm.scheduler import Load, Save, SchedulerHalf
from kvprism.tensors import DTYPE_NAMES

logger = init_logger("vllm.kvprism")


@dataclass
class StepWork(KVConnectorMetadata):
    """What the scheduler's half tells the worker's half of a step."""

    saves: list[Save]
    loads: list[Load]


class KVPrismConnector(KVConnectorBase_V1):
    """Named by `kv_connector`; vLLM makes one in its scheduler and one in its worker.

    Raises:
        BadInput: a wrong key in `kv_connector_extra_config`.
        Unsupported: a version, model, cache or parallel layout that was not tried.
        BudgetTooSmall: a budget that no prompt of this model could meet.
        CodecError: no kernels were compiled, and nobody asked for the slow codec.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        refuse_slow()
        transfer = vllm_config.kv_transfer_config
        self._producer, self._consumer = transfer.is_kv_producer, transfer.is_kv_consumer
        self._config = ConnectorConfig.of(
            transfer.kv_connector_extra_config, producer=self._producer, consumer=self._consumer
        )
        _check_version(self._config)
        _check_engine(vllm_config, kv_cache_config)
        self._counts = Counts()
        self._scheduler: SchedulerHalf | None = None
        self._worker: _WorkerHalf | None = None
        if role == KVConnectorRole.SCHEDULER:
            if self._producer:
                self._config.check_policy(_shape(vllm_config))
            self._scheduler = SchedulerHalf(
                self._config,
                transfer.engine_id,
                producer=self._producer,
                consumer=self._consumer,
            )
            self._counts = self._scheduler.counts

    # The scheduler's half.

    def on_new_request(self, request: Any) -> None:
        self._half.on_new_request(request)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        n = self._half.matched_tokens(request, num_computed_tokens)
        return n, n > 0

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self._half.allocated(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> StepWork:
        saves = self._half.step(_scheduled(scheduler_output, self._half))
        return StepWork(saves, self._half.take_loads())

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        return False, self._half.finished(request)

    # The worker's half.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._worker = _WorkerHalf(
            self._vllm_config, self._config, kv_caches, self._counts,
            producer=self._producer, consumer=self._consumer,
        )  # fmt: skip

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        for load in self._work.loads:
            self._ready.expect(load)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads are asynchronous: a request is not scheduled before its cache is there."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """A layer is computed; where a graph skips this call, `wait_for_save` makes up for it."""
        if self._work.saves and self._config.follows_layers:
            slots = attn_metadata.slot_mapping
            self._ready.save_layer(self._work.saves, layer_number(layer_name), slots)

    def wait_for_save(self) -> None:
        if self._work.saves:
            self._ready.save(self._work.saves)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        if self._worker is None:
            return None, None
        return None, self._worker.finished(finished_req_ids) or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        return set() if self._worker is None else self._worker.take_invalid()

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.close()

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Whether `save_kv_layer` must run, which no graph of a whole step does."""
        by_layer: bool = extra_config.get("send") == "layer"
        return by_layer or extra_config.get("importance") == "attention"

    # Metrics.

    def get_kv_connector_stats(self) -> KVPrismStats | None:
        taken = self._counts.take()
        return KVPrismStats(taken) if taken else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVPrismStats:
        return KVPrismStats(data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVPrismMetrics:
        return KVPrismMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    @property
    def _half(self) -> SchedulerHalf:
        assert self._scheduler is not None
        return self._scheduler

    @property
    def _ready(self) -> "_WorkerHalf":
        assert self._worker is not None
        return self._worker

    @property
    def _work(self) -> StepWork:
        work = self._get_connector_metadata()
        assert isinstance(work, StepWork)
        return work


class _WorkerHalf:
    """The blocks of this worker, and what sends from them and receives into them."""

    def __init__(
        self,
        vllm_config: Any,
        config: ConnectorConfig,
        kv_caches: dict[str, torch.Tensor],
        counts: Counts,
        *,
        producer: bool,
        consumer: bool,
    ) -> None:
        model = vllm_config.model_config
        own = fingerprint(
            model.hf_config, load_tokenizer(model.tokenizer), weights=config.settings.weights
        )
        if config.profile is not None:
            config.profile.check(own)
        self.cache = _paged(vllm_config, kv_caches)
        tap = _tap(vllm_config, kv_caches) if config.settings.importance == "attention" else None
        self._producer = Producer(config, own, self.cache, counts, tap) if producer else None
        self._consumer: Consumer | None = None
        if consumer:
            expected = shape_of(model.hf_config, 1)
            self._consumer = Consumer(config, own, expected, self.cache, counts)
            logger.info("kvprism listens on %s", self.addresses)

    @property
    def addresses(self) -> list[Address]:
        """Where this side listens."""
        return [] if self._consumer is None else self._consumer.addresses

    def expect(self, load: Load) -> None:
        assert self._consumer is not None
        self._consumer.inbox.expect(load)

    def save_layer(self, saves: Sequence[Save], layer: int, slot_mapping: torch.Tensor) -> None:
        assert self._producer is not None
        self._producer.save_layer(saves, layer, slot_mapping)

    def save(self, saves: Sequence[Save]) -> None:
        assert self._producer is not None
        self._producer.save(saves)

    def finished(self, ended: set[str]) -> set[str]:
        if self._producer is not None:
            self._producer.forget(ended)
        return set() if self._consumer is None else self._consumer.inbox.collect()

    def take_invalid(self) -> set[int]:
        return set() if self._consumer is None else self._consumer.inbox.take_invalid()

    def close(self) -> None:
        for side in (self._producer, self._consumer):
            if side is not None:
                side.close()


def _paged(vllm_config: Any, kv_caches: dict[str, torch.Tensor]) -> PagedCache:
    layers = vllm_config.compilation_config.static_forward_context
    views = {}
    for name, kv in kv_caches.items():
        backend = layers[name].get_attn_backend().get_name()
        views[layer_number(name)] = layout_of(backend, getattr(layers[name], "isa", ""))(kv)
    return PagedCache(views)


def _tap(vllm_config: Any, kv_caches: dict[str, torch.Tensor]) -> QueryTap:
    layers = vllm_config.compilation_config.static_forward_context
    return QueryTap({layer_number(name): layers[name].impl for name in kv_caches})


def _scheduled(output: Any, half: SchedulerHalf) -> Iterator[tuple[str, int, list[int]]]:
    """(request, tokens computed after this step, its blocks) of those that are sent."""
    computed = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
    cached = output.scheduled_cached_reqs
    computed |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    for request_id, before in computed.items():
        if half.sends(request_id):
            blocks = output.kv_connector_block_state.get_block_ids(request_id)
            yield request_id, before + output.num_scheduled_tokens[request_id], blocks[0]


def _shape(vllm_config: Any) -> KVShape:
    model = vllm_config.model_config
    return shape_of(model.hf_config, model.max_model_len, DTYPE_NAMES[model.dtype])


def _check_version(config: ConnectorConfig) -> None:
    release = vllm.__version__.partition("+")[0]
    if release not in TRIED_VLLM and not config.settings.allow_untried_vllm:
        raise Unsupported(
            f"vLLM {vllm.__version__}: this kvprism was run with {', '.join(TRIED_VLLM)}; set "
            "allow_untried_vllm to try it all the same"
        )


def _check_engine(vllm_config: Any, kv_cache_config: Any) -> None:
    """Refuse by name what would give wrong tokens, or was not tried."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    for key in ("tensor_parallel_size", "pipeline_parallel_size"):
        if getattr(parallel, key) != 1:
            raise Unsupported(f"{key} {getattr(parallel, key)}: only 1 is built")
    kinds = [type(group.kv_cache_spec).__name__ for group in kv_cache_config.kv_cache_groups]
    if kinds != [FullAttentionSpec.__name__]:
        raise Unsupported(
            f"this model's cache is of {kinds}; only one group of {FullAttentionSpec.__name__} is "
            "built: no sliding windows, no MLA, no recurrent state"
        )
    if any(windows_of(model.hf_config)):
        raise Unsupported(
            f"{model.model}: layers with a sliding window are not built for vLLM; only full "
            "attention is"
        )
    stored = vllm_config.cache_config.cache_dtype
    if stored not in ("auto", *DTYPE_NAMES.values()) or model.dtype not in DTYPE_NAMES:
        raise Unsupported(f"a cache of {stored} in a model of {model.dtype} is not built")
    if vllm_config.speculative_config is not None:
        raise Unsupported("speculative decoding beside a kvprism transfer is not built")
