"""Chunks that leave at 4 bits while a prompt is prefilled, and upgrades by captured queries."""

import os
from collections.abc import Iterator

import pytest
from cluster import CHUNKS, Cluster
from faults import NEW
from servers import VARIABLE, Server, transferred

from kvprism.evaluate.haystack import needle_case
from kvprism.integrations.hf import load_tokenizer

if VARIABLE not in os.environ:
    pytest.skip(f"{VARIABLE} names no Python with vLLM: make test-vllm", allow_module_level=True)

BUDGET, NEEDLES = 0.40, 11


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    settings = {"send": "upgrade", "policy": "spectrum", "budget": BUDGET}
    made = Cluster(tmp_path_factory.mktemp("upgrades"))
    try:
        made.prefill.kill()
        made.prefill = upgrading(made, importance="attention", **settings).wait()
        yield made
    finally:
        made.close()


def upgrading(cluster: Cluster, **extra: object) -> Server:
    return cluster.start_prefill(CHUNKS, **extra)


def test_chunks_leave_before_the_prompt_is_whole_and_needles_are_found(cluster: Cluster) -> None:
    """Of 1,000 tokens in steps of 256 three chunks are early; everything is within the budget."""
    tokenizer, found = load_tokenizer("tiny"), {"alone": 0, "transferred": 0}
    for i in range(NEEDLES):
        case = needle_case(tokenizer, 1000, i / 10, distractors=3, seed=(1, i))
        ids = [*case.context_ids.tolist(), *case.question_ids.tolist()]
        want = case.answer_ids.tolist()
        local = cluster.decode.tokens(ids, len(want))
        got, _ = transferred(cluster.prefill, cluster.decode, ids, len(want))
        found["alone"] += local == want
        found["transferred"] += got == want
        assert cluster.decode.tokens(ids, len(want)) == local  # the plain namespace is as it was
    assert found["transferred"] >= found["alone"] - 1
    counted = cluster.prefill.settled()
    assert cluster.decode.settled()["loads"] == counted["parts_sent"] == NEEDLES
    assert counted["early_chunks"] >= 3 * NEEDLES
    assert counted["wire_bytes"] <= BUDGET * counted["reference_bytes"]
    assert counted["tokens:int8"] > 0
    assert "budget_misses" not in counted and "without_queries" not in counted


def test_transfers_go_on_after_the_decode_server_was_killed(cluster: Cluster) -> None:
    """The first one may find the connection that broke, and is computed; the second is loaded."""
    cluster.decode.kill()
    cluster.decode = cluster.start_decode().wait()
    ids = [i % 2000 + 3 for i in range(1000)]
    for salt in ("a", "b"):
        got, _ = transferred(cluster.prefill, cluster.decode, ids, NEW, cache_salt=salt)
        assert len(got) == NEW
    assert cluster.decode.settled()["loads"] >= 1
