"""The embedded engine: a prefill and a decode process, driven by a parent over JSON lines.

Parent and worker speak JSON lines over the worker's stdin and stdout; the KV cache itself goes from
worker to worker over TCP. A worker beats once a second, so that a killed, stopped or stuck one is
noticed within `SILENCE_S` whatever it was doing.
"""

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import torch

from kvprism import errors
from kvprism.codec.stream import encode
from kvprism.errors import BadInput, KVPrismError, PeerLost, PeerSilent
from kvprism.integrations import hf
from kvprism.pipeline import Receiver, Sender
from kvprism.plans import Plan
from kvprism.policies import PlanOptions, plan
from kvprism.tensors import DTYPES, LayerView, RequestKV
from kvprism.transport.token import load_token

BEAT_S = 1.0
SILENCE_S = 4.0
# Importing torch and transformers holds the interpreter for seconds on a busy machine.
START_SILENCE_S = 60.0
RECEIVE_TIMEOUT_S = 600.0
TIER_LETTERS = "n84."


class PrefillWorker:
    """Prefills prompts and sends their caches."""

    def __init__(self, model: str, token: bytes, cache_dtype: str) -> None:
        self._model, self._tokenizer = hf.load(model)
        self._token = token
        self._cache_dtype = DTYPES[cache_dtype]
        self._fingerprint = hf.fingerprint(self._model, self._tokenizer)
        self._kv: RequestKV | None = None
        self._view: tuple[LayerView, ...] = ()

    def prefill(self, ids: list[int]) -> dict[str, Any]:
        """Run the prompt and keep its cache; milliseconds and sizes."""
        started = time.perf_counter()
        self._kv, self._view = hf.capture(
            self._model, torch.tensor(ids), cache_dtype=self._cache_dtype
        )
        shape = self._kv.shape()
        return {
            "prefill_ms": _ms_since(started),
            "reference_bytes": shape.reference_nbytes,
            "native_bytes": shape.native_nbytes,
        }

    def send(
        self,
        policy: str,
        budget: str | None,
        address: list[Any],
        options: Mapping[str, Any] | None = None,
        save: str | None = None,
    ) -> dict[str, Any]:
        """Plan, encode and send the prefilled cache; the plan's bytes are asserted on the wire."""
        if self._kv is None:
            raise BadInput("nothing was prefilled")
        started = time.perf_counter()
        planned = plan(self._view, policy, budget, options=PlanOptions(**(options or {})))
        plan_ms = _ms_since(started)
        if save is not None:
            _save(Path(save), encode(self._kv, planned, fingerprint=self._fingerprint))
        with Sender((address[0], address[1]), self._token, fingerprint=self._fingerprint) as sender:
            sent = sender.send(self._kv, planned)
        assert sent.wire_nbytes == planned.nbytes, (sent.wire_nbytes, planned.nbytes)
        return {
            "plan_ms": plan_ms,
            "encode_ms": 1000 * sent.encode_s,
            "send_ms": 1000 * sent.seconds,
            "wire_bytes": sent.wire_nbytes,
            "fraction": planned.fraction,
            "fraction_native": planned.fraction_native,
            **_tokens_by_tier(planned),
        }


class DecodeWorker:
    """Restores caches and continues them."""

    def __init__(self, model: str, token: bytes, cache_dtype: str) -> None:
        self._model, self._tokenizer = hf.load(model)
        self._receiver = Receiver(token, fingerprint=hf.fingerprint(self._model, self._tokenizer))
        self._kv: RequestKV | None = None
        self._raw: dict[str, torch.Tensor] = {}

    def address(self) -> dict[str, Any]:
        """Where this worker listens."""
        return {"address": list(self._receiver.address)}

    def receive(self) -> dict[str, Any]:
        """Wait for a cache and restore its tensors."""
        received = self._receiver.receive(RECEIVE_TIMEOUT_S)
        self._kv = received.kv
        return {
            "decode_ms": 1000 * received.decode_s,
            "wire_bytes": received.wire_nbytes,
            "resident_bytes": received.kv.resident_nbytes,
        }

    def generate(self, ids: list[int], n: int) -> dict[str, Any]:
        """Greedy tokens after `ids`, whose last token is not in the cache yet."""
        cache = hf.restore(self._model, self._restored())
        tokens, times = [], [time.perf_counter()]
        feed = ids[self._restored().next_position :]
        for _ in range(n):
            feed = [int(self._logits(cache, feed)[-1].argmax())]
            tokens += feed
            times.append(time.perf_counter())
        steps_ms = [
            1000 * (after - before) for before, after in zip(times, times[1:], strict=False)
        ]
        return {"tokens": tokens, "steps_ms": steps_ms, "text": self._tokenizer.decode(tokens)}

    def sample(self, ids: list[int], n: int, seed: int) -> dict[str, Any]:
        """A continuation drawn from the model: the text on which arms are compared."""
        cache = hf.restore(self._model, self._restored())
        generator = torch.Generator().manual_seed(seed)
        tokens: list[int] = []
        feed = ids[self._restored().next_position :]
        for _ in range(n):
            chances = self._logits(cache, feed)[-1].softmax(dim=-1)
            feed = [int(torch.multinomial(chances, 1, generator=generator))]
            tokens += feed
        return {"tokens": tokens}

    def score(self, ids: list[int], name: str, raw: bool) -> dict[str, Any]:
        """Teacher-forced `ids` (prompt and continuation): argmax tokens, and KL to the raw arm's."""
        cache = hf.restore(self._model, self._restored())
        logits = self._logits(cache, ids[self._restored().next_position :]).log_softmax(dim=-1)
        if raw:
            self._raw[name] = logits
        reference = self._raw[name]
        kl = (reference.exp() * (reference - logits)).sum(dim=-1)
        return {"argmax": logits.argmax(dim=-1).tolist(), "kl": kl.tolist()}

    def _restored(self) -> RequestKV:
        if self._kv is None:
            raise BadInput("no cache was received")
        return self._kv

    def _logits(self, cache: Any, ids: list[int]) -> torch.Tensor:
        """float64 `[token, vocabulary]` of the fed tokens."""
        with torch.inference_mode():
            output = self._model(torch.tensor([ids]), past_key_values=cache, use_cache=True)
        return output.logits[0].double()


