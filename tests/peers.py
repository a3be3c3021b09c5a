"""Peers for the pipeline's tests: a thread, a process, and a link that a test can damage."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import pytest
from strategies import NATIVE, cache, plan_of, same_cache

from kvprism.codec.stream import decode, encode
from kvprism.errors import KVPrismError
from kvprism.layout import Split
from kvprism.pipeline import Received, Receiver, Sender, Sent
from kvprism.plans import Plan
from kvprism.tensors import RequestKV
from kvprism.transport import addresses, shm

TOKEN = bytes(range(32))
HOSTS = ["127.0.0.1", shm.HOST] if hasattr(os, "memfd_create") else ["127.0.0.1"]
SILENCE_S = 1.0
PATIENCE_S = 20.0
TIERS = np.random.default_rng(0).integers(0, 3, (4, 24))


@contextmanager
def in_thread(action: Callable[[], Any]) -> Iterator[Future[Any]]:
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(action)


def each_transport(name: str, **others: Any) -> pytest.MarkDecorator:
    """Run a test over TCP and over shared memory: with this argument or fixture, `indirect` one."""
    return pytest.mark.parametrize(name, HOSTS, **others)


def send_once(address: tuple[str, int], kv: RequestKV, plan: Plan, **settings: Any) -> Sent:
    settings = {"token": TOKEN, "silence_s": PATIENCE_S, **settings}
    with Sender(address, **settings) as sender:
        return sender.send(kv, plan)


def exchanged(receiver: Receiver, kv: RequestKV, plan: Plan) -> tuple[Sent, Received]:
    """The receiver still works: one request, on a connection of its own."""
    with in_thread(lambda: send_once(receiver.address, kv, plan)) as sent:
        received = receiver.receive(PATIENCE_S)
        return sent.result(), received


def request(**shape: Any) -> tuple[RequestKV, Plan]:
    """Three layers of every tier that keeps a token, in six manifests each."""
    kv = cache(**({"layers": 3, "heads": 4, "tokens": 24} | shape))
    tiers = TIERS[:, : len(kv.layers[0].positions)]
    return kv, plan_of(kv, tiers, split=Split(tokens=10, heads=2))


def still_works(receiver: Receiver) -> None:
    kv, chosen = request()
    _, received = exchanged(receiver, kv, chosen)
    assert same_cache(received.kv, decode(encode(kv, chosen)))


def pump(source: socket.socket, sink: socket.socket, change: Callable[[bytes], bytes]) -> None:
    """Carry what comes from one side to the other, descriptors too, until either ends."""
    with suppress(OSError):
        while True:
            data, descriptors, _, _ = socket.recv_fds(source, 65536, 1)
            if not data:
                break
            # What comes with a descriptor was sent at once, and comes last.
            first = len(data) - 16 * bool(descriptors)
            sink.sendall(change(data[:first]))
            if descriptors:
                socket.send_fds(sink, [change(data[first:])], descriptors)
                os.close(descriptors[0])
    for sock in (source, sink):
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)  # wakes the pump of the other direction
        sock.close()  # resets a peer that is still sending


class Tap:
    """A link of this machine: records what the sender says, and lets a test change it."""

    def __init__(
        self, target: tuple[str, int], change: Callable[[bytes], bytes] = lambda data: data
    ) -> None:
        self.recorded = bytearray()
        self._change, self._target = change, target
        listener = addresses.listen(shm.HOST if target[0] == shm.HOST else "127.0.0.1", 0)
        self.address, self._listener = listener.address, listener._socket
        self._sockets = [self._listener]
        self._threads = [threading.Thread(target=self._serve)]
        self._threads[0].start()

    def __enter__(self) -> "Tap":
        return self

    def __exit__(self, *_: object) -> None:
        for sock in self._sockets:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for sock in self._sockets:
            sock.close()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = addresses.dial(*self._target)._socket
                far.settimeout(None)
                self._sockets += [near, far]
                for each in (
                    threading.Thread(target=pump, args=(near, far, self._record)),
                    threading.Thread(target=pump, args=(far, near, lambda data: data)),
                ):
                    self._threads.append(each)
                    each.start()

    def _record(self, data: bytes) -> bytes:
        self.recorded += data
        return self._change(data)


@contextmanager
def peer_process(*arguments: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """This file as a process of its own, and the first line that it prints; killed at the end."""
    process = subprocess.Popen(
        [sys.executable, __file__, *map(str, arguments)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()  # type: ignore[union-attr]


def half_a_request(host: str, port: int) -> None:
    """Send the first of two layers, say so, and then nothing."""
    kv = cache()
    plan = plan_of(kv, NATIVE)
    with Sender((host, port), TOKEN, silence_s=PATIENCE_S) as sender:
        transfer = sender.open(plan.shape, plan.menu)
        transfer.send_layer(kv.layers[0], plan.layers[0])
        print("sent", flush=True)
        time.sleep(1000)


def receive_for_ever(host: str) -> None:
    """Say where, then take one request after another."""
    with Receiver(TOKEN, host=host, silence_s=PATIENCE_S) as receiver:
        print(receiver.address[1], flush=True)
        while True:
            with suppress(KVPrismError):
                receiver.receive(1000)


if __name__ == "__main__":
    if sys.argv[1] == "receive":
        receive_for_ever(sys.argv[2])
    else:
        half_a_request(sys.argv[2], int(sys.argv[3]))
