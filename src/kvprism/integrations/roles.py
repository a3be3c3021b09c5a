"""What a prefill and a decode worker do with their model; `worker` makes processes of them."""

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch

from kvprism.chunkwise import ChunkPlanner
from kvprism.codec.stream import encode
from kvprism.core import ITEMSIZE, Capability, KVShape
from kvprism.errors import BadInput, PositionMismatch, UnknownName
from kvprism.integrations import hf
from kvprism.integrations.chunks import send_chunks
from kvprism.layerwise import LayerPlanner, leaves_early
from kvprism.pipeline import LayerSender, Receiver, Sender, Sent
from kvprism.planning import PlanOptions, plan
from kvprism.plans import Plan
from kvprism.policies import signals_of
from kvprism.profiles import Profile
from kvprism.retention import FULL_KV, Retention
from kvprism.state import expecting_mass, with_mass
from kvprism.tensors import DTYPE_NAMES, DTYPES, LayerView, RequestKV, Signal

T = TypeVar("T")

TIER_LETTERS = "n84."
# Restored caches hold heads with tokens of their own, padded in memory.
HOLDS = Capability(drop="per_head")
# A long prompt on a slow link; a peer that stands still is noticed in seconds all the same.
LEASE_S = 3600.0


class _Role:
    """A model, its tokenizer, and the token and the profile that both ends share."""

    def __init__(self, model: str, token: bytes, profile: Profile | None) -> None:
        self._model, self._tokenizer = hf.load(model)
        self._token, self._profile = token, profile
        self._fingerprint = hf.fingerprint(self._model, self._tokenizer)
        if profile is not None:
            profile.check(self._fingerprint)

    def describe(self) -> dict[str, Any]:
        """The size of the model."""
        return {"parameters": sum(p.numel() for p in self._model.parameters())}


class PrefillWorker(_Role):
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
        _, view = _required(self._captured, "prefilled")
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
        kv, _ = _required(self._captured, "prefilled")
        planned = _required(self._plan, "planned")
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
        _required(self._plan, "planned")
        with self.connect(*address) as sender:
            return self.send_over(sender)

    def send_over(self, sender: Sender) -> dict[str, Any]:
        """Encode and send the planned cache; the bytes on the wire are the planned ones."""
        kv, _ = _required(self._captured, "prefilled")
        planned = _required(self._plan, "planned")
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
        shape = self._shape(len(ids) - 1)
        planner = ChunkPlanner(
            shape, policy, budget, chunk=chunk, options=PlanOptions(**(options or {})),
            capability=sender.capability, profile=self._profile,
        )  # fmt: skip
        prompt = torch.tensor(ids[:-1])
        with _closing_on_error(sender):
            done = send_chunks(self._model, sender, prompt, planner, chunk, self._cache_dtype)
        self._captured, self._plan = (done.kv, done.views), done.plan
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
        _required(self._sender, "served").pace(bytes_per_s)

    def time_layers(self, ids: list[int]) -> dict[str, Any]:
        """A prefill as `serve` does it, and nothing else: when each layer exists, and how long."""
        ready: list[float] = []
        started, computed = time.perf_counter(), time.thread_time()
        hf.capture(
            self._model,
            torch.tensor(ids[:-1]),
            cache_dtype=self._cache_dtype,
            on_layer=lambda _: ready.append(time.perf_counter() - started),
        )
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
    ) -> dict[str, Any]:
        """One request from prompt to acknowledgement, over a connection that is kept.

        Where the policy plans by layer, a layer leaves while the next are computed. `started_at` is
        on the clock that all processes of a machine share.
        """
        sender = self._sender or self.connect(*address, allow_remote=True)
        self._sender = None  # a request that breaks off takes its connection with it
        serve = self._serve_layers if leaves_early(policy) else self._serve_prompt
        started = time.monotonic()
        with _closing_on_error(sender):
            timings, sent = serve(sender, torch.tensor(ids[:-1]), policy, budget)
        self._sender = sender
        shape = self._shape(len(ids) - 1)
        return {
            "started_at": started,
            "overlap": leaves_early(policy),
            "encode_s": sent.encode_s,
            "transfer_s": sent.seconds - sent.encode_s,
            "wire_bytes": sent.wire_nbytes,
            "layer_nbytes": sent.layer_nbytes,
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
    ) -> tuple[dict[str, float], Sent]:
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
    ) -> tuple[dict[str, float], Sent]:
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


