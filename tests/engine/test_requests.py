"""What single requests may go through, on one pair of real servers: `make test-vllm`.

Prefill sends layer by layer, and of a later turn only what is new; decode has few blocks.
"""

import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from cluster import Cluster
from faults import ASKED, NEW, TOKEN_NBYTES, idle, until
from servers import VARIABLE, environment, transferred

if VARIABLE not in os.environ:
    pytest.skip(f"{VARIABLE} names no Python with vLLM: make test-vllm", allow_module_level=True)

BLOCKS = 66  # of 32 tokens: room for one prompt of the largest length
LAYERS = 4


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("requests")
    made = Cluster(folder, prefill={"send": "layer", "only_new": True}, blocks=BLOCKS)
    yield made
    made.close()


def prompt(seed: int, n: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(3, 2048, n)]


def test_layers_leave_within_their_step(cluster: Cluster) -> None:
    """Raw, so that the tokens are those of decode alone; some layers left before the last one."""
    for seed in range(5):
        ids = prompt(seed, 700)
        want = cluster.decode.tokens(ids, NEW, cache_salt="alone")
        assert transferred(cluster.prefill, cluster.decode, ids, NEW, cache_salt="a")[0] == want
    counted = cluster.prefill.settled()
    assert cluster.decode.settled()["loads"] == counted["parts_sent"] == 5
    assert 0 < counted["early_layers"] <= 5 * (LAYERS - 1)


def test_the_second_turn_moves_only_what_is_new(cluster: Cluster) -> None:
    both, first = (cluster.prefill, cluster.decode), prompt(10, 500)
    before = cluster.prefill.settled()["wire_bytes"]
    answer, _ = transferred(*both, first, NEW, cache_salt="turns")
    middle = cluster.prefill.settled()["wire_bytes"]
    second = [*first, *answer, *prompt(11, 100)]
    want = cluster.decode.tokens(second, NEW, cache_salt="alone")
    assert transferred(*both, second, NEW, cache_salt="turns")[0] == want
    after = cluster.prefill.settled()["wire_bytes"]
    new = len(second) - 1 - 499 // 128 * 128
    assert (after - middle) / (middle - before) == pytest.approx(new / 499, rel=0.02)
    assert "skipped:prefix_gone" not in cluster.decode.settled()


def test_a_client_that_goes_while_its_cache_is_on_its_way(cluster: Cluster) -> None:
    """Its blocks are free soon, and the servers go on."""
    ids = prompt(20, 600)
    want = cluster.decode.tokens(ids, NEW, cache_salt="alone")
    cluster.link.hold(after_nbytes=100 * TOKEN_NBYTES)
    params = cluster.prefill.complete(ids, 1, ASKED, cache_salt="b")["kv_transfer_params"]
    client = cluster.decode.asked(ids, NEW, params)
    assert cluster.link.held.wait(60)
    assert until(lambda: max(cluster.decode.gauges().values()) > 0, 30)
    client.close()
    cluster.link.release()
    assert idle(cluster.decode, 60) and idle(cluster.prefill)
    assert transferred(cluster.prefill, cluster.decode, ids, NEW, cache_salt="c")[0] == want


def test_requests_that_decode_preempts(cluster: Cluster) -> None:
    """Five caches fit into the blocks, what is generated after them does not."""
    prompts, n = [prompt(30 + i, 330) for i in range(5)], 200
    want = [cluster.decode.tokens(ids, n, cache_salt="alone") for ids in prompts]
    before = preemptions(cluster)

    def across(i: int) -> list[int]:
        return transferred(cluster.prefill, cluster.decode, prompts[i], n, cache_salt="d")[0]

    with ThreadPoolExecutor(5) as pool:
        assert list(pool.map(across, range(5))) == want
    assert preemptions(cluster) > before
    assert idle(cluster.decode)


def preemptions(cluster: Cluster) -> float:
    lines = cluster.decode.metrics()
    return sum(
        float(line.rpartition(" ")[2])
        for line in lines
        if line.startswith("vllm:num_preemptions_total{")
    )


def test_a_prefill_server_with_another_profile(cluster: Cluster, tmp_path: Path) -> None:
    """Decode has none: refused before a byte of the cache moves, and computed there."""
    program = (
        "import sys; from kvprism.integrations.families import fingerprint\n"
        "from kvprism.integrations.hf import load_config, load_tokenizer\n"
        "from kvprism.profiles import Profile; from pathlib import Path\n"
        "own = fingerprint(load_config(sys.argv[1]), load_tokenizer(sys.argv[1]))\n"
        "Profile(own.hex()).save(Path(sys.argv[2]))"
    )
    profile = str(tmp_path / "profile.json")
    command = [os.environ[VARIABLE], "-P", "-c", program, str(cluster.model), profile]
    subprocess.run(command, env=environment(), check=True)
    received = cluster.decode.settled()["received_bytes"]
    cluster.prefill.kill()
    cluster.prefill = cluster.start_prefill(profile=profile).wait()
    ids = prompt(40, 400)
    want = cluster.decode.tokens(ids, NEW, cache_salt="alone")
    assert transferred(cluster.prefill, cluster.decode, ids, NEW, cache_salt="e")[0] == want
    assert cluster.prefill.settled()["failures:Rejected"] == 1
    assert cluster.decode.settled()["received_bytes"] == received
