"""Worker processes and the parent that drives a pair of them; light, so that both start at once.

Parent and worker speak JSON lines over the worker's stdin and stdout; the KV cache itself goes from
worker to worker over TCP or shared memory. A worker beats from its first moment, before torch is
imported, so that a killed, stopped or stuck one is noticed whatever it was doing; and it ends with
its parent.
"""

import ctypes
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from kvprism import errors
from kvprism.errors import KVPrismError, PeerLost, PeerSilent, UnknownName
from kvprism.transport.addresses import HOSTS
from kvprism.transport.token import create_token, load_token

BEAT_S = 0.5
TICK_S = 0.2
# Below the 4 s after which a connection gives up: the worker that stands still is named first.
SILENCE_S = 3.5
# Loading a library from a cold disk holds the interpreter, and with it the beat.
START_SILENCE_S = 60.0
# The sender is told to send as soon as the receiver was told to receive.
OFFER_S = 10.0
PR_SET_PDEATHSIG = 1

LOOPBACK = "127.0.0.1"
Json = dict[str, Any]
Say = Callable[[Json], None]


def serve(
    role: str,
    model: str,
    token_file: Path,
    cache_dtype: str,
    profile: Path | None = None,
    host: str = LOOPBACK,
) -> None:
    """Be a worker until the parent is gone: one JSON request a line, one JSON answer a line."""
    _end_with_parent()
    say = _claim_stdout()
    requests: queue.SimpleQueue[Json] = queue.SimpleQueue()
    for work in (partial(_beat, say), partial(_read_requests, requests)):
        threading.Thread(target=work, daemon=True).start()
    workers: list[Any] = []
    load = partial(_load, role, model, token_file, cache_dtype, profile, host)
    say(_outcome(lambda: workers.append(load())))
    while workers:
        say(_outcome(partial(_answer, workers[0], requests.get())))


def _load(
    role: str,
    model: str,
    token_file: Path,
    cache_dtype: str,
    profile_file: Path | None,
    host: str,
) -> Any:
    token = load_token(token_file)
    from kvprism.integrations.decode_role import DecodeWorker
    from kvprism.integrations.prefill_role import PrefillWorker
    from kvprism.profiles import Profile

    profile = None if profile_file is None else Profile.load(profile_file)
    if role == "decode":
        allow_remote = host != LOOPBACK
        return DecodeWorker(model, token, host=host, profile=profile, allow_remote=allow_remote)
    return PrefillWorker(model, token, cache_dtype, profile)


def _answer(worker: Any, request: Json) -> Any:
    return getattr(worker, request.pop("op"))(**request)


def _outcome(work: Callable[[], Any]) -> Json:
    try:
        return {"result": work()}
    except KVPrismError as error:
        return {"error": type(error).__name__, "message": str(error), "fields": vars(error)}
    except Exception as error:  # a bug here must not leave the parent waiting
        traceback.print_exc()
        message = f"a worker failed unexpectedly: {type(error).__name__}: {error}"
        return {"error": "KVPrismError", "message": message, "fields": {}}