class DecodeWorker(_Role):
    """Listens, restores caches and continues them.

    decode: what the layers keep while it generates. One that counts attention from the prompt on
    takes no cache without the prompt's mass, and any other takes none with it.

    Raises:
        UnknownName: no such model.
        ProfileMismatch: a profile of another model.
        AddressInUse: the port is taken.
    """

    def __init__(
        self,
        model: str,
        token: bytes,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        profile: Profile | None = None,
        allow_remote: bool = False,
        decode: Retention = FULL_KV,
    ) -> None:
        super().__init__(model, token, profile)
        self._decode = decode
        expected = hf.shape_of(self._model, 1)
        self._receiver = Receiver(
            token,
            host=host,
            port=port,
            fingerprint=self._fingerprint,
            profile=profile,
            capability=HOLDS,
            expected=expecting_mass(expected) if decode.needs_mass else expected,
            lease_s=LEASE_S,
            allow_remote=allow_remote,
        )
        self._kv: RequestKV | None = None
        self._raw: torch.Tensor | None = None

    def __enter__(self) -> "DecodeWorker":
        return self

    def __exit__(self, *_: object) -> None:
        self._receiver.close()

    def address(self) -> tuple[str, int]:
        """Where this worker listens."""
        return self._receiver.address

    def receive(self, timeout_s: float, n_prompt: int | None = None) -> dict[str, Any]:
        """Wait for a cache and restore its tensors; n_prompt: the tokens of its prompt, if known.

        Raises:
            PositionMismatch: it is the cache of a longer or a shorter prompt.
        """
        self._kv = None
        received = self._receiver.receive(timeout_s)
        position = received.kv.next_position
        if n_prompt is not None and position != n_prompt - 1:
            raise PositionMismatch(
                f"the prompt has {n_prompt} tokens here, so that its cache goes on at position "
                f"{n_prompt - 1}; the one received goes on at {position}: give both sides one text"
            )
        self._kv = received.kv
        reference = hf.shape_of(self._model, position).reference_nbytes
        return {
            "wire_bytes": received.wire_nbytes,
            "fraction": received.wire_nbytes / reference,
            "resident_bytes": received.kv.resident_nbytes,
            "kept_tokens": max(len(layer.positions) for layer in received.kv.layers),
            "receive_ms": 1000 * received.seconds,
            "decode_ms": 1000 * received.decode_s,
        }

    def go_on(self, ids: list[int], timeout_s: float) -> dict[str, Any]:
        """Wait for the cache of `ids` and compute two tokens, on the clock of `serve`."""
        received = self.receive(timeout_s, len(ids))
        received_at = time.monotonic()
        generated = self.generate(ids, 2, ignore_eos=True)
        first_s, second_s = (generated[f"{which}_token_ms"] / 1000 for which in ("first", "second"))
        return {
            "decode_s": received["decode_ms"] / 1000,
            "received_at": received_at,
            "first_token_at": received_at + first_s,
            "first_token_s": first_s,
            "second_token_s": second_s,
            "resident_bytes": received["resident_bytes"],
            "text": generated["text"],
        }

    def generate(self, ids: list[int], n: int, ignore_eos: bool = False) -> dict[str, Any]:
        """Up to `n` greedy tokens after `ids`, of which the cache holds the beginning."""
        times = [time.perf_counter()]
        cache, feed = self._restored(ids)
        tokens: list[int] = []
        while len(tokens) < n and (ignore_eos or self._tokenizer.eos_token_id not in tokens):
            feed = [int(self._logits(cache, feed)[-1].argmax())]
            tokens += feed
            times.append(time.perf_counter())
        steps_ms = [1000 * (after - before) for before, after in pairwise(times)]
        return {
            "first_token_ms": steps_ms[0],
            "second_token_ms": steps_ms[1] if len(steps_ms) > 1 else None,
            "text": self._tokenizer.decode(tokens),
        }

    def sample(self, ids: list[int], n: int, seed: int) -> list[int]:
        """A continuation drawn from the model: the text on which arms are compared."""
        cache, feed = self._restored(ids)
        generator = torch.Generator().manual_seed(seed)
        tokens: list[int] = []
        for _ in range(n):
            chances = self._logits(cache, feed)[-1].softmax(dim=-1)
            feed = [int(torch.multinomial(chances, 1, generator=generator))]
            tokens += feed
        return tokens

    def kl_to_raw(self, ids: list[int], raw: bool) -> float:
        """Mean KL(raw || this cache) in nats over what `ids` feeds; raw: this is the reference."""
        cache, feed = self._restored(ids)
        logits = self._logits(cache, feed).log_softmax(dim=-1)
        if raw:
            self._raw = logits
        reference = _required(self._raw, "scored as raw")
        return float((reference.exp() * (reference - logits)).sum(dim=-1).mean())

    def _restored(self, ids: list[int]) -> tuple[Any, list[int]]:
        """A fresh cache, and the tokens of `ids` that it does not hold."""
        kv = _required(self._kv, "received")
        if kv.next_position >= len(ids):
            raise PositionMismatch(
                f"the cache goes on at position {kv.next_position}, where {len(ids)} tokens leave "
                "nothing to compute"
            )
        return hf.restore(self._model, kv, self._decode), ids[kv.next_position :]

    def _logits(self, cache: Any, ids: list[int]) -> torch.Tensor:
        """float64 `[token, vocabulary]` of the fed tokens."""
        with torch.inference_mode():
            output = self._model(torch.tensor([ids]), **cache.kwargs, use_cache=True)
        logits: torch.Tensor = output.logits[0].double()
        return logits


ROLES = {"prefill": PrefillWorker, "decode": DecodeWorker}


@contextmanager
def _closing_on_error(sender: Sender) -> Iterator[None]:
    """Let the peer know at once that no more of a request will come."""
    try:
        yield
    except BaseException:
        sender.close()
        raise


def _required(value: T | None, what: str) -> T:
    """What an earlier operation left."""
    if value is None:
        raise BadInput(f"nothing was {what} yet")
    return value


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
