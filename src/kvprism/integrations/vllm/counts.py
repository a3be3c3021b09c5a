"""What the connector counts between two looks of the engine; names, units and meaning in `COUNTS`.

A name may carry a label, as `failures:PeerLost`. Everything is a sum, so that intervals add up.
"""

import threading
from collections.abc import Mapping

# name -> (its label, help). Prometheus shows `vllm:kvprism_<name>_total`.
COUNTS: Mapping[str, tuple[str | None, str]] = {
    "parts_sent": (None, "Parts of prompts that the decode side acknowledged."),
    "parts_received": (None, "Parts of prompts that arrived complete and undamaged."),
    "reference_bytes": (None, "Bytes of the sent cache at 16 bits a value."),
    "wire_bytes": (None, "Bytes sent, all of them: payload, scales, maps, manifests, digests."),
    "early_layers": (None, "Layers that left before the last one of their step was computed."),
    "early_chunks": (None, "Chunks that left, at 4 bits, before their prompt was whole."),
    "received_bytes": (None, "Bytes received, counted as wire_bytes."),
    "tokens": ("tier", "Tokens sent by tier, averaged over layers and heads."),
    "plan_seconds": (None, "Seconds spent on planning."),
    "encode_seconds": (None, "Seconds spent on encoding."),
    "transfer_seconds": (None, "Seconds from the offer to the acknowledgement, less encoding."),
    "decode_seconds": (None, "Seconds spent on decoding."),
    "hold_seconds": (None, "Seconds for which prefill blocks were held for copying."),
    "wait_seconds": (None, "Seconds that decode requests waited for their cache."),
    "loads": (None, "Decode requests whose cache was loaded."),
    "failures": ("cause", "Parts or loads that failed; the request is computed again or fails."),
    "skipped": ("cause", "Requests that asked for a transfer and were served without one."),
    "budget_misses": (None, "Parts too small for the budget, sent at the policy's smallest size."),
    "without_queries": (None, "Parts planned by position: their queries were not computed."),
    "expired": (None, "Received parts that no request claimed in time."),
}


class Counts:
    """Sums that any thread may add to."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sums: dict[str, float] = {}

    def add(self, **amounts: float) -> None:
        """Add to unlabelled counts."""
        with self._lock:
            for name, amount in amounts.items():
                self._sums[name] = self._sums.get(name, 0) + amount

    def label(self, name: str, label: str, amount: float = 1) -> None:
        """Add to one label of a labelled count."""
        self.add(**{f"{name}:{label}": amount})

    def take(self) -> dict[str, float]:
        """What was added since the last call."""
        with self._lock:
            taken, self._sums = self._sums, {}
        return taken
