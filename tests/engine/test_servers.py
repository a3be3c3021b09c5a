"""Real vLLM servers, prefill and decode, on loopback with the built-in model: `make test-vllm`.

The tests run in order: the last ones kill servers and start them again.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from cluster import BUDGETS, Cluster
from servers import ROOT, VARIABLE, Failed, Server, environment, free_port, transferred

from kvprism.evaluate.haystack import needle_case
from kvprism.integrations import tiny
from kvprism.integrations.hf import load_tokenizer
from kvprism.wire.frames import HEAD_NBYTES, MAGIC, parse_head
from kvprism.wire.messages import Manifest

if VARIABLE not in os.environ:
    pytest.skip(f"{VARIABLE} names no Python with vLLM: make test-vllm", allow_module_level=True)

PROMPTS = int(os.environ.get("KVPRISM_VLLM_PROMPTS", "50"))
NEEDLES = int(os.environ.get("KVPRISM_VLLM_NEEDLES", "22"))
NEW = 24


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("servers"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, 2048, rng.integers(2, 900)).tolist() for _ in range(PROMPTS)]


@pytest.fixture(scope="module")
def alone(cluster: Cluster, prompts: list[list[int]]) -> list[list[int]]:
    """What the decode server makes of each prompt by itself."""
    return [cluster.decode.tokens(ids, NEW, cache_salt=f"a{i}") for i, ids in enumerate(prompts)]


def test_the_recorded_interface_is_the_real_one() -> None:
    """The stand-in of the ordinary tests, compared where vLLM is installed."""
    program = (
        "import json, sys; sys.path.insert(0, sys.argv[1]); import fake_vllm\n"
        "from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1 as real\n"
        "found = [fake_vllm.signatures(c) for c in (real, fake_vllm.KVConnectorBase_V1)]\n"
        "found += [sorted(c.__abstractmethods__) for c in (real, fake_vllm.KVConnectorBase_V1)]\n"
        "from vllm.v1.request import Request\n"
        "from vllm.v1.core.sched.output import KVConnectorBlockState, SchedulerOutput\n"
        "Request.update_block_hashes, KVConnectorBlockState.get_block_ids\n"
        "assert 'kv_connector_block_state' in SchedulerOutput.__dataclass_fields__\n"
        "print(json.dumps(found))"
    )
    folder = str(ROOT / "tests" / "integrations")
    command = [os.environ[VARIABLE], "-P", "-c", program, folder]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=True)
    real, ours, real_abstract, our_abstract = json.loads(done.stdout.splitlines()[-1])
    assert ours == real
    assert our_abstract == real_abstract


def test_raw_outputs_are_those_of_one_server(
    cluster: Cluster, prompts: list[list[int]], alone: list[list[int]]
) -> None:
    before = cluster.decode.counts().get("loads", 0)
    got = [
        transferred(cluster.prefill, cluster.decode, ids, NEW, cache_salt=f"b{i}")[0]
        for i, ids in enumerate(prompts)
    ]
    assert got == alone
    cluster.decode.tokens([5, 6], 1)  # counts of the last step come with the next
    assert cluster.decode.counts()["loads"] - before == len(prompts)


def test_under_concurrency_raw_outputs_are_those_of_one_server(
    cluster: Cluster, prompts: list[list[int]], alone: list[list[int]]
) -> None:
    """Batches change sums: a difference counts only where two runs of one server agree."""

    def locally(i: int) -> list[int]:
        return cluster.decode.tokens(prompts[i], NEW, cache_salt=f"c{i}")

    def across(i: int) -> list[int]:
        both = cluster.prefill, cluster.decode
        return transferred(*both, prompts[i], NEW, cache_salt=f"d{i}")[0]

    with ThreadPoolExecutor(8) as pool:
        again, got = (list(pool.map(run, range(len(prompts)))) for run in (locally, across))
    agreed = [i for i in range(len(prompts)) if again[i] == alone[i]]
    assert len(agreed) > len(prompts) / 2
    assert [i for i in agreed if got[i] != alone[i]] == []


@pytest.mark.parametrize("budget", BUDGETS)
def test_needles_are_found_within_the_budget(cluster: Cluster, budget: str) -> None:
    """At least as many as without a transfer, but one; and nothing lossy stays behind."""
    tokenizer, found = load_tokenizer("tiny"), {"alone": 0, "transferred": 0}
    for i in range(NEEDLES):
        case = needle_case(tokenizer, 700, i % 11 / 10, distractors=3, seed=(1, i))
        ids = [*case.context_ids.tolist(), *case.question_ids.tolist()]
        want = case.answer_ids.tolist()
        local = cluster.decode.tokens(ids, len(want))
        got, _ = transferred(cluster.lossy(budget), cluster.decode, ids, len(want))
        found["alone"] += local == want
        found["transferred"] += got == want
        assert cluster.decode.tokens(ids, len(want)) == local  # the plain namespace is as it was
    assert found["transferred"] >= found["alone"] - 1
    cluster.lossy(budget).tokens([5, 6], 1)
    counted = cluster.lossy(budget).counts()
    assert counted["wire_bytes"] <= float(budget) * counted["reference_bytes"]
    assert "budget_misses" not in counted


def test_chunks_leave_while_the_prompt_is_prefilled(cluster: Cluster) -> None:
    """Of 1,000 tokens in steps of 256, the second server sends four parts."""
    sender, ids = cluster.lossy(BUDGETS[1]), np.arange(1000) % 2000 + 3
    before = sender.counts()["parts_sent"]
    transferred(sender, cluster.decode, ids.tolist(), 2, cache_salt="chunks")
    sender.tokens([5, 6], 1)
    assert sender.counts()["parts_sent"] - before == 4


def test_a_transfer_is_used_once_and_by_its_own_prompt(
    cluster: Cluster, prompts: list[list[int]], alone: list[list[int]]
) -> None:
    _, params = transferred(cluster.prefill, cluster.decode, prompts[0], NEW, cache_salt="e")
    assert cluster.decode.tokens(prompts[0], NEW, params, cache_salt="f") == alone[0]
    asked = {"do_remote_decode": True}
    params = cluster.prefill.complete(prompts[1], 1, asked)["kv_transfer_params"]
    assert cluster.decode.tokens(prompts[2], NEW, params, cache_salt="g") == alone[2]
    cluster.decode.tokens([5, 6], 1)
    counted = cluster.decode.counts()
    assert counted["skipped:claimed_before"] == counted["failures:timeout"] == 1


def test_an_address_that_a_client_names_is_not_dialled(
    cluster: Cluster, prompts: list[list[int]]
) -> None:
    asked = {"do_remote_decode": True, "remote_host": "127.0.0.1", "remote_port": 9}
    assert cluster.prefill.complete(prompts[0], 1, asked).get("kv_transfer_params") is None


def test_a_damaged_segment_is_sent_again(
    cluster: Cluster, prompts: list[list[int]], alone: list[list[int]]
) -> None:
    damaged = threading.Event()

    def damage(data: bytes) -> bytes:
        if len(data) < 8192 or damaged.is_set():
            return data
        damaged.set()
        return data[:-1] + bytes([data[-1] ^ 1])

    longest = max(range(len(prompts)), key=lambda i: len(prompts[i]))
    cluster.link.change = damage
    got, _ = transferred(
        cluster.prefill, cluster.decode, prompts[longest], NEW, cache_salt="damaged"
    )
    assert damaged.is_set() and got == alone[longest]


def test_a_replayed_ticket_is_refused(
    cluster: Cluster, prompts: list[list[int]], alone: list[list[int]]
) -> None:
    """All that a transfer sent under its ticket comes once more, ahead of the next one's."""
    longest, second = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))[:2]
    both, recorded, replayed = (cluster.prefill, cluster.decode), bytearray(), threading.Event()

    def record(data: bytes) -> bytes:
        if recorded or _begins_a_manifest(data):
            recorded.extend(data)
        return data

    def replay(data: bytes) -> bytes:
        if replayed.is_set() or not _begins_a_manifest(data):
            return data
        replayed.set()
        return bytes(recorded) + data

    changes: list[Callable[[bytes], bytes]] = [record, replay, lambda data: data]
    for turn, (n, change) in enumerate(zip((longest, second, longest), changes, strict=True)):
        cluster.link.change = change
        assert transferred(*both, prompts[n], NEW, cache_salt=f"ticket{turn}")[0] == alone[n]
    assert recorded and replayed.is_set()
    assert cluster.decode.settled()["failures:TicketRefused"] == 1


