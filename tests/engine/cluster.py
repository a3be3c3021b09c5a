"""A prefill and a decode server behind a link that a test can hold, and further ones when asked."""

from pathlib import Path
from typing import Any

from link import Link
from servers import Server, free_port

from kvprism.integrations import tiny
from kvprism.transport.token import create_token

TIMEOUT_S = 8.0
BUDGETS = ("0.30", "0.52")
CHUNKS = ["--max-num-batched-tokens", "256"]


class Cluster:
    """Decode, raw prefill behind a link, and lossy prefill servers when needed.

    prefill: further `kv_connector_extra_config` of the former; blocks: how many decode has.
    """

    def __init__(
        self, folder: Path, prefill: dict[str, Any] | None = None, blocks: int | None = None
    ) -> None:
        self.folder, self.model = folder, tiny.find("tiny")
        create_token(folder / "token")
        create_token(folder / "other-token")
        self.port = free_port()
        self.listen = f"127.0.0.1:{self.port}-{self.port + len(BUDGETS)}"
        self.link = Link(("127.0.0.1", self.port))
        self._lossy: dict[str, Server] = {}
        self._blocks = [] if blocks is None else ["--num-gpu-blocks-override", str(blocks)]
        self.decode = self.start_decode()
        try:
            self.prefill = self.start_prefill(**(prefill or {}))
            self.decode.wait(), self.prefill.wait()
        except BaseException:
            self.close()
            raise

    @property
    def servers(self) -> list[Server]:
        both = [getattr(self, name) for name in ("decode", "prefill") if hasattr(self, name)]
        return [*both, *self._lossy.values()]

    def lossy(self, budget: str) -> Server:
        """A prefill server with that budget, started when first asked for; one sends by chunks."""
        if budget not in self._lossy:
            number = BUDGETS.index(budget)
            extra = {
                "decode_address": f"127.0.0.1:{self.port + 1 + number}",
                "policy": "spectrum",
                "budget": budget,
                "send": ("request", "chunk")[number],
            }
            started = self._start(f"prefill-{budget}", "kv_producer", extra, settings=CHUNKS)
            self._lossy[budget] = started
            started.wait()
        return self._lossy[budget]

    def start_decode(self, policy: str = "recompute") -> Server:
        extra = {"listen": self.listen, "transfer_timeout_s": TIMEOUT_S}
        return self._start("decode", "kv_consumer", extra, policy=policy, settings=self._blocks)

    def start_prefill(self, settings: list[str] | None = None, **extra: Any) -> Server:
        extra = {"decode_address": self.link.address, **extra}
        return self._start("prefill", "kv_producer", extra, settings=settings)

    def close(self) -> None:
        self.link.release()
        for server in self.servers:
            server.kill()

    def _start(self, name: str, role: str, extra: dict[str, Any], **more: Any) -> Server:
        extra = {"token_file": str(self.folder / "token"), **extra}
        return Server(self.model, self.folder / f"{name}.log", role, extra, **more)
