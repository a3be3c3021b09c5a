"""What the fields of a transfer's result mean; the result carries those that it has."""

from collections.abc import Mapping

DEFINITIONS = {
    "wire_bytes": "every byte of the request: payload, scales, tier maps, manifests, digests, "
    "padding",
    "reference_bytes": "the same cache at 16 bits a value",
    "native_bytes": "the same cache in the dtype in which the prefill side keeps it",
    "fraction": "wire_bytes / reference_bytes",
    "fraction_native": "wire_bytes / native_bytes",
    "resident_bytes": "memory that the restored cache takes",
    "kept_tokens": "tokens that the fullest layer of the restored cache holds; others were dropped",
    "tiers": "tokens per tier in the first head of the first layer that is not cut to a window",
    "tier_of_token": "one letter a token: n native, 8 INT8, 4 INT4, . dropped; the last prompt "
    "token is not sent, the decode side computes it again",
    "prefill_ms": "the prompt without its last token, with the capture of cache and queries, until "
    "the last layer's keys and values exist",
    "chunk": "tokens of a prefill call; each chunk is encoded and sent while the next is computed",
    "base_bytes": "what was sent of wire_bytes before the upgrades, and END",
    "plan_ms": "from the captured prompt to an exact plan",
    "encode_ms": "encoding, on the prefill side's clock; of a prompt in chunks, of the upgrades",
    "transfer_ms": "from the offer to the acknowledgement on the prefill side's clock, less "
    "encode_ms; of a prompt in chunks, from the end of its prefill, less plan_ms too",
    "decode_ms": "decoding, on the decode side's clock; it goes on while layers are still encoded "
    "and moved, so it lies within encode_ms + transfer_ms and is not added to them",
    "receive_ms": "from the offer to the last piece, on the decode side's clock",
    "first_token_ms": "from the restored tensors to the first token: the cache is built, the last "
    "prompt position and the question, if there is one, are computed",
    "second_token_ms": "one more token: a decode step alone",
    "ttft_ms": "prefill_ms + plan_ms + encode_ms + transfer_ms + first_token_ms",
}


def ttft_ms(timings: Mapping[str, float]) -> float:
    """Time to first token, from the parts that follow each other; see `DEFINITIONS`."""
    parts = ("prefill_ms", "plan_ms", "encode_ms", "transfer_ms", "first_token_ms")
    return sum(timings[part] for part in parts)