def _begins_a_manifest(data: bytes) -> bool:
    return data.startswith(MAGIC) and parse_head(data[:HEAD_NBYTES]).kind is Manifest


def test_a_prompt_that_both_sides_know_in_part(
    cluster: Cluster, prompts: list[list[int]], alone: list[list[int]]
) -> None:
    """With one salt both prefix caches are used: a part is copied, and a part is loaded."""
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i]))
    ids, both = prompts[longest], (cluster.prefill, cluster.decode)
    transferred(*both, ids[: len(ids) // 2], 1, cache_salt="r")
    assert transferred(*both, ids, NEW, cache_salt="r")[0] == alone[longest]


@contextmanager
def interrupted(cluster: Cluster, ids: list[int], salt: str) -> Iterator[Future[list[int]]]:
    """A decode request whose cache is half on its way while the body runs."""
    cluster.link.hold(after_nbytes=40_000)
    params = cluster.prefill.complete(ids, 1, {"do_remote_decode": True}, cache_salt=salt)
    with ThreadPoolExecutor(1) as pool:
        ask: Callable[[], list[int]] = lambda: cluster.decode.tokens(  # noqa: E731
            ids, NEW, params["kv_transfer_params"], cache_salt=salt
        )
        asked = pool.submit(ask)
        assert cluster.link.held.wait(60)
        yield asked
        cluster.link.release()


def test_the_prefill_server_is_killed_in_the_middle(
    cluster: Cluster, prompts: list[list[int]], alone: list[list[int]]
) -> None:
    """Decode computes the prompt; then strangers take the place of the killed, then its owner."""
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i]))
    ids, want = prompts[longest], alone[longest]
    with interrupted(cluster, ids, "h") as asked:
        cluster.prefill.kill()
        assert asked.result() == want
    cluster.prefill = cluster.start_prefill(token_file=str(cluster.folder / "other-token")).wait()
    got, _ = transferred(cluster.prefill, cluster.decode, ids, NEW, cache_salt="i")
    cluster.prefill.tokens([5, 6], 1)
    assert got == want
    assert cluster.prefill.counts()["failures:AuthenticationFailed"] == 1
    cluster.prefill.kill()
    cluster.prefill = cluster.start_prefill(weights="others").wait()
    got, _ = transferred(cluster.prefill, cluster.decode, ids, NEW, cache_salt="j")
    cluster.prefill.tokens([5, 6], 1)
    assert got == want
    assert cluster.prefill.counts()["failures:Rejected"] == 1
    cluster.prefill.kill()
    cluster.prefill = cluster.start_prefill().wait()
    loads = cluster.decode.counts()["loads"]
    got, _ = transferred(cluster.prefill, cluster.decode, ids, NEW, cache_salt="k")
    cluster.decode.tokens([5, 6], 1)
    assert got == want and cluster.decode.counts()["loads"] == loads + 1


