"""kvprism: send far fewer KV-cache bytes from prefill to decode, at the same answer quality.

Names load on first use, so that `kvprism --help` and the torch-free rooms stay light.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvprism.codec.stream import decode, encode
    from kvprism.core import Budget, Capability, Tier
    from kvprism.integrations.hf import capture, fingerprint, load, restore
    from kvprism.pipeline import Receiver, Sender
    from kvprism.planning import PlanOptions, plan
    from kvprism.plans import Plan
    from kvprism.policies import signals_of
    from kvprism.profiles import Profile
    from kvprism.retention import Retention
    from kvprism.state import with_mass

__all__ = [
    "Budget",
    "Capability",
    "Plan",
    "PlanOptions",
    "Profile",
    "Receiver",
    "Retention",
    "Sender",
    "Tier",
    "capture",
    "decode",
    "encode",
    "errors",
    "fingerprint",
    "load",
    "plan",
    "restore",
    "signals_of",
    "with_mass",
]

_HOME = {
    "Budget": "kvprism.core",
    "Capability": "kvprism.core",
    "Plan": "kvprism.plans",
    "PlanOptions": "kvprism.planning",
    "Profile": "kvprism.profiles",
    "Receiver": "kvprism.pipeline",
    "Retention": "kvprism.retention",
    "Sender": "kvprism.pipeline",
    "Tier": "kvprism.core",
    "capture": "kvprism.integrations.hf",
    "decode": "kvprism.codec.stream",
    "encode": "kvprism.codec.stream",
    "fingerprint": "kvprism.integrations.hf",
    "load": "kvprism.integrations.hf",
    "plan": "kvprism.planning",
    "restore": "kvprism.integrations.hf",
    "signals_of": "kvprism.policies",
    "with_mass": "kvprism.state",
}


def __getattr__(name: str) -> Any:
    if name == "errors":
        return import_module("kvprism.errors")
    if name not in _HOME:
        raise AttributeError(f"module 'kvprism' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
