"""Layers leave on a thread of their own while the caller computes the next ones."""

import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from kvprism.pipeline.link import SILENCE_S
from kvprism.pipeline.sender import Sent, Transfer
from kvprism.plans import LayerPlan
from kvprism.tensors import LayerView


class LayerSender:
    """Plans, encodes and sends the layers of one transfer, in order, on a thread of its own.

    plan: a layer's plan, such as `LayerPlanner.plan`; called on that thread. torch, the codec and
    the socket let go of the interpreter lock, so that the caller's computation goes on meanwhile.
    `plan_s` is time that passed, the caller's turns included; `plan_cpu_s` is this thread's own.
    While no layer comes it tells the peer that this side is at work.

    The request is closed after its last layer. Leave the context to end the thread; only `finish`
    says that the peer has everything.

    Example:
        with LayerSender(transfer, planner.plan) as layers:
            capture(model, ids, on_layer=layers.put)
            sent = layers.finish()
    """

    def __init__(self, transfer: Transfer, plan: Callable[[LayerView], LayerPlan]) -> None:
        self.plan_s = self.plan_cpu_s = 0.0
        self._transfer, self._plan = transfer, plan
        self._waiting: queue.SimpleQueue[LayerView | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._sent: Sent | None = None
        self._thread = threading.Thread(target=self._work, name="kvprism-sender", daemon=True)
        self._thread.start()

    def __enter__(self) -> "LayerSender":
        return self

    def __exit__(self, *_: object) -> None:
        self._waiting.put(None)
        self._thread.join()

    def put(self, view: LayerView) -> None:
        """Hand over a layer; returns at once.

        Raises:
            KVPrismError: what an earlier layer met; see `LayerPlanner.plan`, `Transfer.send_layer`.
        """
        self._raise()
        self._waiting.put(view)

    def finish(self) -> Sent:
        """Wait until the peer has acknowledged all layers.

        Raises:
            KVPrismError: as `put`, and as `Transfer.finish`.
        """
        self._waiting.put(None)
        self._thread.join()
        self._raise()
        return self._sent or self._transfer.finish()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        try:
            while (view := self._next()) is not None:
                started, computed = time.perf_counter(), time.thread_time()
                layer = self._plan(view)
                self.plan_s += time.perf_counter() - started
                self.plan_cpu_s += time.thread_time() - computed
                self._transfer.send_layer(view.kv, layer)
                if not self._transfer.layers_left:
                    # Now, not when the caller is done: what it still computes is no part of this.
                    self._sent = self._transfer.finish()
        except BaseException as error:  # raised again in the caller's thread
            self._error = error

    def _next(self) -> LayerView | None:
        while True:
            with suppress(queue.Empty):
                return self._waiting.get(timeout=SILENCE_S / 4)
            self._transfer.ping()
