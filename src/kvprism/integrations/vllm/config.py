"""What an operator sets in `kv_connector_extra_config`, checked once, at start-up."""

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from kvprism.chunkwise import ChunkPlanner, leaves_in_chunks
from kvprism.core import KVShape
from kvprism.errors import BadInput, Unsupported
from kvprism.layerwise import leaves_early
from kvprism.planning import PlanOptions, plan_shape
from kvprism.policies import POLICIES
from kvprism.profiles import Profile, stated_hash
from kvprism.transport.token import load_token

Address = tuple[str, int]

TRIED_VLLM = ("0.32.0",)
MAX_PORTS = 64


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The keys of `kv_connector_extra_config`; docs/vllm.md says what each means.

    Sizes are bytes, times are seconds, addresses `host:port`.
    """

    token_file: str
    policy: str = "raw"
    budget: str | float | None = None
    importance: Literal["position", "norm", "attention"] = "position"
    profile: str | None = None
    weights: str = ""
    send: Literal["request", "chunk", "layer", "upgrade"] = "request"
    only_new: bool = False
    decode_address: str | None = None
    listen: str | None = None
    allowed_peers: tuple[str, ...] = ()
    allow_remote: bool = False
    silence_s: float = 10.0
    transfer_timeout_s: float = 20.0
    lease_s: float = 60.0
    max_outbox_nbytes: int = 2**30
    max_inbox_nbytes: int = 2**30
    credit_nbytes: int = 2**28
    allow_untried_vllm: bool = False


@dataclass(frozen=True)
class ConnectorConfig:
    """The settings with everything that they name, read and parsed.

    decode_address: where a producer sends when a request names no address; listen: the host and the
    ports on which a consumer listens, one for each prefill server.

    Raises:
        BadInput: see `of`.
    """

    settings: Settings
    token: bytes
    profile: Profile | None
    decode_address: Address | None
    listen: tuple[str, range] | None

    @classmethod
    def of(cls, extra: Mapping[str, Any], *, producer: bool, consumer: bool) -> "ConnectorConfig":
        """From `kv_connector_extra_config`; errors name the key.

        Raises:
            BadInput: an unknown key, a value of the wrong type or out of range, a key that the role
                needs and that is missing, or a token file that others can read.
            UnknownName: no such policy.
            ProfileMismatch: the profile was edited.
        """
        settings = _settings(extra)
        _check_ranges(settings)
        POLICIES[settings.policy]
        if producer and POLICIES[settings.policy].budgeted and settings.budget is None:
            raise BadInput(f"budget: policy {settings.policy!r} needs one, such as 0.30")
        if settings.send == "layer" and not leaves_early(settings.policy):
            raise BadInput(
                f"send: policy {settings.policy!r} plans a layer knowing the others, so none can "
                "leave before the last; send by request or chunk, or choose spectrum-layer"
            )
        if settings.send == "upgrade" and not leaves_in_chunks(settings.policy):
            raise BadInput(
                f"send: policy {settings.policy!r} may drop tokens or plans a layer by itself, so "
                "that no chunk can leave before the last; send by request, or choose spectrum"
            )
        if producer and settings.decode_address is None and not settings.allowed_peers:
            raise BadInput(
                "decode_address: a producer needs the decode server's host:port, or allowed_peers "
                "where the router names it in kv_transfer_params"
            )
        if consumer and settings.listen is None:
            raise BadInput("listen: a consumer needs host:port to listen on")
        profile = None if settings.profile is None else Profile.load(Path(settings.profile))
        address = settings.decode_address
        return cls(
            settings,
            load_token(Path(settings.token_file)),
            profile,
            None if address is None else parse_address("decode_address", address),
            None if settings.listen is None else _parse_ports("listen", settings.listen),
        )

    @property
    def options(self) -> PlanOptions:
        return PlanOptions(importance=self.settings.importance)

    @property
    def follows_layers(self) -> bool:
        """Whether something is to be done as each layer of a step is computed."""
        return self.settings.send == "layer" or self.settings.importance == "attention"

    @property
    def exact(self) -> bool:
        """Whether the cache arrives bit for bit."""
        return self.settings.policy in ("raw", "full")

    @property
    def code(self) -> str:
        """What a cache of this configuration was made by; both sides bind transfers to it."""
        if self.exact:
            return "raw"
        s = self.settings
        profile = stated_hash(self.profile).hex()[:16]
        return f"{s.policy}/{s.budget}/{s.importance}/{s.send}/{profile}"

    def allows(self, address: Address) -> bool:
        """Whether a router may name this address: it is the configured one, or a pattern fits."""
        shown = f"{address[0]}:{address[1]}"
        patterns = self.settings.allowed_peers
        return address == self.decode_address or any(
            fnmatch.fnmatchcase(shown, pattern) for pattern in patterns
        )

    def check_policy(self, shape: KVShape) -> None:
        """Refuse at start-up what paged attention cannot hold, or what no prompt could satisfy.

        Raises:
            Unsupported: the policy drops tokens.
            BudgetTooSmall: not even a prompt of the largest length fits, by `send` upgrade with its
                provisional map.
            ProfileMismatch: the policy needs something that the profile does not have.
        """
        s = self.settings
        budget = None if s.budget is None else str(s.budget)
        if s.send == "upgrade":
            ChunkPlanner(shape, s.policy, budget, options=self.options, profile=self.profile)
        planned = plan_shape(shape, s.policy, budget, self.options, self.profile)
        dropped = planned.histogram().get("drop", 0)
        if dropped:
            raise Unsupported(
                f"policy: {s.policy!r} drops tokens, and paged attention has no missing token; "
                "choose one that keeps every token, such as spectrum or int4"
            )


def _settings(extra: Mapping[str, Any]) -> Settings:
    try:
        return msgspec.convert(dict(extra), Settings)
    except msgspec.ValidationError as error:
        raise BadInput(f"kv_connector_extra_config: {_readable(error)}") from error


def _readable(error: msgspec.ValidationError) -> str:
    """`Expected `int`, got `str` - at `$.lease_s`` with the key first."""
    what, _, where = str(error).partition(" - at `$.")
    return f"{where.rstrip('`')}: {what}" if where else what


def _check_ranges(settings: Settings) -> None:
    for key in ("silence_s", "transfer_timeout_s", "lease_s"):
        if not 0 < getattr(settings, key) < 86400:
            raise BadInput(f"{key}: expected seconds in (0, 86400), got {getattr(settings, key)}")
    for key in ("max_outbox_nbytes", "max_inbox_nbytes", "credit_nbytes"):
        if getattr(settings, key) < 2**16:
            raise BadInput(f"{key}: expected at least 65536 bytes, got {getattr(settings, key)}")


def parse_address(key: str, text: str) -> Address:
    """`host:port`; `key` is named in the error.

    Example:
        >>> parse_address("listen", "127.0.0.1:14600")
        ('127.0.0.1', 14600)
    """
    host, ports = _parse_ports(key, text)
    if len(ports) != 1:
        raise BadInput(f"{key}: expected one port, got {text!r}")
    return host, ports[0]


def _parse_ports(key: str, text: str) -> tuple[str, range]:
    host, _, ports = text.rpartition(":")
    first, _, last = ports.partition("-")
    if not host or not first.isdecimal() or not (last or first).isdecimal():
        raise BadInput(f"{key}: expected host:port or host:first-last, got {text!r}")
    found = range(int(first), int(last or first) + 1)
    if not 1 <= len(found) <= MAX_PORTS or found[-1] > 65535:
        raise BadInput(f"{key}: expected 1 to {MAX_PORTS} ports up to 65535, got {text!r}")
    return host.strip("[]"), found
