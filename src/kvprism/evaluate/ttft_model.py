"""A model, not a measurement: TTFT at the sizes of large models, from codec rates measured here.

Prefill: (2 N T + 2 L h_q d T^2) / (989e12 x 0.45 x GPUs) seconds, an H100's bfloat16 peak at 45 %.
Link: 90 % of the line. Encode and decode: raw bytes over the rates of one core as measured on a
large buffer (`bench codec`), the slower of INT8 and INT4; a copy of what is kept where nothing is
quantised. Bytes: the fraction of 16 bits as measured. Planning is left out: `bench plan` has it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvprism.evaluate.ttft import Row, bound_s
from kvprism.policies import POLICIES
from kvprism.solve import ALL_NATIVE, EVICT

FLOPS_PER_GPU = 989e12 * 0.45
OF_LINE = 0.9
LINKS = tuple(int(gbps * 1e9) for gbps in (10, 25, 100, 200, 400))
CONTEXTS = (4096, 32768)


@dataclass(frozen=True)
class LargeModel:
    """What the formulas need of a model; gpus: H100s that prefill it."""

    name: str
    parameters: float
    layers: int
    query_heads: int
    kv_heads: int
    channels: int
    gpus: int

    def prefill_s(self, tokens: int) -> float:
        """Seconds of prefill by the formula above."""
        matrices = 2 * self.parameters * tokens
        attention = 2 * self.layers * self.query_heads * self.channels * tokens**2
        return (matrices + attention) / (FLOPS_PER_GPU * self.gpus)

    def reference_nbytes(self, tokens: int) -> int:
        """The cache at 16 bits a value.

        Example:
            >>> LLAMA_8B.reference_nbytes(1)
            131072
        """
        return 2 * self.layers * self.kv_heads * self.channels * 2 * tokens


LLAMA_8B = LargeModel("Llama-3.1-8B", 8.03e9, 32, 32, 8, 128, 1)
LLAMA_70B = LargeModel("Llama-3.1-70B", 70.6e9, 80, 64, 8, 128, 4)
MODELS = (LLAMA_8B, LLAMA_70B)


@dataclass(frozen=True)
class Rates:
    """Raw bytes per second of one core."""

    encode: float
    decode: float
    copy: float


def modelled(rows: Sequence[Row], rates: Rates) -> list[Row]:
    """A row for every large model, context, link and arm of `rows`; each says `modelled`."""
    fastest = max(row["link_bits_per_s"] for row in rows)
    # Chunks of a large model are of other sizes: only prompts that are prefilled in one go.
    in_one_go = [row for row in rows if row["chunk"] is None]
    arms = [row for row in in_one_go if row["link_bits_per_s"] == fastest]
    found = []
    for model in MODELS:
        for tokens in CONTEXTS:
            for line in LINKS:
                one = [_modelled(model, tokens, line, row, rates) for row in arms]
                raw_s = one[0]["ttft_s"]
                found += [{**row, "gain": 1 - row["ttft_s"] / raw_s} for row in one]
    return found


def _modelled(model: LargeModel, tokens: int, line: int, row: Row, rates: Rates) -> dict[str, Any]:
    native = model.reference_nbytes(tokens)
    nbytes = native * row["wire_bytes"] / row["reference_bytes"]
    if POLICIES[row["policy"]].family in (ALL_NATIVE, EVICT):
        encode_s = decode_s = nbytes / rates.copy
    else:
        encode_s, decode_s = native / rates.encode, native / rates.decode
    prefill_s, link = model.prefill_s(tokens), OF_LINE * line
    n = model.layers
    # The codec works layer by layer too: the link waits for whichever is slower.
    ready = [max(prefill_s * (i + 1) / n, prefill_s / n + encode_s * (i + 1) / n) for i in range(n)]
    hidden_s = bound_s(ready, [int(nbytes / n)] * n, link, (encode_s + decode_s) / n)
    in_turn_s = prefill_s + encode_s + 8 * nbytes / link + decode_s
    return {
        "modelled": True,
        "model": model.name,
        "gpus": model.gpus,
        "context": tokens,
        "link_bits_per_s": line,
        "policy": row["policy"],
        "budget": row["budget"],
        "chunk": row["chunk"],
        "overlap": row["overlap"],
        "fraction": row["wire_bytes"] / row["reference_bytes"],
        "prefill_s": prefill_s,
        "encode_s": encode_s,
        "transfer_s": 8 * nbytes / link,
        "decode_s": decode_s,
        "ttft_s": hidden_s if row["overlap"] else in_turn_s,
    }
