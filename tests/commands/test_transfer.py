"""run, and the pair of prefill and decode in two processes."""

import re
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

import kvprism
from kvprism.codec import backend, cpu
from kvprism.commands import console
from kvprism.commands.transfer import decode_here, format_address, parse_address
from kvprism.errors import BadInput, ProfileMismatch, TransportError, WireError

from .conftest import Run, failure, read_json


@pytest.fixture(scope="module")
def token(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("token") / "token"
    assert run("token", path).exit_code == 0
    return path


@contextmanager
def decoding(prompt: Path, token: Path, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """`kvprism decode` in a process of its own."""
    command = [sys.executable, "-m", "kvprism", "decode", "--file", prompt, "--token-file", token]
    with subprocess.Popen(
        [str(each) for each in [*command, *arguments]],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def decoding_here(
    prompt: Path, token: Path, profile: Path | None = None, host: str = "127.0.0.1"
) -> Iterator[tuple[str, Future[dict[str, Any]]]]:
    """What `kvprism decode` calls, on a thread: its address, and its result to come."""
    said: SimpleQueue[str] = SimpleQueue()
    with ThreadPoolExecutor(1) as pool, pytest.MonkeyPatch.context() as patch:
        patch.setattr(console, "say", said.put)
        result = pool.submit(
            decode_here, "tiny", prompt, token, host=host, port=0, tokens=None,
            new_tokens=2, timeout_s=20.0, allow_remote=False, profile=profile, say=lambda _: None,
        )  # fmt: skip
        yield said.get(timeout=20).removeprefix("listening on "), result


def address_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    match = re.fullmatch(r"listening on (\S+)\n", process.stdout.readline())
    assert match is not None
    return match[1]


@pytest.mark.usefixtures("lent_workers")
def test_run_sends_saves_and_continues(run: Run, prompt: Path, tmp_path: Path) -> None:
    saved, json = tmp_path / "stream.kvp", tmp_path / "run.json"
    arguments = ["--policy", "sinks-recent", "--budget", "50%", "--new-tokens", 4]
    result = run("run", "--file", prompt, *arguments, "--save", saved, "--json", json)
    assert result.exit_code == 0, result.output
    done = read_json(json)
    assert (done["kind"], done["policy"], done["budget"]) == ("run", "sinks-recent", "50%")
    assert done["fraction"] <= 0.5
    assert done["wire_bytes"] == saved.stat().st_size
    assert stat.S_IMODE(saved.stat().st_mode) == 0o600
    kv = kvprism.decode(saved.read_bytes())
    assert kv.next_position == done["context_tokens"] - 1
    assert len(kv.layers[0].positions) == done["kept_tokens"] == done["tiers"]["native"]
    assert result.stdout.endswith(done["text"] + "\n")
    assert {name for name in done if name.endswith("_ms")} <= set(done["definitions"])


@pytest.mark.usefixtures("lent_workers")
def test_run_sends_chunks_while_it_prefills(run: Run, prompt: Path, tmp_path: Path) -> None:
    saved, json = tmp_path / "stream.kvp", tmp_path / "run.json"
    arguments = ["--file", prompt, "--budget", "40%", "--chunk", 100, "--new-tokens", 4]
    result = run("run", *arguments, "--save", saved, "--json", json)
    assert result.exit_code == 0, result.output
    done = read_json(json)
    assert done["fraction"] <= 0.4 and done["chunk"] == 100
    assert done["base_bytes"] < done["wire_bytes"] == saved.stat().st_size
    assert kvprism.decode(saved.read_bytes()).next_position == done["context_tokens"] - 1
    assert {name for name in done if name.endswith("_ms")} <= set(done["definitions"])
    inspected = run("inspect", saved)
    assert inspected.exit_code == 0 and "refine" in inspected.stdout
    for refused, why in (("20%", "BudgetTooSmall"), ("40% --policy snapkv", "without chunks")):
        result = run("run", *arguments, "--budget", *refused.split())
        assert result.exit_code != 0 and why in failure(result)


def test_a_decode_side_that_needs_the_mass_takes_no_chunks(
    run: Run, prompt: Path, token: Path
) -> None:
    arguments = ["--file", prompt, "--to", "127.0.0.1:9", "--token-file", token]
    chunks = ["--budget", "40%", "--chunk", 100, "--decode-policy", "h2o"]
    assert "leave out --chunk" in failure(run("prefill", *arguments, *chunks))


@pytest.mark.usefixtures("lent_workers")
@pytest.mark.parametrize("policy", ["spectrum-conditioned", "spectrum-adaptive"])
def test_run_conditions_keys_by_the_profile(
    run: Run, prompt: Path, profiles: tuple[Path, ...], policy: str, tmp_path: Path
) -> None:
    saved, json = tmp_path / "stream.kvp", tmp_path / "run.json"
    arguments = ["--profile", profiles[0], "--policy", policy, "--budget", "35%"]
    arguments += ["--new-tokens", 2, "--transport", "shm", "--save", saved, "--json", json]
    result = run("run", "--file", prompt, *arguments)
    assert result.exit_code == 0, result.output
    assert read_json(json)["wire_bytes"] == saved.stat().st_size
    kvprism.decode(saved.read_bytes(), profile=kvprism.Profile.load(profiles[0]))
    with pytest.raises(ProfileMismatch):
        kvprism.decode(saved.read_bytes(), profile=kvprism.Profile.load(profiles[1]))


@pytest.mark.parametrize(
    "side", [["prefill", "--to", "127.0.0.1:9", "--budget", "40%"], ["decode"]]
)
def test_neither_side_serves_with_the_slow_codec_unasked(
    run: Run, prompt: Path, token: Path, side: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    monkeypatch.setattr(cpu, "library", lambda: None)
    result = run(*side, "--file", prompt, "--token-file", token)
    assert result.exit_code != 0
    assert "KVPRISM_CODEC=reference" in failure(result)


@pytest.mark.parametrize("which", [None, 1])
def test_peers_with_different_profiles_never_send(
    run: Run, prompt: Path, token: Path, profiles: tuple[Path, ...], which: int | None
) -> None:
    given = [] if which is None else ["--profile", profiles[which]]
    send = ["prefill", "--file", prompt, "--token-file", token, "--budget", "40%", *given]
    with decoding_here(prompt, token, profiles[0]) as (to, decoded):
        refused = run(*send, "--to", to)
        assert refused.exit_code == 3
        assert "Rejected: peer refused (profile): profile is" in failure(refused)
        with pytest.raises((TransportError, WireError)):  # exit code 3
            decoded.result()


@pytest.mark.parametrize("host", ["127.0.0.1", "shm"])
def test_peers_with_the_same_profile_send(
    run: Run, prompt: Path, token: Path, profiles: tuple[Path, ...], host: str
) -> None:
    send = ["prefill", "--file", prompt, "--token-file", token, "--budget", "40%"]
    given = ["--profile", profiles[0], "--policy", "spectrum-conditioned"]
    with decoding_here(prompt, token, profiles[0], host) as (to, decoded):
        assert to.startswith(f"{host}:")
        sent = run(*send, *given, "--to", to)
        assert sent.exit_code == 0, sent.output
        assert 0.35 < decoded.result()["fraction"] <= 0.4


def test_the_decode_side_evicts_while_it_generates(
    run: Run, prompt: Path, token: Path, tmp_path: Path
) -> None:
    json = tmp_path / "decode.json"
    phase = ["--decode-policy", "h2o", "--decode-budget", "64tok"]
    with decoding(prompt, token, "--new-tokens", 4, "--json", json, *phase) as process:
        send = ["prefill", "--file", prompt, "--to", address_of(process), "--token-file", token]
        result = run(*send, "--policy", "raw", "--decode-policy", "h2o")
        assert result.exit_code == 0, result.output
        _, stderr = process.communicate(timeout=20)
    assert process.returncode == 0, stderr
    done = read_json(json)
    assert done["decode"] == "h2o@64tok" and done["fraction"] > 1  # raw, and the mass beside it


def test_a_wrong_token_is_refused_and_the_right_one_then_served(
    run: Run, prompt: Path, token: Path, tmp_path: Path
) -> None:
    wrong, json = tmp_path / "wrong", tmp_path / "decode.json"
    run("token", wrong)
    with decoding(prompt, token, "--new-tokens", 4, "--json", json) as process:
        to = address_of(process)
        send = ["prefill", "--file", prompt, "--to", to, "--budget", "40%"]
        refused = run(*send, "--token-file", wrong)
        assert refused.exit_code == 3
        assert "AuthenticationFailed: the receiver" in failure(refused)
        sent = run(*send, "--token-file", token, "--json", tmp_path / "prefill.json")
        assert sent.exit_code == 0, sent.output
        stdout, stderr = process.communicate(timeout=20)
    assert process.returncode == 0, stderr
    assert "refused: the sender does not hold our token" in stderr
    ours, theirs = read_json(tmp_path / "prefill.json"), read_json(json)
    assert (ours["kind"], theirs["kind"]) == ("prefill", "decode")
    assert ours["wire_bytes"] == theirs["wire_bytes"]
    assert ours["fraction"] == theirs["fraction"] <= 0.4
    assert ours["context_tokens"] == theirs["context_tokens"] == theirs["kept_tokens"] + 1
    assert stdout.endswith(theirs["text"] + "\n")


def test_decode_gives_up_when_nobody_comes(run: Run, prompt: Path, token: Path) -> None:
    result = run("decode", "--file", prompt, "--token-file", token, "--timeout", 0.2)
    assert result.exit_code == 3
    assert re.search(r"PeerSilent: nobody connected to 127\.0\.0\.1 port \d+", failure(result))


def test_a_port_that_is_taken_is_found_first(run: Run, prompt: Path, token: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        arguments = ["--file", prompt, "--token-file", token, "--port", port]
        result = run("decode", *arguments, "--model", "never-loaded")
    assert result.exit_code == 3
    assert f"AddressInUse: port {port} on 127.0.0.1 is taken" in failure(result)


def test_a_transport_that_is_none_is_named(run: Run, prompt: Path) -> None:
    result = run("run", "--file", prompt, "--policy", "raw", "--transport", "pigeon")
    assert result.exit_code == 2
    assert "unknown transport 'pigeon'; known: tcp, shm" in failure(result)


def test_prefill_notices_that_nobody_listens(run: Run, prompt: Path, token: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        to = format_address(*closed.getsockname())
    arguments = ["--file", prompt, "--to", to, "--token-file", token]
    result = run("prefill", *arguments, "--budget", "40%")
    assert result.exit_code == 3
    assert "PeerLost: cannot reach 127.0.0.1" in failure(result)


def test_prefill_notices_a_peer_that_says_nothing(run: Run, prompt: Path, token: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        to = format_address(*silent.getsockname())
        arguments = ["--file", prompt, "--to", to, "--token-file", token]
        result = run("prefill", *arguments, "--budget", "40%")
    assert result.exit_code == 3
    assert "PeerSilent: 127.0.0.1" in failure(result)


BAD_PREFILL: list[tuple[dict[str, Any], str]] = [
    (
        {"--to": "somewhere"},
        "'somewhere' is not an address such as 127.0.0.1:7000, [::1]:7000 or shm:7000",
    ),
    ({"--to": "8.8.8.8:7000"}, "is not a loopback address"),
    ({"--to": "127.0.0.1:99999"}, "port 99999 is not in [0, 65535]"),
    ({"--token-file": "missing"}, "token file missing cannot be read"),
    ({"--file": "missing"}, "cannot read missing as UTF-8 text"),
    ({"--budget": "1%"}, "budget too small for policy 'spectrum'"),
    ({"--importance": "luck"}, "unknown importance 'luck'"),
    ({"--model": "none-such"}, "unknown model 'none-such'"),
    ({"--profile": "missing"}, "profile missing cannot be read"),
    ({"--cache-dtype": "int3"}, "unknown cache dtype 'int3'"),
]


@pytest.mark.parametrize(
    ("which", "policy", "said"),
    [
        (None, "spectrum-conditioned", "ProfileMismatch: kvp.conditioned/1 needs the profile"),
        (None, "spectrum-adaptive", "ProfileMismatch: policy 'spectrum-adaptive' follows a probe"),
        (2, "spectrum", "ProfileMismatch: profile is for KV fingerprint abababab"),
    ],
)
def test_a_profile_that_does_not_serve_is_found_before_anything_is_sent(
    run: Run,
    prompt: Path,
    token: Path,
    profiles: tuple[Path, ...],
    which: int | None,
    policy: str,
    said: str,
) -> None:
    given = [] if which is None else ["--profile", profiles[which]]
    arguments = ["--file", prompt, "--to", "127.0.0.1:9", "--token-file", token, *given]
    result = run("prefill", *arguments, "--policy", policy, "--budget", "40%")
    assert result.exit_code != 0
    assert said in failure(result)


@pytest.mark.parametrize(("changed", "said"), BAD_PREFILL, ids=lambda each: str(each))
def test_bad_input_of_prefill_is_one_line(
    run: Run, prompt: Path, token: Path, changed: dict[str, Any], said: str
) -> None:
    options = {"--file": prompt, "--to": "127.0.0.1:9", "--token-file": token, "--budget": "40%"}
    options |= changed
    result = run("prefill", *(part for option in options.items() for part in option))
    assert result.exit_code == 2
    assert said in failure(result)


def test_prompts_that_do_not_fit_are_refused(
    run: Run, text: Path, token: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    arguments = ["--token-file", token, "--new-tokens", 4000]
    for file, said in [
        (tmp_path / "empty", "has 0 tokens, at least 2 are needed"),
        (tmp_path / "binary", "as UTF-8 text"),
        (text, "tiny takes at most 352 before 4000 new ones; --tokens takes the first ones"),
    ]:
        result = run("decode", "--file", file, *arguments)
        assert result.exit_code == 2
        assert said in failure(result)


def test_a_token_file_is_made_once_and_is_private(run: Run, token: Path) -> None:
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    result = run("token", token)
    assert result.exit_code == 2
    assert "exists already" in failure(result)


@pytest.mark.parametrize(
    "address", [("127.0.0.1", 7000), ("::1", 1), ("node-3.local", 65535), ("shm", 7)]
)
def test_addresses_are_read_as_they_are_written(address: tuple[str, int]) -> None:
    assert parse_address(format_address(*address)) == address


@pytest.mark.parametrize("text", ["", "host", ":7000", "host:", "host:port", "::1:7000", "a b:1"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="is not an address"):
        parse_address(text)
