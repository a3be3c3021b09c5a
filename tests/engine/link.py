"""A link on loopback between two servers, which a test can hold or damage; it outlives both."""

import socket
import threading
from collections.abc import Callable

from peers import pump


class Link:
    """Passes on what comes; `hold()` lets so many bytes through and then none until `release()`.

    change: applied to every piece that the dialling side sends.
    """

    def __init__(self, target: tuple[str, int]) -> None:
        self.change: Callable[[bytes], bytes] = lambda data: data
        self.held = threading.Event()  # something waits because of `hold`
        self._target, self._left = target, -1
        self._open = threading.Event()
        self._open.set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._serve, daemon=True).start()

    @property
    def address(self) -> str:
        host, port = self._listener.getsockname()
        return f"{host}:{port}"

    def hold(self, after_nbytes: int) -> None:
        self.held.clear()
        self._open.clear()
        self._left = after_nbytes

    def release(self) -> None:
        self._open.set()

    def _serve(self) -> None:
        while True:
            near, _ = self._listener.accept()
            try:
                far = socket.create_connection(self._target)
            except OSError:
                near.close()
                continue
            for each in (
                threading.Thread(target=pump, args=(near, far, self._sent), daemon=True),
                threading.Thread(target=pump, args=(far, near, lambda x: x), daemon=True),
            ):
                each.start()

    def _sent(self, data: bytes) -> bytes:
        if not self._open.is_set():
            self._left -= len(data)
            if self._left < 0:
                self.held.set()
                self._open.wait()
        return self.change(data)
