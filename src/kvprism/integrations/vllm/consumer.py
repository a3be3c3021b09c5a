"""The decode side of the worker half: receive parts, write them into blocks, say what is there."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from kvprism.core import Capability, KVShape
from kvprism.errors import KVPrismError, PeerSilent
from kvprism.integrations.vllm.config import ConnectorConfig
from kvprism.integrations.vllm.counts import Counts
from kvprism.integrations.vllm.layouts import PagedCache
from kvprism.integrations.vllm.scheduler import Load, part_id
from kvprism.pipeline import Received, Receiver
from kvprism.tensors import RequestKV

logger = logging.getLogger("vllm.kvprism")

IDLE_S = 3600.0


@dataclass
class _Waiting:
    """A load that has its tokens up to `reached`."""

    load: Load
    reached: int
    since: float


@dataclass(frozen=True, eq=False)
class _Stored:
    kv: RequestKV
    nbytes: int
    since: float


class Inbox:
    """Brings parts and loads together, whichever comes first; every method may be called anywhere.

    A load that is not complete after `timeout_s` has failed, and all its blocks are invalid, so
    that nothing of a transfer that broke off stays in use. A part that nobody asks for within
    `lease_s` is dropped, and so are the oldest ones beyond `max_nbytes`.
    """

    def __init__(
        self,
        cache: PagedCache,
        counts: Counts,
        *,
        timeout_s: float,
        lease_s: float,
        max_nbytes: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cache, self._counts, self._clock = cache, counts, clock
        self._timeout_s, self._lease_s, self._max_nbytes = timeout_s, lease_s, max_nbytes
        self._lock = threading.Lock()
        self._waiting: dict[bytes, _Waiting] = {}
        self._stored: dict[bytes, _Stored] = {}
        self._finished: set[str] = set()
        self._invalid: set[int] = set()

    def expect(self, load: Load) -> None:
        """A request waits for its cache."""
        self._advance(_Waiting(load, load.first, self._clock()))

    def deliver(self, request: bytes, kv: RequestKV) -> None:
        """A part has come, under the wire's request id."""
        with self._lock:
            waiting = self._waiting.pop(request, None)
            if waiting is None:
                self._stored.pop(request, None)
                self._stored[request] = _Stored(kv, kv.resident_nbytes, self._clock())
                self._shrink()
        if waiting is not None and self._write(waiting, kv):
            self._advance(waiting)

    def collect(self) -> set[str]:
        """The requests whose loads have ended since the last call, well or not."""
        now = self._clock()
        with self._lock:
            for key, waiting in list(self._waiting.items()):
                if now - waiting.since > self._timeout_s:
                    del self._waiting[key]
                    self._fail(waiting, "timeout")
            late = [k for k, part in self._stored.items() if now - part.since > self._lease_s]
            for key in late:
                del self._stored[key]
            taken, self._finished = self._finished, set()
        if late:
            self._counts.add(expired=len(late))
        return taken

    def take_invalid(self) -> set[int]:
        """The blocks of failed loads since the last call."""
        with self._lock:
            taken, self._invalid = self._invalid, set()
        return taken

    def _advance(self, waiting: _Waiting) -> None:
        """Write what is already here, then wait for the next part, or be done."""
        while waiting.reached < waiting.load.stop:
            key = part_id(waiting.load.binding, waiting.reached)
            with self._lock:
                part = self._stored.pop(key, None)
                if part is None:
                    self._waiting[key] = waiting
                    return
            if not self._write(waiting, part.kv):
                return
        with self._lock:
            self._finished.add(waiting.load.request_id)
        self._counts.add(loads=1, wait_seconds=self._clock() - waiting.since)

    def _write(self, waiting: _Waiting, kv: RequestKV) -> bool:
        """Into the request's blocks; False when the part is not what its id promised."""
        load, start = waiting.load, waiting.reached
        stop = kv.next_position
        if stop > load.stop or any(
            la.positions.tolist() != [*range(start, stop)] for la in kv.layers
        ):
            with self._lock:
                self._fail(waiting, "wrong_tokens")
            return False
        skip = max(0, load.start - start)  # those that the local prefix cache has
        try:
            for la in kv.layers if skip < stop - start else ():
                keys, values = la.components["k"][:, skip:], la.components["v"][:, skip:]
                self._cache.scatter(la.layer_id, load.blocks, start + skip, keys, values)
        except Exception:  # whatever it is, the request must not wait for ever
            logger.exception("kvprism: request %s", load.request_id)
            with self._lock:
                self._fail(waiting, "not_written")
            return False
        waiting.reached = stop
        return True

    def _fail(self, waiting: _Waiting, cause: str) -> None:
        load = waiting.load
        self._invalid.update(load.blocks[load.start // self._cache.slots :])
        self._finished.add(load.request_id)
        self._counts.label("failures", cause)
        logger.warning("kvprism: cache of request %s: %s", load.request_id, cause)

    def _shrink(self) -> None:
        while sum(part.nbytes for part in self._stored.values()) > self._max_nbytes:
            del self._stored[next(iter(self._stored))]
            self._counts.add(expired=1)


class Consumer:
    """The ports on which prefill servers are served, one server each, and the inbox behind them."""

    def __init__(
        self,
        config: ConnectorConfig,
        fingerprint: bytes,
        expected: KVShape,
        cache: PagedCache,
        counts: Counts,
    ) -> None:
        assert config.listen is not None
        s = config.settings
        self._counts = counts
        self.inbox = Inbox(
            cache,
            counts,
            timeout_s=s.transfer_timeout_s,
            lease_s=s.lease_s,
            max_nbytes=s.max_inbox_nbytes,
        )
        host, ports = config.listen
        self._receivers = [
            Receiver(
                config.token,
                host=host,
                port=port,
                fingerprint=fingerprint,
                profile=config.profile,
                capability=Capability(drop="none"),
                expected=expected,
                max_request_nbytes=s.max_inbox_nbytes,
                credit_nbytes=s.credit_nbytes,
                lease_s=s.lease_s,
                silence_s=s.silence_s,
                allow_remote=s.allow_remote,
            )
            for port in ports
        ]
        self._closed = threading.Event()
        for receiver in self._receivers:
            threading.Thread(
                target=self._serve, args=(receiver,), name="kvprism-receiver", daemon=True
            ).start()

    @property
    def addresses(self) -> list[tuple[str, int]]:
        return [receiver.address for receiver in self._receivers]

    def close(self) -> None:
        self._closed.set()
        for receiver in self._receivers:
            receiver.close()

    def _serve(self, receiver: Receiver) -> None:
        while not self._closed.is_set():
            started = time.monotonic()
            try:
                received = receiver.receive(IDLE_S)
            except KVPrismError as error:
                idle = isinstance(error, PeerSilent) and time.monotonic() - started >= IDLE_S
                if not idle and not self._closed.is_set():
                    self._counts.label("failures", type(error).__name__)
                    logger.warning("kvprism: port %d: %s", receiver.address[1], error)
                continue
            except OSError:
                if self._closed.is_set():  # the listener was closed under us
                    return
                raise
            self._take(received)

    def _take(self, received: Received) -> None:
        self._counts.add(
            parts_received=1,
            received_bytes=received.wire_nbytes,
            decode_seconds=received.decode_s,
        )
        self.inbox.deliver(received.request, received.kv)
