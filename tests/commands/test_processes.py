"""Signals: a command and its workers as processes, from outside."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from .conftest import Run, failure

NOTICED_S = 5.0


@pytest.fixture(autouse=True)
def _temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a killed command leaves goes with the test."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))


@contextmanager
def demo() -> Iterator[tuple[subprocess.Popen[str], dict[str, int]]]:
    """`kvprism demo` in its own process group, as in a terminal, and the pids of its workers."""
    # A shell lets its background jobs ignore SIGINT, which children inherit; a handler they do not.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(
        [sys.executable, "-m", "kvprism", "demo", "--context", "256"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    ) as process:
        signal.signal(signal.SIGINT, before)
        try:
            yield process, workers_of(process.pid)
        finally:
            process.kill()


def workers_of(parent: int, but: Collection[int] = ()) -> dict[str, int]:
    """Role -> pid, once both have started; but: pids of those lent to other tests."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        found = {role: pid for pid, role in running(parent).items() if pid not in but}
        if len(found) == 2:
            return found
        time.sleep(0.05)
    raise AssertionError("the workers did not start")


def running(parent: int) -> dict[int, str]:
    """Pid -> role of every worker that a process has now."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            ours = int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == parent
        except (FileNotFoundError, ProcessLookupError):
            continue
        if ours and b"worker" in words:
            found[int(folder.name)] = words[words.index(b"worker") + 1].decode()
    return found


def gone(pids: Iterator[int]) -> bool:
    """Whether all of them end within moments."""
    left = list(pids)
    deadline = time.monotonic() + 2
    while left and time.monotonic() < deadline:
        left = [pid for pid in left if Path(f"/proc/{pid}").exists() and not is_zombie(pid)]
        time.sleep(0.02)
    return not left


def is_zombie(pid: int) -> bool:
    try:
        return ") Z " in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_ctrl_c_ends_the_command_and_its_workers_with_one_line() -> None:
    with demo() as (process, workers):
        os.killpg(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=NOTICED_S)
    assert process.returncode == 130
    assert stderr.splitlines()[-1] == "error: interrupted"
    assert "Traceback" not in stderr
    assert gone(iter(workers.values()))


def test_a_polite_kill_ends_the_workers_and_removes_the_token(tmp_path: Path) -> None:
    with demo() as (process, workers):
        assert len(list(tmp_path.glob("kvprism-*/token"))) == 1
        process.terminate()
        _, stderr = process.communicate(timeout=NOTICED_S)
    assert process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in stderr
    assert gone(iter(workers.values()))
    assert list(tmp_path.glob("kvprism-*")) == []


def test_workers_do_not_outlive_a_killed_command() -> None:
    with demo() as (process, workers):
        process.kill()
        process.wait()
        assert gone(iter(workers.values()))


def test_a_killed_worker_fails_the_command_with_one_line_that_names_it(run: Run) -> None:
    lent = running(os.getpid())

    def kill() -> dict[str, int]:
        workers = workers_of(os.getpid(), but=lent)
        os.kill(workers["decode"], signal.SIGKILL)
        return workers

    with ThreadPoolExecutor(1) as pool:
        killed = pool.submit(kill)
        result = run("demo", "--context", 256)
    workers = killed.result()
    assert result.exit_code == 3
    assert failure(result) == (
        f"error: PeerLost: the decode worker (pid {workers['decode']}) was killed by SIGKILL"
    )
    assert gone(iter(workers.values()))


def test_output_that_nobody_reads_is_no_error_of_ours() -> None:
    command = f"{sys.executable} -m kvprism policies | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=30)
    assert done.stdout == "policies\n"
    assert done.stderr == ""
