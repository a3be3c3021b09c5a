"""The proxy between two stand-in servers that say what they were asked."""

import http.client
import importlib.util
import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

PATH = Path(__file__).parents[1] / "examples" / "vllm-proxy.py"
PARAMS = {"do_remote_prefill": True, "remote_request_id": "ab"}


def loaded() -> ModuleType:
    spec = importlib.util.spec_from_file_location("vllm_proxy", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Stand(BaseHTTPRequestHandler):
    """Answers with `answers`, each piece as a chunk of its own, and keeps what it was asked."""

    asked: list[dict[str, Any]]
    answers: list[bytes]
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.do_GET()

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for piece in [*self.answers, b""]:
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))

    def log_message(self, *_: object) -> None: ...


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


class Fronted:
    """A proxy with two stand-ins behind it; prefill `None` is a server that is not there."""

    def __init__(self, stack: ExitStack, prefill: list[bytes] | None, decode: list[bytes]) -> None:
        self.prefilled: list[dict[str, Any]] = []
        self.decoded: list[dict[str, Any]] = []
        there = {"asked": self.prefilled, "answers": prefill}
        here = {"asked": self.decoded, "answers": decode}
        settings = {
            "prefill": "http://127.0.0.1:9"
            if prefill is None
            else stack.enter_context(serving(type("There", (Stand,), there))),
            "decode": stack.enter_context(serving(type("Here", (Stand,), here))),
            "timeout_s": 10.0,
            "log_message": lambda *_: None,
        }
        url = stack.enter_context(serving(type("Own", (loaded().Proxy,), settings)))
        self._port = int(url.rpartition(":")[2])

    def ask(self, body: Any, path: str = "/v1/completions") -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=10)
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", path, data)
        answer = connection.getresponse()
        found = answer.status, answer.read()
        connection.close()
        return found


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


def test_the_prompt_goes_to_prefill_and_its_parameters_to_decode(stack: ExitStack) -> None:
    prefill = [json.dumps({"choices": [], "kv_transfer_params": PARAMS}).encode()]
    front = Fronted(stack, prefill, [b"data: a\n\n", b"data: b\n\n"])
    body = {"prompt": [1, 2], "max_tokens": 9, "stream": True, "min_tokens": 5, "n": 2}
    assert front.ask(body) == (200, b"data: a\n\ndata: b\n\n")
    (asked,) = front.prefilled
    assert (asked["max_tokens"], asked["stream"], asked["prompt"]) == (1, False, [1, 2])
    assert asked["kv_transfer_params"]["do_remote_decode"]
    assert "min_tokens" not in asked and "n" not in asked
    assert front.decoded == [{**body, "kv_transfer_params": PARAMS}]


def test_without_a_prefill_server_decode_computes_the_prompt(stack: ExitStack) -> None:
    front = Fronted(stack, None, [b"{}"])
    assert front.ask({"prompt": "x"}) == (200, b"{}")
    assert front.decoded == [{"prompt": "x"}]


def test_clients_cannot_name_a_transfer(stack: ExitStack) -> None:
    front = Fronted(stack, None, [b"{}"])
    front.ask({"prompt": "x", "kv_transfer_params": {"remote_host": "10.0.0.1"}})
    assert front.decoded == [{"prompt": "x"}]


def test_several_prompts_are_computed_where_they_are_decoded(stack: ExitStack) -> None:
    front = Fronted(stack, [b"{}"], [b"{}"])
    front.ask({"prompt": ["a", "b"]})
    assert front.prefilled == [] and front.decoded == [{"prompt": ["a", "b"]}]


def test_a_body_that_is_no_object_is_refused(stack: ExitStack) -> None:
    front = Fronted(stack, [b"{}"], [b"{}"])
    for body in (b"[1]", b"{"):
        assert front.ask(body)[0] == 400
