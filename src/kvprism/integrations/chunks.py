"""A prompt prefilled in chunks: each layer's part as soon as its keys and values exist."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from kvprism.chunkwise import ChunkPlanner
from kvprism.errors import BadInput
from kvprism.integrations.families import first_visible, windows_of
from kvprism.integrations.hf import Attention, Complete, cast_layer, made_ready
from kvprism.integrations.restored import empty_cache
from kvprism.layout import ranges
from kvprism.pipeline import ChunkSender, Sender, Sent
from kvprism.score.attention import WINDOW, last_queries
from kvprism.staged import StagedPlan
from kvprism.tensors import LayerKV, LayerView, RequestKV


def capture_chunks(
    model: Any,
    ids: torch.Tensor,
    chunk: int,
    on_part: Callable[[LayerKV], None],
    *,
    window: int = WINDOW,
    cache_dtype: torch.dtype | None = None,
) -> tuple[RequestKV, tuple[LayerView, ...]]:
    """`hf.capture` of a model of `hf.load`, by calls of at most `chunk` tokens.

    The numbers differ from those of one call in their last bits.

    on_part: called with what a chunk adds to a layer as soon as it exists, before that layer's own
    attention is computed; what it raises ends the prefill. Of a layer with a sliding window it sees
    only the tokens that the next position will see. The parts of a layer, joined, are what is
    returned; queries are those of the prompt's last positions, over chunks where need be.

    Raises:
        BadInput: as `hf.capture`, or a chunk below 1 token.
        Unsupported: as `hf.capture`.
    """
    if chunk < 1 or window < 1:
        raise BadInput(f"a chunk and a window have at least 1 position, got {chunk} and {window}")
    windows, ids = windows_of(model), made_ready(model, ids)
    recorder = _PartRecorder(window, windows, ids.shape[1], on_part, cache_dtype)
    cache = empty_cache(model)
    for start, stop in ranges(0, ids.shape[1], chunk):
        recorder.begin(start, stop)
        with torch.no_grad(), suppress(Complete):
            call: dict[str, Any] = {**cache, "use_cache": True, "logits_to_keep": 1}
            model(ids[:, start:stop], **call, kvprism_recorder=recorder)
    views = tuple(recorder.view(layer) for layer in range(len(windows)))
    return RequestKV(tuple(view.kv for view in views), ids.shape[1]), views


@dataclass(frozen=True)
class SentInChunks:
    """What one request took, and what it left.

    piece_nbytes: of every part, in order, then of all upgrades; timings: in ms, as `DEFINITIONS`
    has them; plan_s: of all parts' plans and the last, plan_cpu_s of processor time.
    """

    kv: RequestKV
    views: tuple[LayerView, ...]
    plan: StagedPlan
    sent: Sent
    base_nbytes: int
    piece_nbytes: tuple[int, ...]
    timings: dict[str, float]
    plan_s: float
    plan_cpu_s: float


def send_chunks(
    model: Any,
    sender: Sender,
    prompt: torch.Tensor,
    planner: ChunkPlanner,
    chunk: int,
    cache_dtype: torch.dtype,
) -> SentInChunks:
    """Prefill in chunks: each leaves under a provisional map, then come upgrades.

    Raises:
        BudgetTooSmall: as `ChunkPlanner.base`.
        KVPrismError: as `capture_chunks` and `Sender.send`; close the sender then.
    """
    transfer = sender.open(planner.shape, planner.menu, planner.split)
    times = [time.perf_counter()]
    with ChunkSender(transfer, planner.base) as parts:
        kv, views = capture_chunks(model, prompt, chunk, parts.put, cache_dtype=cache_dtype)
        times.append(time.perf_counter())
        parts.wait()
        times.append(time.perf_counter())
        computed = time.thread_time()
        planned = planner.plan(views)
        plan_cpu_s = parts.plan_cpu_s + time.thread_time() - computed
        times.append(time.perf_counter())
        base_nbytes, encoded_s = transfer.nbytes, transfer.encode_s
        sent = parts.finish(kv, planned)
    prefill_s, waited_s, plan_s = (after - before for before, after in pairwise(times))
    encode_s, finish_s = sent.encode_s - encoded_s, time.perf_counter() - times[-1]
    timings = {
        "prefill_ms": prefill_s,
        "plan_ms": plan_s,
        "encode_ms": encode_s,
        "transfer_ms": waited_s + finish_s - encode_s,
    }
    timings = {name: 1000 * seconds for name, seconds in timings.items()}
    return SentInChunks(
        kv,
        views,
        planned,
        sent,
        base_nbytes,
        (*parts.part_nbytes, planned.nbytes - base_nbytes),
        timings,
        parts.plan_s + plan_s,
        plan_cpu_s,
    )


class _PartRecorder:
    """Collects one prompt's parts, chunk by chunk.

    windows: of each layer, how many positions a query sees, or None; length: of the whole prompt.
    """

    def __init__(
        self,
        window: int,
        windows: Sequence[int | None],
        length: int,
        on_part: Callable[[LayerKV], None],
        cache_dtype: torch.dtype | None,
    ) -> None:
        self._window, self._on_part, self._cache_dtype = window, on_part, cache_dtype
        self._first = [first_visible(its, length) for its in windows]
        self._parts: list[list[LayerKV]] = [[] for _ in windows]
        self._recorded: dict[int, dict[str, Any]] = {}
        self._start = self._stop = self._seen = 0

    def begin(self, start: int, stop: int) -> None:
        """The next call computes these tokens."""
        self._start, self._stop, self._seen = start, stop, 0

    @property
    def complete(self) -> bool:
        return self._seen == len(self._parts)

    def record(self, call: Attention) -> None:
        self._seen += 1
        layer_id: int = call.module.layer_idx
        before = self._recorded.get(layer_id, {}).get("queries")
        queries = last_queries(before, call.query[0], self._window)
        self._recorded[layer_id] = {"queries": queries, **call.recorded()}
        start = max(self._start, self._first[layer_id])
        if start >= self._stop:
            return
        new = start - self._stop  # from the end: a layer with a window lets go of its beginning
        x = call.key[0, :, new:], call.value[0, :, new:]
        part = cast_layer(layer_id, *x, (start, self._stop), self._cache_dtype)
        self._parts[layer_id].append(part)
        self._on_part(part)

    def view(self, layer_id: int) -> LayerView:
        """A layer with all its parts; call it once."""
        parts, self._parts[layer_id] = self._parts[layer_id], []
        kv, recorded = LayerKV.joined(parts), self._recorded[layer_id]
        own = {"queries": recorded["queries"][:, -len(kv.positions) :]}
        return LayerView(kv, **(recorded | own))
