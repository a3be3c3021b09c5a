"""What a decode worker does with its model; `worker` makes a process of it."""

import time
from itertools import pairwise
from typing import Any

import torch

from kvprism.core import HOLDS
from kvprism.errors import PositionMismatch
from kvprism.integrations import hf
from kvprism.integrations.role import Role, required
from kvprism.pipeline import Receiver
from kvprism.profiles import Profile
from kvprism.retention import FULL_KV, Retention
from kvprism.state import expecting_mass
from kvprism.tensors import RequestKV

# A long prompt on a slow link; a peer that stands still is noticed in seconds all the same.
LEASE_S = 3600.0


class DecodeWorker(Role):
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
        reference = required(self._raw, "scored as raw")
        return float((reference.exp() * (reference - logits)).sum(dim=-1).mean())

    def _restored(self, ids: list[int]) -> tuple[Any, list[int]]:
        """A fresh cache, and the tokens of `ids` that it does not hold."""
        kv = required(self._kv, "received")
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
