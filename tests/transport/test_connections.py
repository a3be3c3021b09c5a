"""One suite for every transport: large buffers both ways, and every way a peer can go away."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from kvprism.errors import AddressInUse, BadInput, PeerLost, PeerSilent
from kvprism.transport.addresses import dial, listen
from kvprism.transport.connection import Connection, Listener

from .reading import read

SILENCE_S = 0.3
PEER = """
import sys, time
from kvprism.transport.addresses import dial
connection = dial(sys.argv[1], int(sys.argv[2]))
connection.send([b"here"])
time.sleep(60)
"""
Connect = Callable[..., tuple[Connection, Connection]]


@pytest.fixture(params=["127.0.0.1", "shm"])
def host(request: pytest.FixtureRequest) -> str:
    if request.param == "shm" and not hasattr(os, "memfd_create"):
        pytest.skip("shared memory is built on Linux's memfd")
    return str(request.param)


@pytest.fixture
def connected(host: str) -> Connect:
    def connect(silence_s: float = 4.0) -> tuple[Connection, Connection]:
        with listen(host, 0, silence_s=silence_s) as listener:
            return dial(*listener.address, silence_s=silence_s), listener.accept(1.0)

    return connect


def pattern(nbytes: int) -> bytes:
    return (bytes(range(251)) * (nbytes // 251 + 1))[:nbytes]


def test_large_buffers_arrive_in_order_in_both_directions_at_once(connected: Connect) -> None:
    one, other = connected()
    data = pattern(32 * 2**20)
    pieces = [memoryview(data)[at : at + 3_000_001] for at in range(0, len(data), 3_000_001)]
    with one, other:
        senders = [
            threading.Thread(target=connection.send, args=(pieces,)) for connection in (one, other)
        ]
        received: list[bytes] = []
        readers = [
            threading.Thread(target=lambda c=connection: received.append(read(c, len(data))))
            for connection in (one, other)
        ]
        for thread in senders + readers:
            thread.start()
        for thread in senders + readers:
            thread.join()
        assert received == [data, data]
        counts = [one.bytes_sent, one.bytes_received, other.bytes_sent, other.bytes_received]
        assert counts == [len(data)] * 4


def test_more_buffers_than_the_system_takes_at_once_are_sent(connected: Connect) -> None:
    one, other = connected()
    pieces = [bytes([i % 256]) * (i % 7) for i in range(5000)]
    with one, other:
        one.send(pieces)
        one.send([])
        one.send([b"", bytearray(b"end")])
        expected = b"".join(pieces) + b"end"
        assert read(other, len(expected)) == expected


def test_buffers_of_any_item_type_are_sent_as_bytes(connected: Connect) -> None:
    one, other = connected()
    with one, other:
        one.send([memoryview(bytes(8)).cast("I"), memoryview(b"abcd").cast("H", [2])])
        assert read(other, 12) == bytes(8) + b"abcd"


def test_readable_says_whether_something_is_there(connected: Connect) -> None:
    one, other = connected()
    with one, other:
        assert not other.readable(0)
        one.send([b"x"])
        assert other.readable(1.0)
        read(other, 1)
        assert not other.readable(0.01)
        one.close()
        assert other.readable(1.0)


def test_a_closed_connection_is_noticed_by_the_reader(connected: Connect) -> None:
    one, other = connected()
    with other:
        one.close()
        with pytest.raises(PeerLost, match="closed"):
            read(other, 1)


def test_a_closed_connection_is_noticed_by_the_writer(connected: Connect) -> None:
    one, other = connected()
    with other:
        one.close()
        with pytest.raises(PeerLost, match="broke"):
            for _ in range(100):
                other.send([bytes(2**20)])


def test_our_own_closed_connection_is_an_error_too(connected: Connect) -> None:
    one, other = connected()
    one.close()
    other.close()
    with pytest.raises(PeerLost):
        one.send([b"x"])


def test_a_peer_that_gives_nothing_is_silent(connected: Connect) -> None:
    one, other = connected(SILENCE_S)
    with one, other:
        started = time.monotonic()
        with pytest.raises(PeerSilent, match=r"give a byte for 0.3 s"):
            read(other, 1)
        assert SILENCE_S <= time.monotonic() - started < SILENCE_S + 1


def test_a_peer_that_takes_nothing_is_silent(connected: Connect) -> None:
    one, other = connected(SILENCE_S)
    with one, other, pytest.raises(PeerSilent, match="take a byte"):
        one.send([bytes(2**20)] * 256)


def test_a_slow_peer_is_not_silent(connected: Connect) -> None:
    one, other = connected(SILENCE_S)

    def drip() -> None:
        for _ in range(5):
            time.sleep(SILENCE_S / 2)
            one.send([b"x"])

    with one, other:
        thread = threading.Thread(target=drip)
        thread.start()
        assert read(other, 5) == b"xxxxx"
        thread.join()


@pytest.fixture
def listener(host: str) -> Iterator[Listener[Connection]]:
    with listen(host, 0, silence_s=1.0) as listener:
        yield listener


@pytest.fixture
def peer(listener: Listener) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", PEER, *map(str, listener.address)])
    yield process
    process.kill()
    process.wait()


def test_a_killed_process_is_noticed(
    listener: Listener[Connection], peer: subprocess.Popen[bytes]
) -> None:
    with listener.accept(30.0) as connection:
        assert read(connection, 4) == b"here"
        peer.send_signal(signal.SIGKILL)
        with pytest.raises(PeerLost):
            read(connection, 1)


@pytest.mark.parametrize("verb", ["reading", "writing"])
def test_a_stopped_process_is_noticed(
    listener: Listener[Connection], peer: subprocess.Popen[bytes], verb: str
) -> None:
    with listener.accept(30.0) as connection:
        assert read(connection, 4) == b"here"
        peer.send_signal(signal.SIGSTOP)
        started = time.monotonic()
        with pytest.raises(PeerSilent):
            if verb == "reading":
                read(connection, 1)
            else:
                connection.send([bytes(2**20)] * 256)
        assert time.monotonic() - started < 3.0


def test_a_taken_port_is_named(host: str) -> None:
    with listen(host, 0) as first:
        port = first.address[1]
        with pytest.raises(AddressInUse, match=f"port {port}"):
            listen(host, port)


def test_a_port_is_free_again_after_close(host: str, connected: Connect) -> None:
    one, other = connected()
    one.close()
    other.close()
    with listen(host, 0) as first:
        port = first.address[1]
    listen(host, port).close()


def test_a_refused_connection_is_lost_at_once(host: str) -> None:
    with listen(host, 0) as gone:
        address = gone.address
    started = time.monotonic()
    with pytest.raises(PeerLost, match="is the peer running"):
        dial(*address)
    assert time.monotonic() - started < 1.0


def test_nobody_comes(host: str) -> None:
    with listen(host, 0) as listener, pytest.raises(PeerSilent, match="nobody connected"):
        listener.accept(0.05)


@pytest.mark.parametrize("port", [-1, 65536])
def test_an_impossible_port_is_refused(host: str, port: int) -> None:
    for call in (lambda: listen(host, port), lambda: dial(host, port)):
        with pytest.raises(BadInput, match=str(port)):
            call()
