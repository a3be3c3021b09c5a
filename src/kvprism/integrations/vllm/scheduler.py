"""The connector's half in vLLM's scheduler: which tokens go where, decided step by step.

Nothing here touches a tensor or a socket. Both servers derive the same `binding` of a transfer from
its random id, the prompt's token ids and the code in which it was sent, so that a cache is found
only by the request that it was made for, whatever a router passed on.
"""

import hashlib
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from kvprism.integrations.vllm.config import Address, ConnectorConfig
from kvprism.integrations.vllm.counts import Counts

_BINDING_TAG = b"kvprism vllm transfer 1\0"
_SALT_TAG = "kvprism vllm cache 1"
TRANSFER_NBYTES = 16
MAX_CODE = 256
# What was sent is remembered at these steps, so that it ends on a block whatever the block size.
PREFIX_STEP = 128
# Prefixes that are remembered as sent; the oldest are forgotten.
MAX_SENT = 2**16
# Transfers that are remembered as claimed; the oldest are forgotten.
MAX_CLAIMED = 2**16


@dataclass(frozen=True)
class Save:
    """Producer's work after a step: copy the tokens `[start, stop)`; last: the prompt is whole.

    whole: all tokens of the prompt that are sent, in this step and others.
    """

    request_id: str
    binding: bytes
    address: Address
    blocks: tuple[int, ...]
    start: int
    stop: int
    last: bool
    whole: tuple[int, int]


@dataclass(frozen=True)
class Load:
    """Consumer's work: fill the tokens `[start, stop)` of the request's blocks.

    first: where the first part that was sent begins, at `start` or before.
    """

    request_id: str
    binding: bytes
    blocks: tuple[int, ...]
    start: int
    stop: int
    first: int = 0


class EngineRequest(Protocol):
    """What is read, and for `cache_salt` written, of vLLM's `Request`."""

    request_id: str
    prompt_token_ids: list[int] | None
    num_prompt_tokens: int
    kv_transfer_params: dict[str, Any] | None
    cache_salt: str | None
    lora_request: Any
    prompt_embeds: Any
    mm_features: list[Any]
    block_hashes: list[Any]
    abort_immediately: bool

    def update_block_hashes(self) -> None: ...


@dataclass
class _Outgoing:
    binding: bytes
    transfer: bytes
    address: Address
    first: int
    stop: int
    copied: int


@dataclass
class _Incoming:
    binding: bytes
    first: int
    stop: int
    gone: bool = False  # the tokens before `first` are not in this server's cache


