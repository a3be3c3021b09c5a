"""The prefill side of the worker half: copy blocks after a step; plan, encode and send beside."""

import logging
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvprism.errors import BudgetTooSmall, KVPrismError, TransportError
from kvprism.integrations.vllm.config import Address, ConnectorConfig
from kvprism.integrations.vllm.counts import Counts
from kvprism.integrations.vllm.layouts import PagedCache
from kvprism.integrations.vllm.scheduler import Save, part_id
from kvprism.pipeline import Sender, Sent
from kvprism.planning import plan
from kvprism.plans import Plan
from kvprism.tensors import LayerKV, LayerView, RequestKV

logger = logging.getLogger("vllm.kvprism")

# layer id -> keys and values [head, token, channel]
Rows = dict[int, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, eq=False)
class Part:
    """The tokens `[start, stop)` of a prompt, ready to be planned."""

    binding: bytes
    start: int
    kv: RequestKV
    nbytes: int


class Producer:
    """Copies what a step computed, and gives it to the courier of its destination.

    Blocks are free again when `save` returns. What waits to be sent is bounded: a part beyond
    `max_outbox_nbytes` is not sent, and the decode side computes the prompt itself.
    """

    def __init__(
        self, config: ConnectorConfig, fingerprint: bytes, cache: PagedCache, counts: Counts
    ) -> None:
        self._config, self._fingerprint = config, fingerprint
        self._cache, self._counts = cache, counts
        self._copied: dict[str, list[tuple[int, Rows]]] = {}
        self._couriers: dict[Address, Courier] = {}

    def save(self, saves: Sequence[Save]) -> None:
        """Copy the blocks of this step's tokens to host memory; send what is complete."""
        started = time.perf_counter()
        for save in saves:
            rows = {
                layer: self._cache.gather(layer, save.blocks, save.start, save.stop)
                for layer in self._cache.layers
            }
            cpu = {layer: (k.cpu(), v.cpu()) for layer, (k, v) in rows.items()}
            self._copied.setdefault(save.request_id, []).append((save.start, cpu))
        if saves:
            self._counts.add(hold_seconds=time.perf_counter() - started)
        for save in saves:
            if save.last or self._config.settings.send == "chunk":
                part = _joined(save.binding, self._copied.pop(save.request_id))
                self._courier(save.address).put(part)

    def forget(self, request_ids: set[str]) -> None:
        """Drop what was copied of requests that ended before their prompt was whole."""
        for request_id in request_ids:
            self._copied.pop(request_id, None)

    def close(self) -> None:
        for courier in self._couriers.values():
            courier.close()

    def _courier(self, address: Address) -> "Courier":
        if address not in self._couriers:
            self._couriers[address] = Courier(
                address, self._config, self._fingerprint, self._counts
            )
        return self._couriers[address]


def _joined(binding: bytes, chunks: Sequence[tuple[int, Rows]]) -> Part:
    start = chunks[0][0]
    layers = []
    for layer in sorted(chunks[0][1]):
        keys, values = (torch.cat([rows[layer][i] for _, rows in chunks], dim=1) for i in (0, 1))
        positions = torch.arange(start, start + keys.shape[1])
        layers.append(LayerKV(layer, {"k": keys, "v": values}, positions))
    kv = RequestKV(tuple(layers), int(positions[-1]) + 1)
    return Part(binding, start, kv, kv.resident_nbytes)


class Courier:
    """One decode server's connection and the thread that sends over it, one part at a time."""

    def __init__(
        self, address: Address, config: ConnectorConfig, fingerprint: bytes, counts: Counts
    ) -> None:
        self.address = address
        self._config, self._fingerprint, self._counts = config, fingerprint, counts
        self._parts: queue.SimpleQueue[Part | None] = queue.SimpleQueue()
        self._lock, self._waiting_nbytes = threading.Lock(), 0
        self._sender: Sender | None = None
        self._thread = threading.Thread(target=self._run, name="kvprism-courier", daemon=True)
        self._thread.start()

    def put(self, part: Part) -> None:
        """Send a part soon; refused, and counted, when too much waits already."""
        with self._lock:
            full = self._waiting_nbytes + part.nbytes > self._config.settings.max_outbox_nbytes
            self._waiting_nbytes += 0 if full else part.nbytes
        if full:
            self._counts.label("failures", "outbox_full")
        else:
            self._parts.put(part)

    def close(self) -> None:
        self._parts.put(None)
        self._thread.join(self._config.settings.silence_s)

    def _run(self) -> None:
        while (part := self._parts.get()) is not None:
            try:
                self._send(part)
            except Exception as error:  # a bug in one part must not stop all that follow
                self._counts.label("failures", type(error).__name__)
                known = isinstance(error, KVPrismError)
                logger.warning(
                    "kvprism: not sent to %s port %d: %r", *self.address, error, exc_info=not known
                )
                self._hang_up()
            with self._lock:
                self._waiting_nbytes -= part.nbytes
        self._hang_up()

    def _send(self, part: Part) -> None:
        """Over the open connection; where the peer has left it since, once more over a new one."""
        known = self._sender is not None
        try:
            self._send_over(self._connected(), part)
        except TransportError:
            self._hang_up()
            if not known:
                raise
            self._send_over(self._connected(), part)

    def _send_over(self, sender: Sender, part: Part) -> None:
        started = time.perf_counter()
        planned = self._plan(sender, part)
        plan_s = time.perf_counter() - started
        sent = sender.send(part.kv, planned, part_id(part.binding, part.start))
        self._count(planned, plan_s, sent)

    def _plan(self, sender: Sender, part: Part) -> Plan:
        s = self._config.settings
        view = [LayerView(layer) for layer in part.kv.layers]

        def planned(budget: str | float | None) -> Plan:
            return plan(
                view,
                s.policy,
                budget,
                options=self._config.options,
                capability=sender.capability,
                profile=self._config.profile,
            )

        try:
            return planned(s.budget)
        except BudgetTooSmall:
            self._counts.add(budget_misses=1)
            return planned("floor")

    def _count(self, planned: Plan, plan_s: float, sent: Sent) -> None:
        self._counts.add(
            parts_sent=1,
            reference_bytes=planned.shape.reference_nbytes,
            wire_bytes=sent.wire_nbytes,
            plan_seconds=plan_s,
            encode_seconds=sent.encode_s,
            transfer_seconds=sent.seconds - sent.encode_s,
        )
        rows = planned.histogram()
        per_row = planned.shape.layers[0].n_tokens / sum(rows.values())
        for tier, n in rows.items():
            if n:
                self._counts.label("tokens", tier, n * per_row)

    def _connected(self) -> Sender:
        if self._sender is None:
            s = self._config.settings
            self._sender = Sender(
                self.address,
                self._config.token,
                fingerprint=self._fingerprint,
                profile=self._config.profile,
                silence_s=s.silence_s,
                allow_remote=s.allow_remote,
            )
        return self._sender

    def _hang_up(self) -> None:
        if self._sender is not None:
            self._sender.close()
            self._sender = None
