"""The connector's counts in vLLM's log line and on its `/metrics` page."""

from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

from kvprism.integrations.vllm.counts import COUNTS


@dataclass
class KVPrismStats(KVConnectorStats):
    """Sums of one interval; see `COUNTS`."""

    def reset(self) -> None:
        self.data.clear()

    def aggregate(self, other: KVConnectorStats) -> "KVPrismStats":
        for name, amount in other.data.items():
            self.data[name] = self.data.get(name, 0) + amount
        return self

    def reduce(self) -> dict[str, int | float]:
        shown = {name: round(amount, 6) for name, amount in sorted(self.data.items())}
        if self.data.get("reference_bytes"):
            fraction = self.data["wire_bytes"] / self.data["reference_bytes"]
            shown["fraction of 16 bits"] = round(fraction, 4)
        return shown

    def is_empty(self) -> bool:
        return not self.data


class KVPrismMetrics(KVConnectorPromMetrics):
    """One Prometheus counter `vllm:kvprism_<name>_total` for every row of `COUNTS`."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters = {
            name: self._counter_cls(
                name=f"vllm:kvprism_{name}",
                documentation=text,
                labelnames=[*labelnames, *([label] if label else [])],
            )
            for name, (label, text) in COUNTS.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        own = self.per_engine_labelvalues[engine_idx]
        for key, amount in transfer_stats_data.items():
            name, _, label = key.partition(":")
            self._counters[name].labels(*own, *([label] if label else [])).inc(amount)
