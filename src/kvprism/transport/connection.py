"""What every transport's connection does: opaque buffers over a stream socket, both ways.

A connection never waits longer than `silence_s` for the peer to take or give a byte: a peer that
is killed raises `PeerLost`, one that stands still raises `PeerSilent`. A side that works for longer
keeps the connection alive by sending something.
"""

import contextlib
import os
import select
import socket
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Generic, Self, TypeVar

from kvprism.errors import PeerLost, PeerSilent, TransportError

Buffer = bytes | bytearray | memoryview
Address = tuple[str, int]

SILENCE_S = 4.0
_MAX_BUFFERS = os.sysconf("SC_IOV_MAX")


class _Owner:
    """What owns a socket and ends with it."""

    _socket: socket.socket

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Connection(_Owner):
    """One established connection; `bytes_sent` and `bytes_received` count what went through it."""

    def __init__(self, sock: socket.socket, peer: str, silence_s: float) -> None:
        self.bytes_sent = self.bytes_received = 0
        self.silence_s = silence_s
        self._socket, self._peer = sock, peer
        sock.settimeout(silence_s)

    def allocate(self, nbytes: int) -> memoryview:
        """Writable memory of which `send` makes the fewest copies; what is in it is not defined.

        Raises:
            TransportError: there is no such memory left.
        """
        return memoryview(bytearray(nbytes))

    def reuse(self) -> None:
        """The peer has used up all that was sent: `allocate` may give that memory again."""

    def send(self, buffers: Sequence[Buffer]) -> None:
        """Send all the buffers, in order, without joining them.

        Raises:
            PeerLost: the peer closed or reset the connection.
            PeerSilent: it took nothing for `silence_s`.
        """
        views = (memoryview(buffer) for buffer in buffers)
        self._send([view.cast("B") for view in views if view.nbytes])

    def recv_into(self, buffer: memoryview) -> int:
        """Receive at least one byte and at most what fits; how many.

        Raises:
            PeerLost: the peer closed or reset the connection.
            PeerSilent: it gave nothing for `silence_s`.
        """
        assert len(buffer) > 0
        with self._failures("give"):
            n = self._socket.recv_into(buffer)
        self._check_open(n)
        self.bytes_received += n
        return n

    def pace(self, bytes_per_s: int | None) -> None:
        """Have the system send at most so fast; None: as fast as it goes.

        Raises:
            TransportError: this system, or this transport, cannot.
        """
        if bytes_per_s is not None:
            raise TransportError(f"the connection to {self._peer} is not a link that can be paced")

    def readable(self, timeout_s: float) -> bool:
        """Whether `recv_into` would return, or raise, without waiting."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(timeout_s * 1000))

    def _send(self, views: Sequence[memoryview]) -> None:
        self._put(views)
        self.bytes_sent += sum(map(len, views))

    def _put(self, views: Sequence[Buffer]) -> None:
        pending = deque(memoryview(view) for view in views)
        while pending:
            with self._failures("take"):
                sent = self._socket.sendmsg(list(islice(pending, _MAX_BUFFERS)))
            while sent and sent >= len(pending[0]):
                sent -= len(pending.popleft())
            if sent:
                pending[0] = pending[0][sent:]

    def _check_open(self, n: int) -> None:
        if n == 0:
            raise PeerLost(f"{self._peer} closed the connection")

    @contextlib.contextmanager
    def _failures(self, verb: str) -> Iterator[None]:
        try:
            yield
        except TimeoutError as error:
            raise PeerSilent(
                f"{self._peer} did not {verb} a byte for {self.silence_s:g} s"
            ) from error
        except OSError as error:
            raise PeerLost(f"the connection to {self._peer} broke: {error.strerror}") from error


ConnectionT_co = TypeVar("ConnectionT_co", bound=Connection, covariant=True)


class Listener(_Owner, Generic[ConnectionT_co]):
    """A bound address; `address` is what to dial."""

    def __init__(
        self,
        sock: socket.socket,
        address: Address,
        connect: Callable[[socket.socket], ConnectionT_co],
    ) -> None:
        self.address = address
        self._socket, self._connect = sock, connect

    def accept(self, timeout_s: float) -> ConnectionT_co:
        """The next connection.

        Raises:
            PeerSilent: nobody dialled for `timeout_s`.
        """
        self._socket.settimeout(timeout_s)
        try:
            sock, _ = self._socket.accept()
        except TimeoutError as error:
            where = named(self.address)
            raise PeerSilent(f"nobody connected to {where} within {timeout_s:g} s") from error
        return self._connect(sock)


def named(address: Address) -> str:
    """An address as errors write it."""
    host, port = address[:2]  # IPv6 adds flow and scope
    return f"{host} port {port}"
