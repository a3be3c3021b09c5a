"""A producer and a consumer over a real connection, each with blocks of its own."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from kvprism.core import KVShape
from kvprism.integrations.vllm.config import ConnectorConfig
from kvprism.integrations.vllm.consumer import Consumer
from kvprism.integrations.vllm.counts import Counts
from kvprism.integrations.vllm.layouts import PagedCache, cpu_views
from kvprism.integrations.vllm.producer import Producer
from kvprism.integrations.vllm.queries import QueryTap
from kvprism.integrations.vllm.scheduler import Load, Save
from kvprism.transport.token import create_token

LAYERS, HEADS, CHANNELS, SLOTS, BLOCKS = 2, 2, 64, 32, 8
FROM, TO = (1, 4, 2), (7, 0, 5)  # the request's blocks there and here
N = 70
BINDING = bytes(32)
FINGERPRINT = bytes(range(32))
EXPECTED = KVShape.dense(layers=LAYERS, heads=HEADS, channels=CHANNELS, tokens=1)
PATIENCE_S = 20.0
Settings = dict[str, Any]


def paged(random: bool, slots: int = SLOTS) -> tuple[PagedCache, list[torch.Tensor]]:
    make = torch.randn if random else torch.zeros
    tensors = [make(BLOCKS, HEADS, slots, 2 * CHANNELS) for _ in range(LAYERS)]
    return PagedCache({i: cpu_views(kv) for i, kv in enumerate(tensors)}), tensors


class FakeAttention:
    """What a layer's implementation has of vLLM's."""

    scale = CHANNELS**-0.5

    def forward(self, layer: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return query + key


class Ends:
    """A producer and a consumer with the same token, and their caches and counts."""

    def __init__(
        self, stack: ExitStack, folder: Path, ours: Settings, theirs: Settings, slots: int
    ) -> None:
        create_token(folder / "token")
        self.sent, self.got = Counts(), Counts()
        self.source, _ = paged(random=True)
        self.target, self.blocks = paged(False, slots)
        common = {"token_file": str(folder / "token"), "silence_s": 2.0}
        listen = {"listen": "127.0.0.1:0", "transfer_timeout_s": 1.0}
        extra = common | listen | theirs
        config = ConnectorConfig.of(extra, producer=False, consumer=True)
        self.consumer = Consumer(config, FINGERPRINT, EXPECTED, self.target, self.got)
        stack.callback(self.consumer.close)
        host, port = self.consumer.addresses[0]
        extra = common | {"decode_address": f"{host}:{port}"} | ours
        self.config = ConnectorConfig.of(extra, producer=True, consumer=False)
        self.attention = [FakeAttention() for _ in range(LAYERS)]
        self.producer = self.sender()
        stack.callback(lambda: self.producer.close())

    def sender(self, fingerprint: bytes = FINGERPRINT) -> Producer:
        taps = self.config.settings.importance == "attention"
        tap = QueryTap(dict(enumerate(self.attention))) if taps else None
        return Producer(self.config, fingerprint, self.source, self.sent, tap)

    def save(self, start: int = 0, stop: int = N, last: bool = True) -> None:
        assert self.config.decode_address is not None
        save = Save("p", BINDING, self.config.decode_address, FROM, start, stop, last, (0, N))
        self.producer.save([save])

    def expect(self, start: int = 0) -> None:
        self.consumer.inbox.expect(Load("d", BINDING, TO, start, N))

    def finished(self) -> set[int]:
        """Wait for the load; the blocks that are invalid then."""
        wait(lambda: self.consumer.inbox.collect() == {"d"})
        return self.consumer.inbox.take_invalid()

    def same(self, start: int = 0) -> bool:
        return all(
            torch.equal(a, b)
            for layer in range(LAYERS)
            for a, b in zip(
                self.source.gather(layer, FROM, start, N),
                self.target.gather(layer, TO, start, N),
                strict=True,
            )
        )


def wait(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not done():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.01)


@contextmanager
def ends(
    folder: Path, theirs: Settings | None = None, slots: int = SLOTS, **ours: Any
) -> Iterator[Ends]:
    with ExitStack() as stack:
        yield Ends(stack, folder, ours, theirs or {}, slots)


def settled(counts: Counts, name: str) -> dict[str, float]:
    """Everything counted once `name` is there."""
    found: dict[str, float] = {}
    wait(lambda: bool(found.update(counts.take()) or name in found))
    return found
