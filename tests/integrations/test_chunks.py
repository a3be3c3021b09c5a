"""Prompts that are prefilled in chunks: the same cache, each part as it comes, and its transfer."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from samples import N_PROMPT, tokens

from kvprism.errors import BadInput
from kvprism.integrations import hf
from kvprism.integrations.chunks import capture_chunks
from kvprism.integrations.decode_role import DecodeWorker
from kvprism.integrations.prefill_role import PrefillWorker

TOKEN = bytes(32)
IDS = tokens(300)[0].tolist()


@pytest.mark.parametrize("chunk", [7, 32, 1000])
def test_chunks_make_the_cache_and_queries_of_one_call(model: Any, chunk: int) -> None:
    expected, views = hf.capture(model, tokens(N_PROMPT))
    parts: list[Any] = []
    kv, got = capture_chunks(model, tokens(N_PROMPT), chunk, parts.append)
    assert kv.next_position == expected.next_position
    for mine, theirs in zip(got, views, strict=True):
        assert torch.equal(mine.kv.positions, theirs.kv.positions)
        assert (mine.softmax_scale, mine.softcap) == (theirs.softmax_scale, theirs.softcap)
        pairs = [(mine.kv.components[n], theirs.kv.components[n]) for n in "kv"]
        for x, y in [*pairs, (mine.queries, theirs.queries)]:
            torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)
        own = [part for part in parts if part.layer_id == mine.kv.layer_id]
        assert torch.equal(torch.cat([part.positions for part in own]), mine.kv.positions)
        for name, x in mine.kv.components.items():
            assert torch.equal(torch.cat([part.components[name] for part in own], dim=1), x)


def test_a_part_is_told_of_before_the_next_chunk_is_computed(llama: Any) -> None:
    told: list[tuple[int, int]] = []
    capture_chunks(
        llama, tokens(50), 20, lambda kv: told.append((int(kv.positions[0]), kv.layer_id))
    )
    assert told == [(start, layer) for start in (0, 20, 40) for layer in range(3)]


def test_what_a_part_meets_ends_the_prefill(llama: Any) -> None:
    def refuse(kv: Any) -> None:
        if kv.positions[0] == 20:
            raise BadInput("no room for this part")

    with pytest.raises(BadInput, match="no room"):
        capture_chunks(llama, tokens(50), 20, refuse)
    with pytest.raises(BadInput, match="at least 1 position"):
        capture_chunks(llama, tokens(50), 0, refuse)


def test_workers_send_a_prompt_in_chunks_and_go_on_with_it() -> None:
    prefill = PrefillWorker("tiny", TOKEN)
    with DecodeWorker("tiny", TOKEN) as decode, ThreadPoolExecutor(1) as pool:
        received = pool.submit(decode.receive, 20.0, len(IDS))
        sent = prefill.send_chunks(
            decode.address(), ids=IDS, policy="spectrum", budget="40%", chunk=100
        )
        assert sent["wire_bytes"] == received.result()["wire_bytes"]
        assert sent["fraction"] <= 0.4 and sent["base_bytes"] < sent["wire_bytes"]
        assert prefill._plan is not None and sent["base_bytes"] == prefill._plan.base_nbytes
        assert sent["tiers"]["native"] == 4 and sent["tiers"]["int8"] > 0
        assert sum(sent["tiers"].values()) == len(IDS) - 1
        assert decode.generate(IDS, 2, ignore_eos=True)["text"]
