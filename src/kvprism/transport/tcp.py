"""Opaque buffers over TCP."""

import errno
import ipaddress
import socket

from kvprism.errors import AddressInUse, BadInput, PeerLost, PeerSilent, TransportError
from kvprism.transport import connection
from kvprism.transport.connection import SILENCE_S, named

_SO_MAX_PACING_RATE, _UNPACED = 47, 2**64 - 1  # of Linux; Python does not name it
_KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}  # not on every system


class Connection(connection.Connection):
    """One established TCP connection."""

    def __init__(self, sock: socket.socket, silence_s: float) -> None:
        super().__init__(sock, named(sock.getpeername()), silence_s)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE.items():
            if hasattr(socket, name):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def pace(self, bytes_per_s: int | None) -> None:
        rate = _UNPACED if bytes_per_s is None else bytes_per_s
        try:
            self._socket.setsockopt(
                socket.SOL_SOCKET, _SO_MAX_PACING_RATE, rate.to_bytes(8, "little")
            )
        except OSError as error:
            raise TransportError(f"this system paces no connection: {error.strerror}") from error


Listener = connection.Listener[Connection]


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
        sock = socket.create_server((host, port), family=family)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise AddressInUse(
                f"port {port} on {host} is taken; choose another, or 0 for any"
            ) from error
        raise TransportError(f"cannot listen on {host} port {port}: {error.strerror}") from error
    bound = sock.getsockname()[:2]
    return Listener(sock, bound, lambda accepted: Connection(accepted, silence_s))


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


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
