"""Opaque buffers over TCP, both ways, with deadlines on silence.

A connection never waits longer than `silence_s` for the peer to take or give a byte: a peer that
is killed raises `PeerLost`, one that stands still raises `PeerSilent`. A side that works for longer
keeps the connection alive by sending something.
"""

import contextlib
import errno
import ipaddress
import os
import select
import socket
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Self

from kvprism.errors import AddressInUse, BadInput, PeerLost, PeerSilent, TransportError

Buffer = bytes | bytearray | memoryview

SILENCE_S = 4.0
_MAX_BUFFERS = os.sysconf("SC_IOV_MAX")
_SO_MAX_PACING_RATE, _UNPACED = 47, 2**64 - 1  # of Linux; Python does not name it
_KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}  # not on every system


class Connection:
    """One established connection; `bytes_sent` and `bytes_received` count what went through it."""

    def __init__(self, sock: socket.socket, silence_s: float) -> None:
        self.bytes_sent = self.bytes_received = 0
        self.silence_s = silence_s
        self._socket = sock
        self._peer = _named(sock.getpeername())
        sock.settimeout(silence_s)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE.items():
            if hasattr(socket, name):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, buffers: Sequence[Buffer]) -> None:
        """Send all the buffers, in order, without joining them.

        Raises:
            PeerLost: the peer closed or reset the connection.
            PeerSilent: it took nothing for `silence_s`.
        """
        views = (memoryview(buffer) for buffer in buffers)
        pending = deque(view.cast("B") for view in views if view.nbytes)
        while pending:
            with self._failures("take"):
                sent = self._socket.sendmsg(list(islice(pending, _MAX_BUFFERS)))
            self.bytes_sent += sent
            while sent and sent >= len(pending[0]):
                sent -= len(pending.popleft())
            if sent:
                pending[0] = pending[0][sent:]

    def recv_into(self, buffer: memoryview) -> int:
        """Receive at least one byte and at most what fits; how many.

        Raises:
            PeerLost: the peer closed or reset the connection.
            PeerSilent: it gave nothing for `silence_s`.
        """
        assert len(buffer) > 0
        with self._failures("give"):
            n = self._socket.recv_into(buffer)
        if n == 0:
            raise PeerLost(f"{self._peer} closed the connection")
        self.bytes_received += n
        return n

    def pace(self, bytes_per_s: int | None) -> None:
        """Have the system send at most so fast; None: as fast as it goes.

        Raises:
            TransportError: this system cannot.
        """
        rate = _UNPACED if bytes_per_s is None else bytes_per_s
        try:
            self._socket.setsockopt(
                socket.SOL_SOCKET, _SO_MAX_PACING_RATE, rate.to_bytes(8, "little")
            )
        except OSError as error:
            raise TransportError(f"this system paces no connection: {error.strerror}") from error

    def readable(self, timeout_s: float) -> bool:
        """Whether `recv_into` would return, or raise, without waiting."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(timeout_s * 1000))

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

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


class Listener:
    """A bound port; `address` is what to dial."""

    def __init__(self, sock: socket.socket, silence_s: float) -> None:
        self._socket, self._silence_s = sock, silence_s
        host, port = sock.getsockname()[:2]
        self.address: tuple[str, int] = (host, port)

    def accept(self, timeout_s: float) -> Connection:
        """The next connection.

        Raises:
            PeerSilent: nobody dialled for `timeout_s`.
        """
        self._socket.settimeout(timeout_s)
        try:
            sock, _ = self._socket.accept()
        except TimeoutError as error:
            where = _named(self.address)
            raise PeerSilent(f"nobody connected to {where} within {timeout_s:g} s") from error
        return Connection(sock, self._silence_s)

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def listen(
    host: str = "127.0.0.1",
    port: int = 0,
    *,
    silence_s: float = SILENCE_S,
    allow_remote: bool = False,
) -> Listener:
    """Bind `port`, or any free one for 0.

    Raises:
        AddressInUse: the port is taken.
        BadInput: not a loopback address, unless `allow_remote`; an impossible port.
        TransportError: the system refuses the address.
    """
    _check_address(host, port, allow_remote)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return Listener(socket.create_server((host, port), family=family), silence_s)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise AddressInUse(
                f"port {port} on {host} is taken; choose another, or 0 for any"
            ) from error
        raise TransportError(f"cannot listen on {host} port {port}: {error.strerror}") from error


def dial(
    host: str,
    port: int,
    timeout_s: float = SILENCE_S,
    *,
    silence_s: float = SILENCE_S,
    allow_remote: bool = False,
) -> Connection:
    """Connect to a listener.

    Raises:
        PeerLost: nobody listens there.
        PeerSilent: no answer within `timeout_s`.
        BadInput: not a loopback address, unless `allow_remote`; an impossible port.
    """
    _check_address(host, port, allow_remote)
    try:
        return Connection(socket.create_connection((host, port), timeout_s), silence_s)
    except TimeoutError as error:
        raise PeerSilent(f"{host} port {port} did not answer within {timeout_s:g} s") from error
    except OSError as error:
        raise PeerLost(
            f"cannot reach {host} port {port}: {error.strerror}; is the peer running?"
        ) from error


def _check_address(host: str, port: int, allow_remote: bool) -> None:
    if not 0 <= port <= 65535:
        raise BadInput(f"port {port} is not in [0, 65535]")
    if not allow_remote and not _is_loopback(host):
        raise BadInput(
            f"{host!r} is not a loopback address: the token authenticates the peers, but nothing "
            "is encrypted; say allow_remote=True on a network that you trust"
        )


def _named(address: tuple[str, int]) -> str:
    host, port = address[:2]  # IPv6 adds flow and scope
    return f"{host} port {port}"


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
