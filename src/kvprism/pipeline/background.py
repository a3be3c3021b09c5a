"""Layers, or parts of them, leave on a thread while the caller computes the next ones."""

import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Generic, Self, TypeVar

from kvprism.pipeline.sender import Sent, Transfer
from kvprism.plans import LayerPlan
from kvprism.staged import StagedPlan
from kvprism.tensors import LayerKV, LayerView, RequestKV

T = TypeVar("T")


class _Background(ABC, Generic[T]):
    """Takes what is handed over, in order, on a thread of its own.

    torch, the codec and the socket let go of the interpreter lock, so that the caller's computation
    goes on meanwhile. `plan_s` is time that passed, the caller's turns included; `plan_cpu_s` is
    this thread's own. While nothing comes it tells the peer that this side is at work.
    """

    def __init__(self, transfer: Transfer) -> None:
        self.plan_s = self.plan_cpu_s = 0.0
        self._transfer = transfer
        self._waiting: queue.SimpleQueue[T | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="kvprism-sender", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def put(self, item: T) -> None:
        """Hand over what comes next; returns at once.

        Raises:
            KVPrismError: what an earlier one met, in its plan or on its way.
        """
        self._raise()
        self._waiting.put(item)

    @abstractmethod
    def _take(self, item: T) -> None: ...

    def _end(self) -> None:
        """Wait until everything was taken."""
        self._waiting.put(None)
        self._thread.join()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _planned(self, plan: Callable[[], LayerPlan]) -> LayerPlan:
        started, computed = time.perf_counter(), time.thread_time()
        layer = plan()
        self.plan_s += time.perf_counter() - started
        self.plan_cpu_s += time.thread_time() - computed
        return layer

    def _work(self) -> None:
        try:
            while (item := self._transfer.wait_for(self._waiting)) is not None:
                self._take(item)
        except BaseException as error:  # raised again in the caller's thread
            self._error = error


class LayerSender(_Background[LayerView]):
    """Plans, encodes and sends the layers of one transfer, in order, on a thread of its own.

    plan: a layer's plan, such as `LayerPlanner.plan`; called on that thread.

    The request is closed after its last layer. Leave the context to end the thread; only `finish`
    says that the peer has everything.

    Example:
        with LayerSender(transfer, planner.plan) as layers:
            capture(model, ids, on_layer=layers.put)
            sent = layers.finish()
    """

    def __init__(self, transfer: Transfer, plan: Callable[[LayerView], LayerPlan]) -> None:
        self._plan = plan
        self._sent: Sent | None = None
        super().__init__(transfer)

    def finish(self) -> Sent:
        """Wait until the peer has acknowledged all layers.

        Raises:
            KVPrismError: as `put`, and as `Transfer.finish`.
        """
        self._end()
        self._raise()
        return self._sent or self._transfer.finish()

    def _take(self, view: LayerView) -> None:
        layer = self._planned(lambda: self._plan(view))
        self._transfer.send_layer(view.kv, layer)
        if not self._transfer.layers_left:
            # Now, not when the caller is done: what it still computes is no part of this.
            self._sent = self._transfer.finish()


class ChunkSender(_Background[LayerKV]):
    """The same for a prompt that is prefilled in chunks: each layer's part leaves as it comes.

    base: a part's provisional plan, such as `ChunkPlanner.base`; called on that thread.

    Example:
        with ChunkSender(transfer, planner.base) as parts:
            kv, views = capture_chunks(model, ids, 512, parts.put)
            parts.wait()
            sent = parts.finish(kv, planner.plan(views))
    """

    def __init__(self, transfer: Transfer, base: Callable[[LayerKV], LayerPlan]) -> None:
        self._base = base
        self.part_nbytes: list[int] = []  # what was sent of each part, in order
        super().__init__(transfer)

    def wait(self) -> None:
        """Until every part was sent; errors as `put`."""
        self._end()
        self._raise()

    def finish(self, kv: RequestKV, plan: StagedPlan) -> Sent:
        """After `wait`: send the upgrades, and wait until the peer has acknowledged everything."""
        self._transfer.send_upgrades(kv, plan)
        sent = self._transfer.finish()
        assert sent.wire_nbytes == plan.nbytes, (sent.wire_nbytes, plan.nbytes)
        return sent

    def _take(self, kv: LayerKV) -> None:
        before = self._transfer.nbytes
        self._transfer.send_part(kv, self._planned(lambda: self._base(kv)))
        self.part_nbytes.append(self._transfer.nbytes - before)
