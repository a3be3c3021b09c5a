"""Real worker processes: what they answer, and what is noticed when one dies or stands still."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from samples import tokens

from kvprism.errors import (
    BadInput,
    BudgetTooSmall,
    KVPrismError,
    PeerLost,
    PeerSilent,
    UnknownName,
)
from kvprism.integrations import worker as worker_module
from kvprism.integrations.worker import Pair, Worker, worker_pair
from kvprism.transport.token import create_token

NOTICED_S = 5.0
IDS = tokens(1500)[0].tolist()
# More than a pipe holds, and more than the model takes.
LONG_REQUEST = [4] * 100_000


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with worker_pair("tiny") as pair:
        pair.ready()
        pair.call(pair.prefill, "prefill", ids=IDS)
        yield pair


def plan(pair: Pair, policy: str = "spectrum", budget: str | None = "40%") -> dict[str, object]:
    planned: dict[str, object] = pair.call(pair.prefill, "plan", policy=policy, budget=budget)
    return planned


def transfer(pair: Pair) -> object:
    plan(pair)
    return pair.transfer()


def test_a_transfer_moves_the_planned_bytes(pair: Pair) -> None:
    planned = plan(pair)
    moved = pair.transfer()
    assert moved["fraction"] == planned["fraction"] <= 0.4
    assert moved["kept_tokens"] == len(IDS) - 1


def test_a_worker_s_error_arrives_with_its_type_text_and_values(pair: Pair) -> None:
    with pytest.raises(BudgetTooSmall, match="budget too small for policy 'spectrum'") as caught:
        plan(pair, budget="1%")
    assert caught.value.needed > caught.value.given > 0
    with pytest.raises(UnknownName, match="unknown policy 'best'; known: raw"):
        plan(pair, policy="best")
    transfer(pair)


def test_a_bug_in_a_worker_reaches_the_parent(pair: Pair) -> None:
    with pytest.raises(KVPrismError, match="a worker failed unexpectedly: ValueError"):
        pair.call(pair.prefill, "prefill", ids=["not", "numbers"])
    with pytest.raises(KVPrismError, match="a worker failed unexpectedly: AttributeError"):
        pair.call(pair.decode, "no_such_operation")
    transfer(pair)


def test_a_transfer_works_after_one_whose_sender_never_came(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "OFFER_S", 1.0)
    address = pair.call(pair.decode, "address")
    monkeypatch.setattr(pair, "_address", ["127.0.0.1", 9])
    plan(pair)
    with pytest.raises(PeerLost, match=r"cannot reach 127\.0\.0\.1 port 9"):
        pair.transfer()
    monkeypatch.setattr(pair, "_address", address)
    transfer(pair)


def prefill(pair: Pair) -> object:
    return pair.call(pair.prefill, "prefill", ids=IDS)


def generate(pair: Pair) -> object:
    return pair.call(pair.decode, "generate", ids=IDS, n=20, ignore_eos=True)


@pytest.mark.parametrize(
    ("role", "work"),
    [
        ("prefill", prefill),
        ("prefill", transfer),
        ("decode", transfer),
        ("decode", generate),
        # Waiting for one of them, it is the other that stands still.
        ("decode", prefill),
    ],
    ids=["prefilling", "sending", "receiving", "generating", "idle"],
)
def test_a_stopped_worker_is_noticed_and_named_and_can_go_on(
    pair: Pair, role: str, work: Callable[[Pair], object]
) -> None:
    transfer(pair)
    stopped = getattr(pair, role)
    stop = threading.Timer(0.3, os.kill, (stopped.pid, signal.SIGSTOP))
    started = time.monotonic() + stop.interval
    stop.start()
    try:
        with pytest.raises(PeerSilent, match=rf"the {role} worker \(pid {stopped.pid}\)"):
            while True:
                work(pair)
        assert time.monotonic() - started < NOTICED_S
    finally:
        os.kill(stopped.pid, signal.SIGCONT)
    transfer(pair)


def test_a_request_that_fills_the_pipe_of_a_stopped_worker_does_not_block(pair: Pair) -> None:
    os.kill(pair.prefill.pid, signal.SIGSTOP)
    try:
        with pytest.raises(PeerSilent, match="the prefill worker"):
            pair.call(pair.prefill, "prefill", ids=LONG_REQUEST)
    finally:
        os.kill(pair.prefill.pid, signal.SIGCONT)


def test_the_own_error_of_the_worker_that_nobody_waits_for_arrives(
    tmp_path: Path, pair: Pair
) -> None:
    """Here the decode worker fails while it loads, and it is the prefill worker that is busy."""
    with (
        Worker("decode", "tiny", tmp_path / "no-token", "bfloat16") as decode,
        pytest.raises(BadInput, match="no-token cannot be read"),
    ):
        while True:
            prefill(Pair(pair.prefill, decode))


def test_a_worker_killed_while_it_receives_is_named(pair: Pair) -> None:
    """The last test with this pair."""
    prefill(pair)
    stop = threading.Timer(0.3, os.kill, (pair.decode.pid, signal.SIGKILL))
    stop.start()
    killed = r"the decode worker \(pid \d+\) was killed by SIGKILL"
    started = time.monotonic() + stop.interval
    with pytest.raises(PeerLost, match=killed):
        while True:
            transfer(pair)
    assert time.monotonic() - started < NOTICED_S
    with pytest.raises(PeerLost, match=killed):
        prefill(pair)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_worker_killed_while_it_loads_is_named(role: str) -> None:
    with worker_pair("tiny") as pair:
        os.kill(getattr(pair, role).pid, signal.SIGKILL)
        with pytest.raises(PeerLost, match=rf"the {role} worker \(pid \d+\) was killed by SIGKILL"):
            pair.ready()


def test_a_worker_stopped_while_it_loads_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "START_SILENCE_S", 4.0)
    with worker_pair("tiny") as pair:
        os.kill(pair.decode.pid, signal.SIGSTOP)
        with pytest.raises(PeerSilent, match="the decode worker"):
            pair.ready()


def test_an_error_of_loading_arrives(tmp_path: Path) -> None:
    missing = tmp_path / "no-token"
    with (
        Worker("prefill", "tiny", missing, "bfloat16") as prefill,
        Worker("decode", "tiny", missing, "bfloat16") as decode,
        pytest.raises(BadInput, match="no-token cannot be read"),
    ):
        Pair(prefill, decode).ready()


def test_leaving_in_the_middle_ends_both_workers_at_once() -> None:
    with worker_pair("tiny") as pair:
        pids = [pair.prefill.pid, pair.decode.pid]
        os.kill(pids[0], signal.SIGSTOP)
        started = time.monotonic()
    assert time.monotonic() - started < 1
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_worker_without_a_parent_ends(tmp_path: Path) -> None:
    create_token(tmp_path / "token")
    command = [sys.executable, "-m", "kvprism", "worker", "decode", "--model", "tiny"]
    done = subprocess.run(
        [*command, "--token-file", str(tmp_path / "token")],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=10,
    )
    assert done.returncode == 0


PARENT = """
import os, signal, sys, time
from kvprism.integrations.worker import worker_pair
with worker_pair("tiny") as pair:
    for worker in (pair.prefill, pair.decode):
        worker._quiet_s = 1.0
        while worker._quiet_s:  # until its first beat
            time.sleep(0.01)
        if sys.argv[1] == "stopped":
            os.kill(worker.pid, signal.SIGSTOP)
    print(pair.prefill.pid, pair.decode.pid, flush=True)
    signal.pause()
"""


@pytest.mark.parametrize("state", ["running", "stopped"])
def test_workers_do_not_outlive_a_killed_parent(
    state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, state], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pids = parent.stdout.readline().split()
        parent.kill()
    deadline = time.monotonic() + 5
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline, pids
        time.sleep(0.05)


def alive(pid: str) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
