"""Which transport an address names: the host `shm` is shared memory, any other is one of TCP."""

from kvprism.transport import shm, tcp
from kvprism.transport.connection import SILENCE_S, Connection, Listener

# Transport -> the host that stands for it on this machine.
HOSTS = {"tcp": "127.0.0.1", "shm": shm.HOST}


def listen(
    host: str, port: int, *, silence_s: float = SILENCE_S, allow_remote: bool = False
) -> Listener[Connection]:
    """Bind an address; port 0: any free one. Errors as `tcp.listen` and `shm.listen`."""
    if host == shm.HOST:
        return shm.listen(port, silence_s=silence_s)
    return tcp.listen(host, port, silence_s=silence_s, allow_remote=allow_remote)


def dial(
    host: str,
    port: int,
    timeout_s: float = SILENCE_S,
    *,
    silence_s: float = SILENCE_S,
    allow_remote: bool = False,
) -> Connection:
    """Connect to a listener. Errors as `tcp.dial` and `shm.dial`."""
    if host == shm.HOST:
        return shm.dial(port, timeout_s, silence_s=silence_s)
    return tcp.dial(host, port, timeout_s, silence_s=silence_s, allow_remote=allow_remote)
