"""What goes to one decode server: parts of prompts, planned, encoded and sent on a thread."""

import logging
import queue
import threading
import time

from kvprism.chunkwise import ChunkPlanner
from kvprism.errors import BudgetTooSmall, KVPrismError, TransportError
from kvprism.integrations.vllm.config import Address, ConnectorConfig
from kvprism.integrations.vllm.counts import Counts
from kvprism.integrations.vllm.parts import AnyPart, Asked, ChunkedPart, LayeredPart, Part, joined
from kvprism.integrations.vllm.scheduler import part_id
from kvprism.layerwise import LayerPlanner
from kvprism.pipeline import Sender, Sent
from kvprism.planning import plan
from kvprism.plans import Plan

logger = logging.getLogger("vllm.kvprism")


class Courier:
    """One decode server's connection and the thread that sends over it, one part at a time."""

    def __init__(
        self, address: Address, config: ConnectorConfig, fingerprint: bytes, counts: Counts
    ) -> None:
        self.address = address
        self._config, self._fingerprint, self._counts = config, fingerprint, counts
        self._parts: queue.SimpleQueue[AnyPart | None] = queue.SimpleQueue()
        self._lock, self._waiting_nbytes = threading.Lock(), 0
        self._sender: Sender | None = None
        self._thread = threading.Thread(target=self._run, name="kvprism-courier", daemon=True)
        self._thread.start()

    def put(self, part: AnyPart) -> bool:
        """Send a part soon; refused, and counted, when too much waits already."""
        with self._lock:
            full = self._waiting_nbytes + part.nbytes > self._config.settings.max_outbox_nbytes
            self._waiting_nbytes += 0 if full else part.nbytes
        if full:
            self._counts.label("failures", "outbox_full")
        else:
            self._parts.put(part)
        return not full

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
                if isinstance(part, ChunkedPart):
                    part.failed = True
            with self._lock:
                self._waiting_nbytes -= part.nbytes
        self._hang_up()

    def _send(self, part: AnyPart) -> None:
        """Over the open connection; where the peer has left it since, once more over a new one."""
        known = self._sender is not None
        try:
            self._send_over(self._connected(), part)
        except TransportError:
            self._hang_up()
            if not known or (not isinstance(part, Part) and part.taken):
                raise
            self._send_over(self._connected(), part)

    def _send_over(self, sender: Sender, part: AnyPart) -> None:
        if isinstance(part, LayeredPart):
            self._send_layers(sender, part)
            return
        if isinstance(part, ChunkedPart):
            self._send_chunks(sender, part)
            return
        started = time.perf_counter()
        planned = self._plan(sender, part)
        plan_s = time.perf_counter() - started
        sent = sender.send(part.kv, planned, part_id(part.binding, part.start))
        self._count(planned, plan_s, sent)

    def _send_layers(self, sender: Sender, part: LayeredPart) -> None:
        """Each layer as it comes."""
        planner, plan_s = self._planner(sender, part), 0.0
        request = part_id(part.binding, part.start)
        transfer = sender.open(part.shape, planner.menu, planner.split, request)
        layers = []
        for _ in part.shape.layers:
            view = part.take(transfer, self._config.settings.silence_s / 4)
            started = time.perf_counter()
            layers.append(planner.plan(view))
            plan_s += time.perf_counter() - started
            transfer.send_layer(view.kv, layers[-1])
            if not part.computed:
                self._counts.add(early_layers=1)
        sent = transfer.finish()
        self._count(Plan(tuple(layers), planner.menu, planner.split), plan_s, sent)

    def _send_chunks(self, sender: Sender, part: ChunkedPart) -> None:
        """Each chunk as it comes, under a provisional map; after the last, what is worth more."""
        s, patience_s = self._config.settings, self._config.settings.silence_s / 4
        planner = ChunkPlanner(
            part.shape,
            s.policy,
            s.budget,
            options=self._config.options,
            capability=sender.capability,
            profile=self._config.profile,
            must_fit=False,
        )
        request = part_id(part.binding, part.start)
        transfer = sender.open(part.shape, planner.menu, planner.split, request)
        chunks = []
        while not isinstance(item := part.take(transfer, patience_s), Asked):
            if item is None:
                self._counts.label("failures", "abandoned")
                self._hang_up()  # what was sent of it is dropped there
                return
            for kv in item:
                transfer.send_part(kv, planner.base(kv))
            chunks.append(item)
            if not part.computed:
                self._counts.add(early_chunks=1)
        whole, views = joined(chunks, item.queries)
        started = time.perf_counter()
        planned = planner.plan(views, item.importance)
        plan_s = time.perf_counter() - started
        transfer.send_upgrades(whole, planned)
        sent = transfer.finish()
        if planner.missed:
            self._counts.add(budget_misses=1)
        self._count(planned, plan_s, sent)

    def _planner(self, sender: Sender, part: LayeredPart) -> LayerPlanner:
        s = self._config.settings

        def planner(budget: str | float | None) -> LayerPlanner:
            return LayerPlanner(
                part.shape,
                s.policy,
                budget,
                options=part.options,
                capability=sender.capability,
                profile=self._config.profile,
            )

        try:
            return planner(s.budget)
        except BudgetTooSmall:
            self._counts.add(budget_misses=1)
            return planner("floor")

    def _plan(self, sender: Sender, part: Part) -> Plan:
        s = self._config.settings

        def planned(budget: str | float | None) -> Plan:
            return plan(
                part.views,
                s.policy,
                budget,
                options=part.options,
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
