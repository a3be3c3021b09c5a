"""What a prefill worker does with its model; `worker` makes a process of it."""

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kvprism.chunkwise import ChunkPlanner
from kvprism.codec.stream import encode
from kvprism.core import HOLDS, ITEMSIZE, Capability, KVShape
from kvprism.errors import BadInput, UnknownName
from kvprism.integrations import hf
from kvprism.integrations.chunks import SentInChunks, capture_chunks, send_chunks
from kvprism.integrations.role import Role, required
from kvprism.layerwise import LayerPlanner, leaves_early
from kvprism.pipeline import LayerSender, Sender, Sent
from kvprism.planning import DEFAULT_OPTIONS, PlanOptions, plan
from kvprism.plans import Plan
from kvprism.policies import signals_of
from kvprism.profiles import Profile
from kvprism.state import with_mass
from kvprism.tensors import DTYPE_NAMES, DTYPES, LayerView, RequestKV, Signal

Served = tuple[dict[str, Any], Sent]

TIER_LETTERS = "n84."


class PrefillWorker(Role):
    """Prefills prompts, plans and sends their caches.

    Raises:
        UnknownName: no such model or cache dtype.
        ProfileMismatch: a profile of another model.
    """

    def __init__(
        self,
        model: str,
        token: bytes,
        cache_dtype: str = "bfloat16",
        profile: Profile | None = None,
    ) -> None:
        if cache_dtype not in DTYPES:
            raise UnknownName("cache dtype", cache_dtype, list(ITEMSIZE))
        super().__init__(model, token, profile)
        self._cache_dtype = DTYPES[cache_dtype]
        self._captured: tuple[RequestKV, tuple[LayerView, ...]] | None = None
        self._plan: Plan | None = None
        self._sender: Sender | None = None

    def prefill(
        self, ids: list[int], signals: Sequence[Signal] = (), mass: bool = False
    ) -> dict[str, Any]:
        """Run the prompt but for its last token, and keep its cache and what policies need of it.

        signals: as `hf.capture`; mass: send the attention mass along, for a decode side that goes
        on with it.
        """
        started = time.perf_counter()
        prompt = torch.tensor(ids[:-1])
        self._captured = hf.capture(
            self._model,
            prompt,
            cache_dtype=self._cache_dtype,
            signals={*signals, "mass"} if mass else signals,
        )
        if mass:
            self._captured = with_mass(*self._captured)
        self._plan = None
        elapsed_ms = _ms_since(started)
        shape = self._captured[0].shape()
        return {
            "prefill_ms": elapsed_ms,
            "reference_bytes": shape.reference_nbytes,
            "native_bytes": shape.native_nbytes,
        }

    def plan(
        self,
        policy: str,
        budget: str | None,
        options: Mapping[str, Any] | None = None,
        capability: Capability | None = None,
    ) -> dict[str, Any]:
        """Decide the tier of every token of the prefilled cache.

        capability: what the decode side can hold, by default what a `DecodeWorker` can.
        """
        _, view = required(self._captured, "prefilled")
        started = time.perf_counter()
        self._plan = plan(
            view,
            policy,
            budget,
            options=PlanOptions(**(options or {})),
            capability=capability or HOLDS,
            profile=self._profile,
        )
        return {
            "plan_ms": _ms_since(started),
            **_said_of(self._plan),
        }

    def save(self, path: str) -> None:
        """Write the planned stream to a file that only its owner may read: it holds the prompt."""
        kv, _ = required(self._captured, "prefilled")
        planned = required(self._plan, "planned")
        stream = encode(kv, planned, fingerprint=self._fingerprint, profile=self._profile)
        _write_private(Path(path), stream)

    def connect(self, host: str, port: int, allow_remote: bool = False) -> Sender:
        """An authenticated connection to a decode worker of the same model."""
        return Sender(
            (host, port),
            self._token,
            fingerprint=self._fingerprint,
            profile=self._profile,
            allow_remote=allow_remote,
        )

    def send(self, address: tuple[str, int]) -> dict[str, Any]:
        """Connect, and send the planned cache."""
        required(self._plan, "planned")
        with self.connect(*address) as sender:
            return self.send_over(sender)

    def send_over(self, sender: Sender) -> dict[str, Any]:
        """Encode and send the planned cache; the bytes on the wire are the planned ones."""
        kv, _ = required(self._captured, "prefilled")
        planned = required(self._plan, "planned")
        sent = sender.send(kv, planned)
        assert sent.wire_nbytes == planned.nbytes, (sent.wire_nbytes, planned.nbytes)
        return {
            "wire_bytes": sent.wire_nbytes,
            "encode_ms": 1000 * sent.encode_s,
            "transfer_ms": 1000 * (sent.seconds - sent.encode_s),
        }

    def send_chunks(self, address: tuple[str, int], **request: Any) -> dict[str, Any]:
        """Connect, and `send_chunks_over`."""
        with self.connect(*address) as sender:
            return self.send_chunks_over(sender, **request)

    def send_chunks_over(
        self,
        sender: Sender,
        ids: list[int],
        policy: str,
        budget: str | None,
        chunk: int,
        options: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Prefill a prompt in chunks and send each while the next is computed, then upgrades."""
        given = PlanOptions(**(options or {}))
        with _closing_on_error(sender):
            done = self._in_chunks(sender, torch.tensor(ids[:-1]), policy, budget, chunk, given)
        self._captured, self._plan = (done.kv, done.views), done.plan
        shape = done.plan.shape
        return {
            "chunk": chunk,
            **done.timings,
            "base_bytes": done.base_nbytes,
            "wire_bytes": done.plan.nbytes,
            "reference_bytes": shape.reference_nbytes,
            "native_bytes": shape.native_nbytes,
            **_said_of(done.plan),
        }

    def pace(self, bytes_per_s: int | None) -> None:
        """As `Sender.pace`, on the connection of `serve`."""
        required(self._sender, "served").pace(bytes_per_s)

    def time_layers(self, ids: list[int], chunk: int | None = None) -> dict[str, Any]:
        """A prefill as `serve` does it, and nothing else: when each layer exists, and how long.

        chunk: when each layer of each chunk exists, one chunk after another.
        """
        ready: list[float] = []
        started, computed = time.perf_counter(), time.thread_time()

        def exists(_: object) -> None:
            ready.append(time.perf_counter() - started)

        given: dict[str, Any] = {"cache_dtype": self._cache_dtype}
        if chunk is None:
            hf.capture(self._model, torch.tensor(ids[:-1]), on_layer=exists, **given)
        else:
            capture_chunks(self._model, torch.tensor(ids[:-1]), chunk, exists, **given)
        return {
            "layer_ready_s": ready,
            "prefill_s": time.perf_counter() - started,
            "prefill_cpu_s": time.thread_time() - computed,
        }

    def serve(
        self,
        ids: list[int],
        policy: str,
        budget: str | None,
        address: tuple[str, int],
        chunk: int | None = None,
    ) -> dict[str, Any]:
        """One request from prompt to acknowledgement, over a connection that is kept.

        Where the policy plans by layer, a layer leaves while the next are computed; chunk: each
        chunk leaves while the next is, then come upgrades. `started_at` is on the clock that all
        processes of a machine share.
        """
        sender = self._sender or self.connect(*address, allow_remote=True)
        self._sender = None  # a request that breaks off takes its connection with it
        serve = self._serve_layers if leaves_early(policy) else self._serve_prompt
        if chunk is not None:
            serve = partial(self._serve_chunks, chunk=chunk)
        started = time.monotonic()
        with _closing_on_error(sender):
            timings, sent = serve(sender, torch.tensor(ids[:-1]), policy, budget)
        self._sender = sender
        shape = self._shape(len(ids) - 1)
        return {
            "started_at": started,
            "overlap": chunk is not None or leaves_early(policy),
            "encode_s": sent.encode_s,
            "transfer_s": sent.seconds - sent.encode_s,
            "wire_bytes": sent.wire_nbytes,
            "piece_nbytes": sent.layer_nbytes,
            "reference_bytes": shape.reference_nbytes,
            "native_bytes": shape.native_nbytes,
            **timings,
        }

    def _shape(self, n_tokens: int) -> KVShape:
        return hf.shape_of(self._model, n_tokens, DTYPE_NAMES[self._cache_dtype])

    def _serve_layers(
        self,
        sender: Sender,
        prompt: torch.Tensor,
        policy: str,
        budget: str | None,
    ) -> Served:
        started, computed = time.perf_counter(), time.thread_time()
        shape, capability = self._shape(len(prompt)), sender.capability
        planner = LayerPlanner(shape, policy, budget, capability=capability, profile=self._profile)
        planner_s, planner_cpu_s = time.perf_counter() - started, time.thread_time() - computed
        transfer = sender.open(shape, planner.menu, planner.split)
        opened = time.perf_counter()
        with LayerSender(transfer, planner.plan) as layers:
            hf.capture(self._model, prompt, cache_dtype=self._cache_dtype, on_layer=layers.put)
            prefill_s = time.perf_counter() - opened
            sent = layers.finish()
        timings = {
            "prefill_s": prefill_s,
            "plan_s": planner_s + layers.plan_s,
            "plan_cpu_s": planner_cpu_s + layers.plan_cpu_s,
        }
        return timings, sent

    def _serve_prompt(
        self,
        sender: Sender,
        prompt: torch.Tensor,
        policy: str,
        budget: str | None,
    ) -> Served:
        times = [time.perf_counter()]
        kv, view = hf.capture(
            self._model,
            prompt,
            cache_dtype=self._cache_dtype,
            signals=signals_of([policy], self._profile),
        )
        times.append(time.perf_counter())
        capability, computed = sender.capability, time.thread_time()
        planned = plan(view, policy, budget, capability=capability, profile=self._profile)
        times.append(time.perf_counter())
        timings = {
            "prefill_s": times[1] - times[0],
            "plan_s": times[2] - times[1],
            "plan_cpu_s": time.thread_time() - computed,
        }
        return timings, sender.send(kv, planned)

    def _serve_chunks(
        self,
        sender: Sender,
        prompt: torch.Tensor,
        policy: str,
        budget: str | None,
        chunk: int,
    ) -> Served:
        done = self._in_chunks(sender, prompt, policy, budget, chunk)
        timings = {
            "prefill_s": done.timings["prefill_ms"] / 1000,
            "plan_s": done.plan_s,
            "plan_cpu_s": done.plan_cpu_s,
            "piece_nbytes": done.piece_nbytes,
        }
        return timings, done.sent

    def _in_chunks(
        self,
        sender: Sender,
        prompt: torch.Tensor,
        policy: str,
        budget: str | None,
        chunk: int,
        options: PlanOptions = DEFAULT_OPTIONS,
    ) -> SentInChunks:
        planner = ChunkPlanner(
            self._shape(len(prompt)), policy, budget, chunk=chunk, options=options,
            capability=sender.capability, profile=self._profile,
        )  # fmt: skip
        return send_chunks(self._model, sender, prompt, planner, chunk, self._cache_dtype)


@contextmanager
def _closing_on_error(sender: Sender) -> Iterator[None]:
    """Let the peer know at once that no more of a request will come."""
    try:
        yield
    except BaseException:
        sender.close()
        raise


def _said_of(planned: Plan) -> dict[str, Any]:
    """Its part of the cache, and its tokens by tier; see `DEFINITIONS`."""
    first = max(planned.layers, key=lambda layer: layer.shape.n_tokens)
    tiers = first.tier_of[first.shape.components[0].name][0]
    letters = "".join(TIER_LETTERS[tier] for tier in tiers)
    named = zip(TIER_LETTERS, planned.menu, strict=False)  # no token ends in an upgrade
    counts = {tier.name: letters.count(letter) for letter, tier in named}
    return {
        "fraction": planned.fraction,
        "fraction_native": planned.fraction_native,
        "tiers": counts,
        "tier_of_token": letters,
    }


def _write_private(path: Path, contents: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        temporary.touch(0o600, exist_ok=False)
        temporary.write_bytes(contents)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise BadInput(f"cannot write {path}: {error.strerror}") from error


def _ms_since(started: float) -> float:
    return 1000 * (time.perf_counter() - started)