ROLES = {"prefill": PrefillWorker, "decode": DecodeWorker}


def serve(role: str, model: str, token_file: Path, cache_dtype: str) -> None:
    """Be a worker until stdin closes: one JSON request a line, one JSON answer a line."""
    out = sys.stdout
    sys.stdout = sys.stderr  # so that no library's print can break the protocol
    lock = threading.Lock()
    threading.Thread(target=_beat, args=(out, lock), daemon=True).start()
    try:
        worker = ROLES[role](model, load_token(token_file), cache_dtype)
    except KVPrismError as error:
        _say(out, lock, _failure(error))
        return
    _say(out, lock, {"result": {"ready": True}})
    for line in sys.stdin:
        call = json.loads(line)
        try:
            answer = {"result": getattr(worker, call.pop("op"))(**call)}
        except KVPrismError as error:
            answer = _failure(error)
        _say(out, lock, answer)


class Worker:
    """The parent's handle on one worker process.

    Raises:
        PeerLost: the process ended; PeerSilent: it has not beaten for `SILENCE_S`; and whatever
        kvprism error the worker itself raised.
    """

    def __init__(
        self, role: str, model: str, token_file: Path, cache_dtype: str = "bfloat16"
    ) -> None:
        self.role = role
        command = [sys.executable, "-m", "kvprism", "worker", role, "--model", model]
        command += ["--token-file", str(token_file), "--cache-dtype", cache_dtype]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ}
        )
        self._lines: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._silence_s = START_SILENCE_S
        threading.Thread(target=self._listen, daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def __enter__(self) -> "Worker":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()

    def ready(self) -> None:
        """Wait until the model is loaded."""
        self.wait()
        self._silence_s = SILENCE_S

    def call(self, op: str, **arguments: Any) -> dict[str, Any]:
        """Start an operation and wait for its answer."""
        self.start(op, **arguments)
        return self.wait()

    def start(self, op: str, **arguments: Any) -> None:
        """Start an operation; `wait` gives its answer."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"op": op, **arguments}) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise self._lost() from error

    def wait(self) -> dict[str, Any]:
        """The answer of the operation under way."""
        while True:
            try:
                line = self._lines.get(timeout=self._silence_s)
            except queue.Empty:
                raise PeerSilent(
                    f"the {self.role} worker (pid {self.pid}) gave no sign of life for "
                    f"{self._silence_s:.0f} s"
                ) from None
            if line is None:
                raise self._lost()
            if "error" in line:
                raise _rebuilt(line["error"], line["message"])
            if "result" in line:
                result: dict[str, Any] = line["result"]
                return result

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(json.loads(line))
        self._lines.put(None)

    def _lost(self) -> PeerLost:
        code = self._process.wait()
        return PeerLost(f"the {self.role} worker (pid {self.pid}) ended with status {code}")


def _beat(out: TextIO, lock: threading.Lock) -> None:
    while True:
        _say(out, lock, {"beat": True})
        time.sleep(BEAT_S)


def _say(out: TextIO, lock: threading.Lock, message: dict[str, Any]) -> None:
    with lock:
        out.write(json.dumps(message) + "\n")
        out.flush()


def _failure(error: KVPrismError) -> dict[str, Any]:
    return {"error": type(error).__name__, "message": str(error)}


def _rebuilt(name: str, message: str) -> KVPrismError:
    """The worker's error here: its type and its text, without the values that only it had."""
    kind: type[KVPrismError] = getattr(errors, name)
    error = kind.__new__(kind)
    error.args = (message,)
    return error


def _tokens_by_tier(planned: Plan) -> dict[str, Any]:
    """Tokens per tier and one letter per token, from the first layer's first head."""
    first = planned.layers[0]
    tiers = first.tier_of[first.shape.components[0].name][0]
    letters = "".join(TIER_LETTERS[tier] for tier in tiers)
    counts = {tier.name: letters.count(TIER_LETTERS[i]) for i, tier in enumerate(planned.menu)}
    return {"tiers": counts, "tier_of_token": letters}


def _save(path: Path, stream: bytes) -> None:
    """Write a stream that only its owner may read: it holds the prompt's cache."""
    temporary = path.with_name(path.name + ".part")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(stream)
    temporary.replace(path)


def _ms_since(started: float) -> float:
    return 1000 * (time.perf_counter() - started)
