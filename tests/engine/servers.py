"""Real vLLM servers on loopback: started, asked, killed. Standard library alone."""

import http.client
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
VARIABLE = "KVPRISM_VLLM"  # the Python of the environment that scripts/set-up-vllm made
# Loading takes half a minute on two idle cores, and much longer where others work.
START_S = float(os.environ.get("KVPRISM_VLLM_START_S", "600"))
ANSWER_S = 180.0
MODEL_LENGTH = 2048
SETTINGS = [
    *("--dtype", "float32", "--enforce-eager", "--block-size", "32"),
    *("--max-model-len", str(MODEL_LENGTH)),
]

OURS = {
    "kv_connector": "KVPrismConnector",
    "kv_connector_module_path": "kvprism.integrations.vllm",
}
GAUGES = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")


def stop_cleanly() -> None:
    """Let a signal end the program as an error would, so that no server stays behind."""

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, stop)


class Failed(Exception):
    """A server answered with an error, or not at all."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def environment() -> dict[str, str]:
    """Loopback, offline, small, and the packages of this tree before installed ones."""
    return os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "nobind"),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONHASHSEED": "0",
        "PYTHONPATH": str(ROOT / "src"),
    }


class Server:
    """`vllm serve` in a process group of its own; ready when `wait` returns.

    role: of the transfer, None for a server without one; extra: `kv_connector_extra_config`;
    connector: keys of another connector than ours; variables: of its environment.
    """

    def __init__(
        self,
        model: Path,
        log: Path,
        role: str | None = None,
        extra: dict[str, Any] | None = None,
        *,
        policy: str = "recompute",
        settings: list[str] | None = None,
        port: int | None = None,
        connector: dict[str, Any] | None = None,
        variables: dict[str, str] | None = None,
    ) -> None:
        self.port, self.log = port or free_port(), log
        command = [os.environ[VARIABLE], "-P", "-m", "vllm.entrypoints.cli.main", "serve"]
        command += [str(model), "--served-model-name", "model", "--host", "127.0.0.1"]
        command += ["--port", str(self.port), *SETTINGS, *(settings or [])]
        if role is not None:
            transfer = {
                **(OURS if connector is None else connector),
                "kv_role": role,
                "kv_load_failure_policy": policy,
                "kv_connector_extra_config": extra or {},
            }
            command += ["--kv-transfer-config", json.dumps(transfer)]
        with log.open("a") as out:
            self.process = subprocess.Popen(
                command,
                stdout=out,
                stderr=out,
                env=environment() | (variables or {}),
                process_group=0,
            )

    def wait(self) -> "Server":
        """Until it serves; raises with the end of its log when it ends instead."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise Failed(f"the server ended with {self.process.returncode}:\n{self.tail()}")
            with suppress(OSError), self._open("/health", timeout_s=5):
                return self
            time.sleep(0.5)
        raise Failed(f"the server was not ready in {START_S:g} s:\n{self.tail()}")

    def alive(self) -> bool:
        with suppress(OSError), self._open("/health", timeout_s=30):
            return True
        return False

    def kill(self) -> None:
        """The whole group at once, as when the machine goes."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def tail(self, lines: int = 40) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def complete(
        self, ids: list[int], n: int = 1, params: dict[str, Any] | None = None, **more: Any
    ) -> dict[str, Any]:
        """Greedy tokens after a prompt of token ids, end of text ignored."""
        body = {
            "model": "model",
            "prompt": ids,
            "max_tokens": n,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            **({} if params is None else {"kv_transfer_params": params}),
            **more,
        }
        try:
            with self._open("/v1/completions", body) as answer:
                result: dict[str, Any] = json.load(answer)
        except http.client.HTTPException as error:
            raise Failed(f"the answer broke off: {error!r}") from error
        return result

    def asked(self, ids: list[int], n: int, params: dict[str, Any]) -> http.client.HTTPConnection:
        """A request under way, for a client that may go before the answer comes."""
        body = {"model": "model", "prompt": ids, "max_tokens": n, "kv_transfer_params": params}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_S)
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        return connection

    def settled(self) -> dict[str, float]:
        """`counts` after one more step: those of a step appear with the next one."""
        self.complete([5, 6])
        return self.counts()

    def tokens(self, *args: Any, **kwargs: Any) -> list[int]:
        found: list[int] = self.complete(*args, **kwargs)["choices"][0]["token_ids"]
        return found

    def counts(self) -> dict[str, float]:
        """`name` or `name:label` -> sum, of the connector's counters on /metrics."""
        found: dict[str, float] = {}
        for line in self.metrics():
            if not line.startswith("vllm:kvprism_") or "_total{" not in line:
                continue
            name, _, rest = line.removeprefix("vllm:kvprism_").partition("_total{")
            labels, _, value = rest.rpartition("} ")
            kept = [
                part.partition("=")[2].strip('"')
                for part in labels.split(",")
                if part.partition("=")[0] in ("tier", "cause")
            ]
            found[":".join([name, *kept])] = float(value)
        return found

    def gauges(self) -> dict[str, float]:
        """vLLM's own: requests that run or wait, and the share of blocks that are taken."""
        found = {}
        for line in self.metrics():
            name, _, rest = line.partition("{")
            if name in GAUGES:
                found[name] = float(rest.rpartition("} ")[2])
        return found

    def metrics(self) -> list[str]:
        """The lines of /metrics."""
        with self._open("/metrics") as answer:
            lines: list[str] = answer.read().decode().splitlines()
        return lines

    def _open(
        self, path: str, body: dict[str, Any] | None = None, timeout_s: float = ANSWER_S
    ) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "application/json"}
        )
        try:
            return urllib.request.urlopen(request, timeout=timeout_s)
        except urllib.error.HTTPError as error:
            raise Failed(f"HTTP {error.code}: {error.read()[:300]!r}") from error


def transferred(
    prefill: Server, decode: Server, ids: list[int], n: int, **more: Any
) -> tuple[list[int], dict[str, Any]]:
    """What a proxy does: the prompt there, its parameters here; tokens, and the parameters."""
    asked = {"do_remote_decode": True, "do_remote_prefill": False}
    params = prefill.complete(ids, 1, asked, **more)["kv_transfer_params"]
    return decode.tokens(ids, n, params, **more), params
