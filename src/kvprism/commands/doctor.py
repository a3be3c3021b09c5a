"""`kvprism doctor`: is this installation able to do the main job, and how fast is its codec?"""

import importlib.metadata
import importlib.util
import os
import platform
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from kvprism.codec import backend, reference
from kvprism.commands import console
from kvprism.core import MENU
from kvprism.errors import KVPrismError, Unsupported
from kvprism.integrations import tiny
from kvprism.layout import plane_nbytes
from kvprism.pipeline import Receiver, Sender
from kvprism.planning import plan
from kvprism.tensors import LayerKV, LayerView, RequestKV
from kvprism.transport import shm
from kvprism.transport.token import create_token, load_token

Finding = dict[str, str]
SPEED_TOKENS = 32768  # of 8 heads: 64 MiB, more than a processor's caches


def examine() -> list[Finding]:
    """Run every check; each finding has a name, a state (ok, missing, broken) and a detail."""
    checks: list[tuple[str, Callable[[], tuple[str, str]]]] = [
        ("python", lambda: ("ok", platform.python_version())),
        ("torch", lambda: ("ok", f"{torch.__version__}, {torch.get_num_threads()} threads")),
        ("transformers", _transformers),
        ("built-in models", _models),
        ("token file", _token_file),
        ("loopback transfer", _transfer),
        ("shared memory transfer", _shared_memory),
        ("codec speed", _codec_speed),
        ("report", lambda: _optional("report", "matplotlib", "jinja2")),
    ]
    return [_finding(name, check) for name, check in checks]


def show_findings(findings: list[Finding]) -> None:
    """Print the findings as a table."""
    rows = [[f["name"], f["state"], f["detail"]] for f in findings]
    console.table("kvprism doctor", ["check", "state", "detail"], rows, words=True)


def _finding(name: str, check: Callable[[], tuple[str, str]]) -> Finding:
    try:
        state, detail = check()
    except KVPrismError as error:
        state, detail = "broken", f"{type(error).__name__}: {error}"
    return {"name": name, "state": state, "detail": detail}


def _optional(extra: str, *modules: str) -> tuple[str, str]:
    if not all(importlib.util.find_spec(module) for module in modules):
        return "missing", f"pip install 'kvprism[{extra}]'"
    return "ok", ", ".join(f"{module} {importlib.metadata.version(module)}" for module in modules)


def _transformers() -> tuple[str, str]:
    state, detail = _optional("hf", "transformers")
    if state == "ok":
        major, minor = (
            int(part) for part in importlib.metadata.version("transformers").split(".")[:2]
        )
        if not (5, 16) <= (major, minor) < (6, 0):
            return "broken", f"{detail}: kvprism needs >= 5.16, < 6"
    return state, detail


def _models() -> tuple[str, str]:
    names = tiny.names()
    return ("ok", ", ".join(names)) if names else ("missing", "pip install 'kvprism[demo]'")


def _token_file() -> tuple[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "token"
        same = create_token(path) == load_token(path)
    return ("ok", "created with mode 0600") if same else ("broken", "read back differently")


def _shared_memory() -> tuple[str, str]:
    try:
        return _transfer(shm.HOST)
    except Unsupported as error:
        return "missing", str(error)


def _transfer(host: str = "127.0.0.1") -> tuple[str, str]:
    """A small cache from one end to the other; the receiver answers from a thread."""
    token, positions = bytes(32), torch.arange(64)
    layer = LayerKV(0, {name: torch.randn(2, 64, 64) for name in "kv"}, positions)
    chosen = plan([LayerView(layer)], "raw")
    with Receiver(token, host=host) as receiver, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(receiver.receive, 5.0)
        with Sender(receiver.address, token) as sender:
            sent = sender.send(RequestKV((layer,), 64), chosen)
        arrived = waiting.result().kv.layers[0].components
    same = all(torch.equal(x, arrived[name]) for name, x in layer.components.items())
    if not same:
        return "broken", "another cache arrived than the one that was sent"
    return "ok", f"{sent.wire_nbytes} bytes in {1000 * sent.seconds:.1f} ms, equal at both ends"


def _codec_speed() -> tuple[str, str]:
    """INT4 encode by the codec that runs, by the reference, and a copy of the same bytes."""
    selected = backend.selected()
    x = torch.randn(8, SPEED_TOKENS, 128, dtype=torch.bfloat16)
    tiers = np.full(x.shape[:2], 2, np.uint8)
    sizes = plane_nbytes(tiers, MENU, x.shape[2], x.element_size())
    planes = {plane: memoryview(bytearray(size)) for plane, size in sizes.items()}
    target = torch.empty_like(x)
    nbytes = x.numel() * x.element_size()
    encode_s = _best_s(lambda: backend.encode_into(x, tiers, MENU, planes))
    copy_s = _best_s(lambda: target.copy_(x))
    speed = f"INT4 encode {nbytes / encode_s / 1e9:.2f} GB/s"
    copied = f"memory copy {nbytes / copy_s / 1e9:.2f} GB/s"
    if selected == backend.REFERENCE:
        why = _why_reference()
        slower = f"{encode_s / copy_s:.0f} x slower than a copy"
        return (
            "ok" if why is None else "missing",
            f"torch reference: {speed}, {copied}, {slower}{why or ''}",
        )
    slow_s = _best_s(lambda: reference.encode_into(x, tiers, MENU, planes))
    return (
        "ok",
        f"C kernels: {speed}, {copied}; the torch reference is {slow_s / encode_s:.0f} x slower",
    )


def _why_reference() -> str | None:
    """What to do about it, unless it was asked for."""
    if os.environ.get(backend.VARIABLE) == backend.REFERENCE:
        return None
    return (
        "; prefill and decode refuse to serve with it: for the C kernels install a C compiler, "
        f"then kvprism again, or set {backend.VARIABLE}={backend.REFERENCE}"
    )


def _best_s(work: Callable[[], object], repeats: int = 3) -> float:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)