def test_the_decode_server_is_killed_in_the_middle(
    cluster: Cluster, prompts: list[list[int]], alone: list[list[int]]
) -> None:
    """The client sees an error, prefill lives; with policy `fail` a lost cache is one too."""
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i]))
    ids, want = prompts[longest], alone[longest]
    with interrupted(cluster, ids, "l") as asked:
        cluster.decode.kill()
        with pytest.raises((OSError, Failed)):
            asked.result()
    assert cluster.prefill.alive()
    cluster.decode = cluster.start_decode(policy="fail").wait()
    got, params = transferred(cluster.prefill, cluster.decode, ids, NEW, cache_salt="m")
    assert got == want
    lost = params | {"remote_request_id": "00" * 16}
    with pytest.raises(Failed, match="HTTP 500"):
        cluster.decode.tokens(ids, NEW, lost, cache_salt="n")
    assert cluster.decode.alive()
    assert cluster.decode.tokens(ids, NEW, cache_salt="o") == want


def test_sliding_windows_are_refused_at_the_start(cluster: Cluster, tmp_path: Path) -> None:
    extra = {"token_file": str(cluster.folder / "token"), "listen": f"127.0.0.1:{free_port()}"}
    model, log = tmp_path / "windowed", tmp_path / "log"
    shutil.copytree(tiny.find("tiny-mistral"), model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"sliding_window": 128}))
    server = Server(model, log, "kv_consumer", extra)
    try:
        with pytest.raises(Failed):
            server.wait()
    finally:
        server.kill()
    assert "no sliding windows" in log.read_text()


def test_the_proxy_streams_what_one_server_says(cluster: Cluster, prompts: list[list[int]]) -> None:
    command = [sys.executable, str(ROOT / "examples" / "vllm-proxy.py"), "--port", "0"]
    for name, server in (("prefill", cluster.prefill), ("decode", cluster.decode)):
        command += [f"--{name}", f"http://127.0.0.1:{server.port}"]
    proxy = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert proxy.stdout is not None
    try:
        url = proxy.stdout.readline().split()[-1]
        body = {
            "model": "model", "prompt": prompts[3], "max_tokens": NEW, "temperature": 0,
            "ignore_eos": True, "stream": True, "return_token_ids": True, "cache_salt": "p",
        }  # fmt: skip
        headers = {"Content-Type": "application/json"}
        asked = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(asked, timeout=180) as answer:
            events = [
                line[6:] for line in answer.read().decode().splitlines() if line[:6] == "data: "
            ]
        assert events[-1] == "[DONE]" and len(events) > 2
        streamed = [
            token for event in events[:-1] for token in json.loads(event)["choices"][0]["token_ids"]
        ]
        assert streamed == cluster.decode.tokens(prompts[3], NEW, cache_salt="q")
    finally:
        proxy.kill()
        proxy.wait()
        proxy.stdout.close()
