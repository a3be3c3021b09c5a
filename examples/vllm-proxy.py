#!/usr/bin/env python3
"""An OpenAI-compatible front of one prefill and one decode server: standard library alone.

    examples/vllm-proxy.py --prefill http://127.0.0.1:8100 --decode http://127.0.0.1:8200

A completion goes to the prefill server for one token, which is thrown away; what that answers in
`kv_transfer_params` goes with the whole request to the decode server, whose answer is passed on as
it comes, streamed or not. When the prefill server does not answer, the decode server computes the
prompt itself. Clients cannot set `kv_transfer_params`: they name addresses and other requests.
"""

import argparse
import http.client
import json
import sys
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

COMPLETIONS = ("/v1/completions", "/v1/chat/completions")
ASKED = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
# They contradict a single token, or ask for what the prefill server's answer is not used for.
NOT_FOR_PREFILL = ("stream_options", "min_tokens", "n", "best_of", "logprobs", "top_logprobs")
MAX_BODY_NBYTES = 64 * 2**20


class Proxy(BaseHTTPRequestHandler):
    """One client's connection; `prefill`, `decode` and `timeout_s` are set on the class."""

    prefill: str
    decode: str
    timeout_s: float
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._pass_on("GET", None)

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > MAX_BODY_NBYTES:
            self.close_connection = True
            self._refuse(411, "a Content-Length of at most 64 MiB is needed")
            return
        raw = self.rfile.read(int(length))
        if self.path not in COMPLETIONS:
            self._pass_on("POST", raw)
            return
        try:
            body = json.loads(raw)
        except ValueError:
            body = None
        if not isinstance(body, dict):
            self._refuse(400, "the body must be a JSON object")
            return
        body.pop("kv_transfer_params", None)
        if one_prompt(body) and (params := self._prefilled(body)):
            body["kv_transfer_params"] = params
        self._pass_on("POST", json.dumps(body).encode())

    def _prefilled(self, body: dict[str, Any]) -> dict[str, Any] | None:
        """The parameters with which the decode server finds the prompt's cache."""
        asked = {key: value for key, value in body.items() if key not in NOT_FOR_PREFILL}
        asked |= {"max_tokens": 1, "stream": False, "kv_transfer_params": ASKED}
        if "max_completion_tokens" in asked:
            asked["max_completion_tokens"] = 1
        try:
            with closing(connected(self.prefill, self.timeout_s)) as server:
                answer = self._ask(server, "POST", json.dumps(asked).encode())
                params = json.load(answer).get("kv_transfer_params")
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.log_error("prefill server: %s", error)
            return None
        return params if isinstance(params, dict) else None

    def _pass_on(self, method: str, body: bytes | None) -> None:
        """The decode server's answer, chunk by chunk as it comes."""
        with closing(connected(self.decode, self.timeout_s)) as server:
            try:
                answer = self._ask(server, method, body)
            except (OSError, http.client.HTTPException) as error:
                self._refuse(502, f"decode server: {error}")
                return
            self.send_response(answer.status)
            self.send_header("Content-Type", answer.getheader("Content-Type", "application/json"))
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            try:
                while chunk := answer.read1(65536):
                    self.wfile.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
            except (OSError, http.client.HTTPException) as error:
                self.log_error("broken off: %s", error)
                self.close_connection = True  # without the last chunk, so that the client knows
                return
        self.wfile.write(b"0\r\n\r\n")

    def _ask(
        self, server: http.client.HTTPConnection, method: str, body: bytes | None
    ) -> http.client.HTTPResponse:
        headers = {"Content-Type": "application/json"}
        if authorization := self.headers.get("Authorization"):
            headers["Authorization"] = authorization
        server.request(method, self.path, body, headers)
        return server.getresponse()

    def _refuse(self, status: int, reason: str) -> None:
        data = json.dumps({"error": {"message": reason, "code": status}}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def connected(url: str, timeout_s: float) -> http.client.HTTPConnection:
    where = urlsplit(url)
    return http.client.HTTPConnection(where.hostname or "", where.port, timeout=timeout_s)


def one_prompt(body: dict[str, Any]) -> bool:
    """Whether the request is one prompt: several have one cache each, and one set of parameters."""
    prompt = body.get("prompt", "")
    return isinstance(prompt, str) or (
        isinstance(prompt, list) and all(isinstance(token, int) for token in prompt)
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prefill", required=True, help="URL of the prefill server")
    parser.add_argument("--decode", required=True, help="URL of the decode server")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--timeout-s", type=float, default=600.0)
    given = parser.parse_args()
    Proxy.prefill, Proxy.decode, Proxy.timeout_s = given.prefill, given.decode, given.timeout_s
    with ThreadingHTTPServer((given.host, given.port), Proxy) as server:
        print(f"listening on http://{given.host}:{server.server_address[1]}", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
