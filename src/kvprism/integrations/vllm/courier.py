"""What goes to one decode server: parts of prompts, planned, encoded and sent on a thread."""

import logging
import queue
import threading
import time
from dataclasses import dataclass, field

from kvprism.core import KVShape
from kvprism.errors import BudgetTooSmall, KVPrismError, TransportError
from kvprism.integrations.vllm.config import Address, ConnectorConfig
from kvprism.integrations.vllm.counts import Counts
from kvprism.integrations.vllm.scheduler import part_id
from kvprism.layerwise import LayerPlanner
from kvprism.pipeline import Sender, Sent, Transfer
from kvprism.planning import PlanOptions, plan
from kvprism.plans import Plan
from kvprism.tensors import LayerView, RequestKV

logger = logging.getLogger("vllm.kvprism")


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
        """The next layer; meanwhile the peer hears every `patience_s` that this side is at work."""
        while True:
            try:
                view = self._waiting.get(timeout=patience_s)
            except queue.Empty:
                transfer.ping()
            else:
                self.taken += 1
                return view


class Courier:
    """One decode server's connection and the thread that sends over it, one part at a time."""

    def __init__(
        self, address: Address, config: ConnectorConfig, fingerprint: bytes, counts: Counts
    ) -> None:
        self.address = address
        self._config, self._fingerprint, self._counts = config, fingerprint, counts
        self._parts: queue.SimpleQueue[Part | LayeredPart | None] = queue.SimpleQueue()
        self._lock, self._waiting_nbytes = threading.Lock(), 0
        self._sender: Sender | None = None
        self._thread = threading.Thread(target=self._run, name="kvprism-courier", daemon=True)
        self._thread.start()

    def put(self, part: Part | LayeredPart) -> bool:
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
            with self._lock:
                self._waiting_nbytes -= part.nbytes
        self._hang_up()

    def _send(self, part: Part | LayeredPart) -> None:
        """Over the open connection; where the peer has left it since, once more over a new one."""
        known = self._sender is not None
        try:
            self._send_over(self._connected(), part)
        except TransportError:
            self._hang_up()
            if not known or (isinstance(part, LayeredPart) and part.taken):
                raise
            self._send_over(self._connected(), part)

    def _send_over(self, sender: Sender, part: Part | LayeredPart) -> None:
        if isinstance(part, LayeredPart):
            self._send_layers(sender, part)
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
