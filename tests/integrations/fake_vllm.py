"""As much of vLLM 0.32.0 as the connector touches, so that its contract is tested without vLLM.

`tests/engine` compares these signatures with the real ones, in the environment that has them.
"""

import enum
import inspect
import logging
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

VERSION = "0.32.0"
V1 = "vllm.distributed.kv_transfer.kv_connector.v1"


class KVConnectorRole(enum.Enum):
    SCHEDULER = 0
    WORKER = 1


class KVConnectorMetadata(ABC):  # noqa: B024
    pass


class KVConnectorBase_V1(ABC):
    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        self._connector_metadata: KVConnectorMetadata | None = None
        self._vllm_config = vllm_config
        self._kv_transfer_config = vllm_config.kv_transfer_config
        self._kv_cache_config = kv_cache_config
        self._role = role

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        self._connector_metadata = connector_metadata

    def clear_connector_metadata(self) -> None:
        self._connector_metadata = None

    def _get_connector_metadata(self) -> KVConnectorMetadata:
        assert self._connector_metadata is not None
        return self._connector_metadata

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        return

    @abstractmethod
    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None: ...

    @abstractmethod
    def wait_for_layer_load(self, layer_name: str) -> None: ...

    @abstractmethod
    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None: ...

    @abstractmethod
    def wait_for_save(self) -> None: ...

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        return None, None

    def get_block_ids_with_load_errors(self) -> set[int]:
        return set()

    def shutdown(self) -> None:
        return None

    def get_kv_connector_stats(self) -> Any:
        return None

    @abstractmethod
    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]: ...

    @abstractmethod
    def update_state_after_alloc(
        self, request: Any, blocks: Any, num_external_tokens: int
    ) -> None: ...

    @abstractmethod
    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata: ...

    def on_new_request(self, request: Any) -> None:
        return

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        return False, None

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        return False

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> Any:
        return None

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> Any:
        return None


@dataclass
class KVConnectorStats:
    data: dict[str, Any] = field(default_factory=dict)

    def reset(self) -> None:
        raise NotImplementedError

    def aggregate(self, other: "KVConnectorStats") -> "KVConnectorStats":
        raise NotImplementedError

    def reduce(self) -> dict[str, int | float]:
        raise NotImplementedError

    def is_empty(self) -> bool:
        raise NotImplementedError


class KVConnectorPromMetrics:
    def __init__(
        self,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        self._counter_cls = metric_types["counter"]
        self._labelnames = labelnames
        self.per_engine_labelvalues = per_engine_labelvalues

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        raise NotImplementedError


class FullAttentionSpec:
    pass


class MLAAttentionSpec(FullAttentionSpec):
    pass


def modules() -> dict[str, ModuleType]:
    """Module name -> a module with what the connector imports from it."""
    contents: dict[str, dict[str, Any]] = {
        "vllm": {"__version__": f"{VERSION}+cpu"},
        f"{V1}.base": {
            name: globals()[name]
            for name in ("KVConnectorBase_V1", "KVConnectorMetadata", "KVConnectorRole")
        },
        f"{V1}.metrics": {
            name: globals()[name] for name in ("KVConnectorPromMetrics", "KVConnectorStats")
        },
        "vllm.logger": {"init_logger": logging.getLogger},
        "vllm.v1.kv_cache_interface": {"FullAttentionSpec": FullAttentionSpec},
    }
    made: dict[str, ModuleType] = {}
    for name in contents:
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            path = ".".join(parts[:depth])
            made.setdefault(path, ModuleType(path))
        vars(made[name]).update(contents[name])
    return made


@contextmanager
def installed() -> Iterator[ModuleType]:
    """`kvprism.integrations.vllm.connector`, imported beside this vLLM."""
    ours = ["kvprism.integrations.vllm.connector", "kvprism.integrations.vllm.metrics"]
    names = [*modules(), *ours]
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.modules.update(modules())
    try:
        yield import_module(ours[0])
    finally:
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(before)


def signatures(base: type) -> dict[str, list[str]]:
    """Method -> its parameters, of those methods that this file describes."""
    own = {
        name: member
        for name, member in vars(KVConnectorBase_V1).items()
        if inspect.isfunction(member) or isinstance(member, classmethod)
    }
    found: dict[str, list[str]] = {}
    for name in own:
        method: Callable[..., Any] = getattr(base, name)
        found[name] = list(inspect.signature(method).parameters)
    return found


def request(rid: str, ids: list[int], params: dict[str, Any] | None = None) -> Any:
    """A `Request` whose block hashes are of its ids and its salt."""
    made = SimpleNamespace(
        request_id=rid,
        prompt_token_ids=ids,
        num_prompt_tokens=len(ids),
        kv_transfer_params=params,
        cache_salt=None,
        lora_request=None,
        prompt_embeds=None,
        mm_features=[],
        block_hashes=[],
        abort_immediately=False,
    )
    made.update_block_hashes = lambda: made.block_hashes.append((made.cache_salt, tuple(ids)))
    made.update_block_hashes()
    return made