def _end_with_parent() -> None:
    """Ask the kernel to kill this process with the thread that started it, even while stopped."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _claim_stdout() -> Say:
    """The only way to the parent; what any library prints goes to stderr from now on."""
    out, lock = os.fdopen(os.dup(1), "w"), threading.Lock()
    os.dup2(2, 1)

    def say(message: Json) -> None:
        with lock:
            try:
                print(json.dumps(message), file=out, flush=True)
            except OSError:
                os._exit(1)

    return say


def _beat(say: Say) -> None:
    while True:
        say({})
        time.sleep(BEAT_S)


def _read_requests(requests: "queue.SimpleQueue[Json]") -> None:
    for line in sys.stdin:
        requests.put(json.loads(line))
    os._exit(0)  # the parent is gone, whatever the other threads are doing


@dataclass(frozen=True)
class Place:
    """Where a worker process runs.

    prefix: a command that runs it, such as `ip netns exec NAME`; host: where a decode worker
    listens, or `shm`; core: the one CPU core that it may use; threads: of torch.
    """

    prefix: tuple[str, ...] = ()
    host: str = LOOPBACK
    core: int | None = None
    threads: int | None = None

    @property
    def environment(self) -> dict[str, str]:
        own = {} if self.threads is None else {"OMP_NUM_THREADS": str(self.threads)}
        return os.environ | own


ANYWHERE = Place()


def place_of(transport: str) -> Place:
    """Where a decode worker listens for a cache that comes over this transport.

    Raises:
        UnknownName: no such transport.
    """
    if transport not in HOSTS:
        raise UnknownName("transport", transport, list(HOSTS))
    return Place(host=HOSTS[transport])


class Worker:
    """The parent's handle on one worker process, which runs one operation at a time.

    Raises:
        PeerLost: the process ended; PeerSilent: it has not beaten for `SILENCE_S`; and whatever
        kvprism error the worker itself raised, with its type, text and fields.
    """

    def __init__(
        self,
        role: str,
        model: str,
        token_file: Path,
        cache_dtype: str,
        profile: Path | None = None,
        place: Place = ANYWHERE,
    ) -> None:
        self.role, self.busy = role, True  # loading
        # -P: what lies in the working directory must not stand in for a library.
        command = [
            *place.prefix,
            sys.executable,
            "-P",
            "-m",
            "kvprism",
            "worker",
            role,
            "--model",
            model,
        ]
        command += ["--token-file", str(token_file), "--cache-dtype", cache_dtype]
        command += [] if profile is None else ["--profile", str(profile)]
        command += ["--host", place.host]
        # A process group of its own: the terminal's Ctrl-C is for the parent to act on.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            process_group=0,
            env=place.environment,
        )
        if place.core is not None:
            os.sched_setaffinity(self._process.pid, {place.core})
        self._answers: queue.SimpleQueue[Json | None] = queue.SimpleQueue()
        self._quiet_s, self._patience_s = 0.0, START_SILENCE_S
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def __str__(self) -> str:
        return f"the {self.role} worker (pid {self.pid})"

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError), self._process:  # OSError: a request that it never read
            self._process.kill()
            self._listener.join()

    def start(self, op: str, **arguments: Any) -> None:
        """Start an operation; `poll` gives its answer."""
        assert not self.busy, f"{self} has not answered yet"
        self.busy = True
        line = json.dumps({"op": op, **arguments}) + "\n"
        # A stopped worker's pipe may be full, and nobody may wait for that.
        threading.Thread(target=self._write, args=(line,), daemon=True).start()

    def poll(self) -> Json | None:
        """The answer, if it comes within `TICK_S`: `{"result": ...}`."""
        try:
            answer = self._answers.get(timeout=TICK_S)
        except queue.Empty:
            return None
        if answer is None:
            raise self._lost()
        self.busy, self._patience_s = False, SILENCE_S
        if "error" in answer:
            raise _rebuilt(answer["error"], answer["message"], answer["fields"])
        return answer

    def check(self, elapsed_s: float) -> None:
        """Raises if this worker is dead, or silent for too long; elapsed: since the last check."""
        if not self._listener.is_alive():
            self.poll()  # its own error says more
            raise self._lost()
        self._quiet_s += elapsed_s
        if self._quiet_s > self._patience_s:
            raise PeerSilent(f"{self} gave no sign of life for {self._patience_s:g} s")

    def _write(self, line: str) -> None:
        assert self._process.stdin is not None
        with suppress(OSError):  # it is dead, and `check` says so
            self._process.stdin.write(line)
            self._process.stdin.flush()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._quiet_s = 0.0
            if message := json.loads(line):
                self._answers.put(message)
        self._answers.put(None)

    def _lost(self) -> PeerLost:
        code = self._process.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        return PeerLost(f"{self} {how}")


class Pair:
    """A prefill and a decode worker; whichever is waited for, both must be alive."""

    def __init__(self, prefill: Worker, decode: Worker) -> None:
        self.prefill, self.decode = prefill, decode
        self._address: list[Any] | None = None
        self.started = self._checked = time.monotonic()

    def ready(self) -> None:
        """Wait until both models are loaded; at once when they are."""
        for worker in (self.prefill, self.decode):
            if worker.busy:
                self._wait(worker)

    def call(self, worker: Worker, op: str, **arguments: Any) -> Any:
        """Run an operation once both are ready; what it returns, or raises."""
        self._settle(worker)
        worker.start(op, **arguments)
        return self._wait(worker)

    def exchange(self, sending: tuple[str, Json], receiving: tuple[str, Json]) -> tuple[Json, Json]:
        """One operation of each worker, at once: the prefill worker's answer, the decode's."""
        self._settle(self.prefill)
        self._settle(self.decode)
        self.decode.start(receiving[0], **receiving[1])
        self.prefill.start(sending[0], **sending[1])
        return self._wait(self.prefill), self._wait(self.decode)

    def transfer(self, op: str = "send", **arguments: Any) -> Json:
        """Send what was planned and restore it; sizes and timings of both sides.

        op: by which operation of the prefill worker, which is told the address too.
        """
        if self._address is None:
            self._address = self.call(self.decode, "address")
        self._settle(self.decode)
        self.decode.start("receive", timeout_s=OFFER_S)
        sent = self.call(self.prefill, op, address=self._address, **arguments)
        return {**self._wait(self.decode), **sent}

    def _settle(self, worker: Worker) -> None:
        """Let the worker finish what an earlier failure left it with."""
        try:
            while worker.busy:
                self._wait(worker)
        except KVPrismError:
            if worker.busy:  # this is no answer: it is dead or silent
                raise

    def _wait(self, worker: Worker) -> Any:
        while True:
            try:
                answer = worker.poll()
            except (PeerLost, PeerSilent):
                self._name_culprit()
                raise
            self._check()
            if answer is not None:
                return answer["result"]

    def _name_culprit(self) -> None:
        """A worker that lost its peer is the first to say so; give the other's silence its time."""
        for _ in range(round(1 / TICK_S)):
            self._check()
            time.sleep(TICK_S)

    def _check(self) -> None:
        now = time.monotonic()
        # When this process was itself suspended, nobody is to blame for that.
        elapsed_s = min(now - self._checked, 2 * TICK_S)
        self._checked = now
        for worker in (self.prefill, self.decode):
            worker.check(elapsed_s)


@contextmanager
def worker_pair(
    model: str,
    cache_dtype: str = "bfloat16",
    profile: Path | None = None,
    places: tuple[Place, Place] = (ANYWHERE, ANYWHERE),
) -> Iterator[Pair]:
    """Start both workers side by side, with a token of their own; they load while the body runs.

    places: of the prefill and the decode worker.
    """
    with tempfile.TemporaryDirectory(prefix="kvprism-") as folder:
        token_file = Path(folder) / "token"
        create_token(token_file)
        with (
            Worker("prefill", model, token_file, cache_dtype, profile, places[0]) as prefill,
            Worker("decode", model, token_file, cache_dtype, profile, places[1]) as decode,
        ):
            yield Pair(prefill, decode)


def _rebuilt(name: str, message: str, fields: Json) -> KVPrismError:
    """The worker's error, here."""
    kind: type[KVPrismError] = getattr(errors, name)
    error = kind.__new__(kind)
    error.args = (message,)
    vars(error).update(fields)
    return error
