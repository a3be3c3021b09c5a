"""`kvprism bench transport`: one cache between two processes of this machine, TCP beside shm."""

import ctypes
import json
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import Any

import torch
import xxhash

from kvprism.commands import console
from kvprism.commands.bench import Say, quartiles
from kvprism.errors import BadInput, PeerLost, TransportError
from kvprism.pipeline import Receiver, Sender, Sent
from kvprism.planning import plan
from kvprism.plans import Plan
from kvprism.tensors import LayerKV, LayerView, RequestKV
from kvprism.transport.addresses import HOSTS

LAYERS, HEADS, CHANNELS = 8, 8, 128
WARM_UPS = 2
WAIT_S = 60.0

Row = dict[str, Any]


def bench_transport(
    mib: list[int], repeats: int, advance: Say = lambda done, total: None
) -> list[Row]:
    """Send raw caches of these sizes over both transports in turn; a row for each of both.

    Every cache is compared with the one that was sent before anything is timed.

    Raises:
        BadInput: sizes that are not positive.
        Unsupported: no shared memory on this system.
        TransportError: another cache arrived than the one that was sent.
    """
    if min(mib) < 1:
        raise BadInput(f"sizes must be at least 1 MiB, got {mib}")
    rows: list[Row] = []
    with _other_process() as other:
        for done, size in enumerate(mib):
            advance(done, len(mib))
            kv, chosen = _request(size * 2**20)
            for name in HOSTS:
                for _ in range(WARM_UPS):
                    other.check(name, kv, chosen)
            taken = [{name: other.send(name, kv, chosen) for name in HOSTS} for _ in range(repeats)]
            copies = _copies(chosen.nbytes, repeats)
            rows += [_row(name, chosen, taken, copies) for name in HOSTS]
    return rows


def _request(nbytes: int) -> tuple[RequestKV, Plan]:
    tokens = nbytes // (LAYERS * 2 * HEADS * CHANNELS * 2)
    drawn = torch.Generator().manual_seed(0)
    layers = tuple(
        LayerKV(
            i,
            {n: torch.randn(HEADS, tokens, CHANNELS, generator=drawn).bfloat16() for n in "kv"},
            torch.arange(tokens),
        )
        for i in range(LAYERS)
    )
    return RequestKV(layers, tokens), plan([LayerView(layer) for layer in layers], "raw")


class _Other:
    """The process that receives, and a connection to it of each kind."""

    def __init__(self, process: subprocess.Popen[str], token: bytes, stack: ExitStack) -> None:
        self._process, self._token, self._stack = process, token, stack
        self._senders: dict[str, Sender] = {}
        self._ports = self._answer()

    def send(self, name: str, kv: RequestKV, plan: Plan) -> Row:
        sent, answer = self._exchange(name, kv, plan)
        return {"seconds": sent.seconds, "encode_s": sent.encode_s, "decode_s": answer["decode_s"]}

    def check(self, name: str, kv: RequestKV, plan: Plan) -> None:
        """Raises `TransportError` unless what arrives is what was sent."""
        sent, answer = self._exchange(name, kv, plan)
        if (answer["digest"], answer["wire_bytes"]) != (_digest(kv), sent.wire_nbytes):
            raise TransportError(f"{name}: another cache arrived; nothing was timed")

    def _exchange(self, name: str, kv: RequestKV, plan: Plan) -> tuple[Sent, Row]:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{name}\n")
        self._process.stdin.flush()
        if name not in self._senders:
            address = HOSTS[name], self._ports[name]
            sender = Sender(address, self._token, silence_s=WAIT_S)
            self._senders[name] = self._stack.enter_context(sender)
        sent = self._senders[name].send(kv, plan)
        return sent, self._answer()

    def _answer(self) -> Row:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise PeerLost(f"the receiving process ended with {self._process.wait()}")
        answer: Row = json.loads(line)
        return answer


@contextmanager
def _other_process() -> Iterator[_Other]:
    token = secrets.token_bytes(32)
    command = [sys.executable, "-P", "-c", f"from {__name__} import receive; receive()"]
    with ExitStack() as stack:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        stack.enter_context(process)
        stack.callback(process.kill)
        assert process.stdin is not None
        process.stdin.write(token.hex() + "\n")
        process.stdin.flush()
        yield _Other(process, token, stack)


def receive() -> None:
    """Be that process: a line in names a transport, a line out says what came over it."""
    token = bytes.fromhex(sys.stdin.readline())
    with ExitStack() as stack:
        receivers = {
            name: stack.enter_context(Receiver(token, host=host, silence_s=WAIT_S))
            for name, host in HOSTS.items()
        }
        print(json.dumps({name: each.address[1] for name, each in receivers.items()}), flush=True)
        for line in sys.stdin:
            got = receivers[line.strip()].receive(WAIT_S)
            said = {"decode_s": got.decode_s, "wire_bytes": got.wire_nbytes}
            print(json.dumps({**said, "digest": _digest(got.kv)}), flush=True)


def _digest(kv: RequestKV) -> str:
    digest = xxhash.xxh3_64()
    for layer in kv.layers:
        for name in sorted(layer.components):
            digest.update(layer.components[name].contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _copies(nbytes: int, repeats: int) -> list[float]:
    """Seconds of a plain copy of as many bytes, which is what the receiver's own copy costs."""
    source, target = (torch.ones(nbytes, dtype=torch.uint8) for _ in range(2))
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        ctypes.memmove(target.data_ptr(), source.data_ptr(), nbytes)
        seconds.append(time.perf_counter() - started)
    return seconds


def _row(name: str, plan: Plan, taken: list[dict[str, Row]], copies: list[float]) -> Row:
    own = [turn[name] for turn in taken]
    seconds = [each["seconds"] for each in own]
    gains = [turn["tcp"]["seconds"] / turn[name]["seconds"] for turn in taken]
    low, middle, high = quartiles(seconds)
    least, gain, most = quartiles(gains)
    return {
        "transport": name,
        "wire_bytes": plan.nbytes,
        "seconds_p50": middle,
        "seconds_quartiles": [low, high],
        "encode_s_p50": median(each["encode_s"] for each in own),
        "decode_s_p50": median(each["decode_s"] for each in own),
        "gb_per_s": plan.nbytes / middle / 1e9,
        "times_tcp": gain,
        "times_tcp_quartiles": [least, most],
        "memcpy_s_p50": median(copies),
        "repeats": len(taken),
    }


def show_transport(rows: list[Row]) -> None:
    """Print a line for each size and transport."""
    heads = ["", "sent", "ms", "quartiles", "encode", "decode", "GB/s", "times TCP", "a copy, ms"]
    console.table("one request, from its offer to its acknowledgement", heads, map(_cells, rows))


def _cells(row: Row) -> list[str]:
    low, high = row["seconds_quartiles"]
    return [
        row["transport"],
        console.size(row["wire_bytes"]),
        f"{1e3 * row['seconds_p50']:.1f}",
        f"{1e3 * low:.1f} to {1e3 * high:.1f}",
        f"{1e3 * row['encode_s_p50']:.1f}",
        f"{1e3 * row['decode_s_p50']:.1f}",
        f"{row['gb_per_s']:.2f}",
        f"{row['times_tcp']:.2f}",
        f"{1e3 * row['memcpy_s_p50']:.1f}",
    ]
