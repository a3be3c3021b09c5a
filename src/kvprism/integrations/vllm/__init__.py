"""kvprism inside vLLM: a prefill server's KV cache goes to a decode server, encoded.

`--kv-transfer-config` names this package as `kv_connector_module_path` and `KVPrismConnector` as
`kv_connector`. `connector` and `metrics` alone import vllm, and only when they are asked for.
"""

from typing import Any

__all__ = ["KVPrismConnector"]


def __getattr__(name: str) -> Any:
    """vLLM takes the class from here by name; without vLLM the package's other parts still load."""
    if name in __all__:
        from kvprism.integrations.vllm.connector import KVPrismConnector

        return KVPrismConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