class SchedulerHalf:
    """Follows the requests that take part in a transfer, on either side."""

    def __init__(
        self, config: ConnectorConfig, engine_id: str, *, producer: bool, consumer: bool
    ) -> None:
        self._config, self._engine_id = config, engine_id
        self._producer, self._consumer = producer, consumer
        self._outgoing: dict[str, _Outgoing] = {}
        self._incoming: dict[str, _Incoming] = {}
        self._claimed: dict[bytes, None] = {}
        self._sent: dict[bytes, None] = {}
        self._loads: list[Load] = []
        self.counts = Counts()

    def on_new_request(self, request: EngineRequest) -> None:
        """Note what a request asks for; wrong parameters are counted and the prompt is computed."""
        params = request.kv_transfer_params or {}
        if request.abort_immediately:  # vLLM's notice that a request with these was answered
            return
        if params.get("do_remote_decode") and self._producer:
            self._start_outgoing(request, params)
        elif params.get("do_remote_prefill") and self._consumer:
            self._start_incoming(request, params)

    def matched_tokens(self, request: EngineRequest, computed: int) -> int:
        """How many tokens after the `computed` ones another server sends; the last is not sent.

        None of them, if it counted on tokens that are not here any more.
        """
        incoming = self._incoming.get(request.request_id)
        if incoming is None:
            return 0
        incoming.gone = computed < incoming.first
        return 0 if incoming.gone else max(0, incoming.stop - computed)

    def allocated(self, request: EngineRequest, blocks: Sequence[int], n_external: int) -> None:
        """Blocks are there for `n_external` tokens; a request loads once, whatever comes of it."""
        incoming = self._incoming.pop(request.request_id, None)
        if incoming is None:
            return
        if n_external > 0:
            stop, own = incoming.stop, (request.request_id, incoming.binding, tuple(blocks))
            self._loads.append(Load(*own, stop - n_external, stop, incoming.first))
        elif incoming.gone:
            self.counts.label("skipped", "prefix_gone")

    def step(self, scheduled: Iterable[tuple[str, int, Sequence[int]]]) -> list[Save]:
        """What to copy after this step.

        scheduled: of each request its id, how many tokens are computed once the step is done, and
        its blocks.
        """
        saves = []
        for request_id, computed, blocks in scheduled:
            out = self._outgoing.get(request_id)
            if out is None or (reached := min(computed, out.stop)) <= out.copied:
                continue
            last, whole = reached == out.stop, (out.first, out.stop)
            destination = out.binding, out.address, tuple(blocks)
            saves.append(Save(request_id, *destination, out.copied, reached, last, whole))
            out.copied = reached
        return saves

    def take_loads(self) -> list[Load]:
        """The loads whose blocks were allocated since the last call."""
        taken, self._loads = self._loads, []
        return taken

    def finished(self, request: EngineRequest) -> dict[str, Any] | None:
        """The `kv_transfer_params` for the decode request, if the whole prompt is on its way."""
        self._incoming.pop(request.request_id, None)
        out = self._outgoing.pop(request.request_id, None)
        if out is None or out.copied < out.stop:
            return None
        for key in self._prefixes(request, out.address):
            _remember(self._sent, key, MAX_SENT)
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_engine_id": self._engine_id,
            "remote_request_id": out.transfer.hex(),
            "remote_block_ids": [],
            "remote_host": None,
            "remote_port": None,
            "kvprism_code": self._config.code,
            "kvprism_first": out.first,
        }

    def sends(self, request_id: str) -> bool:
        """Whether a producer still follows this request."""
        return request_id in self._outgoing

    def _start_outgoing(self, request: EngineRequest, params: Mapping[str, Any]) -> None:
        cause = _not_carried(request)
        address = self._address_of(params)
        if cause is None and address is None:
            cause = "peer_not_allowed"
        if cause is not None or address is None:
            self.counts.label("skipped", str(cause))
            return
        transfer = secrets.token_bytes(TRANSFER_NBYTES)
        binding = _binding(transfer, request, self._config.code)
        stop, first = request.num_prompt_tokens - 1, 0
        for number, key in enumerate(self._prefixes(request, address), start=1):
            if key in self._sent:
                first = number * PREFIX_STEP
        self._outgoing[request.request_id] = _Outgoing(
            binding, transfer, address, first, stop, copied=first
        )

    def _prefixes(self, request: EngineRequest, address: Address) -> list[bytes]:
        """A name for every `PREFIX_STEP` tokens of a prompt at its destination, if they matter."""
        if not self._config.settings.only_new:
            return []
        salt, ids = request.cache_salt or "", np.asarray(request.prompt_token_ids, "<u4")
        so_far = hashlib.sha256(f"{address}\0{len(salt)}\0{salt}".encode())
        keys = []
        for stop in range(PREFIX_STEP, request.num_prompt_tokens, PREFIX_STEP):
            so_far.update(ids[stop - PREFIX_STEP : stop].tobytes())
            keys.append(so_far.digest())
        return keys

    def _address_of(self, params: Mapping[str, Any]) -> Address | None:
        """Where to send: what the router names, if it may, else what was configured."""
        host, port = params.get("remote_host"), params.get("remote_port")
        if host is None and port is None:
            return self._config.decode_address
        if not isinstance(host, str) or not isinstance(port, int):
            return None
        return (host, port) if self._config.allows((host, port)) else None

    def _start_incoming(self, request: EngineRequest, params: Mapping[str, Any]) -> None:
        transfer, code = _transfer_of(params), params.get("kvprism_code")
        stop, first = request.num_prompt_tokens - 1, params.get("kvprism_first", 0)
        cause = _not_carried(request)
        if transfer is None or not isinstance(code, str) or len(code) > MAX_CODE:
            cause = "bad_params"
        if type(first) is not int or not 0 <= first <= stop:
            cause = "bad_params"
        if cause is not None or transfer is None:
            self.counts.label("skipped", str(cause))
            return
        binding = _binding(transfer, request, str(code))
        if not self._claim(binding):
            self.counts.label("skipped", "claimed_before")
            return
        self._incoming[request.request_id] = _Incoming(binding, first, stop)
        if code != "raw":
            _move_to_namespace(request, str(code))

    def _claim(self, binding: bytes) -> bool:
        """A cache is there once: whoever comes later, as the second of `n` samples, computes."""
        if binding in self._claimed:
            return False
        _remember(self._claimed, binding, MAX_CLAIMED)
        return True


def _remember(known: dict[bytes, None], key: bytes, most: int) -> None:
    """As the latest of at most so many."""
    known.pop(key, None)
    known[key] = None
    if len(known) > most:
        del known[next(iter(known))]


def _not_carried(request: EngineRequest) -> str | None:
    """Why this request's cache does not follow from its token ids and the model alone."""
    if request.num_prompt_tokens < 2:
        return "short_prompt"
    if request.lora_request is not None:
        return "adapter"
    if request.prompt_token_ids is None or request.prompt_embeds is not None or request.mm_features:
        return "not_only_tokens"
    return None


def _transfer_of(params: Mapping[str, Any]) -> bytes | None:
    try:
        transfer = bytes.fromhex(params["remote_request_id"])
    except (KeyError, TypeError, ValueError):
        return None
    return transfer if len(transfer) == TRANSFER_NBYTES else None


def _binding(transfer: bytes, request: EngineRequest, code: str) -> bytes:
    ids = np.asarray(request.prompt_token_ids, "<u4").tobytes()
    parts = (transfer, hashlib.sha256(ids).digest(), hashlib.sha256(code.encode()).digest())
    return hashlib.sha256(_BINDING_TAG + b"".join(parts)).digest()


def part_id(binding: bytes, start: int) -> bytes:
    """The wire's request id of the part of a transfer that begins at token `start`."""
    return hashlib.sha256(binding + start.to_bytes(8, "little")).digest()[:16]


def _move_to_namespace(request: EngineRequest, code: str) -> None:
    """Keep a lossy cache away from requests that did not ask for it.

    vLLM finds cached blocks by hashes over token ids and salt, made when the request was; with
    another salt they are made again.
    """
    parts = (_SALT_TAG, code, request.cache_salt or "")
    request.cache_salt = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    request.block_hashes.clear()
    request.update_block_hashes()
