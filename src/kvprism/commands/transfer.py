"""`kvprism run`, `prefill`, `decode`: a prompt prefilled in one process and continued in another.

`run` starts both processes; `prefill` and `decode` are one each, for two terminals or two machines,
where both sides are given the prompt and only the cache crosses the wire.
"""

import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kvprism.codec import backend
from kvprism.commands import console
from kvprism.commands.dry_run import plan_in_chunks, plan_without_prompt
from kvprism.errors import AuthenticationFailed, BadInput, Unsupported
from kvprism.evaluate.texts import read_text
from kvprism.integrations import hf
from kvprism.integrations.decode_role import DecodeWorker
from kvprism.integrations.definitions import DEFINITIONS, ttft_ms
from kvprism.integrations.prefill_role import PrefillWorker
from kvprism.integrations.worker import Pair
from kvprism.planning import PlanOptions, code_of
from kvprism.policies import signals_of
from kvprism.profiles import Profile
from kvprism.retention import Retention, needs_mass
from kvprism.routes import FULL
from kvprism.transport import addresses
from kvprism.transport.token import load_token

Say = Callable[[str], None]
Result = dict[str, Any]
TIMINGS = {
    "run": ("prefill", "plan", "encode", "transfer", "decode", "first_token", "ttft"),
    "prefill": ("prefill", "plan", "encode", "transfer"),
    "decode": ("receive", "decode", "first_token"),
}


def read_prompt(model: str, file: Path, tokens: int | None, new_tokens: int = 0) -> list[int]:
    """The file's token ids, the first `tokens` of them if that is given.

    Raises:
        UnknownName: no such model.
        BadInput: unreadable, empty, or longer than the model's context leaves room for.
    """
    text = read_text(file)
    ids: list[int] = hf.load_tokenizer(model)(text, verbose=False)["input_ids"][:tokens]
    longest = hf.load_config(model).max_position_embeddings - new_tokens
    if len(ids) < 2:
        raise BadInput(f"{file} has {len(ids)} tokens, at least 2 are needed")
    if len(ids) > longest:
        raise BadInput(
            f"{file} has {len(ids)} tokens, {model} takes at most {longest} before {new_tokens} "
            "new ones; --tokens takes the first ones, --new-tokens leaves more room"
        )
    return ids


def _check_plan(
    model: str,
    ids: list[int],
    policy: str,
    budget: str | None,
    options: Mapping[str, Any],
    profile: Profile | None,
    chunk: int | None,
) -> None:
    """Every error that needs no weights, before minutes of work."""
    shape, given = hf.shape_of(hf.load_config(model), len(ids) - 1), PlanOptions(**options)
    if chunk is not None:
        plan_in_chunks(shape, policy, budget, given, profile, chunk)
        return
    code_of(shape, policy, given, profile)
    plan_without_prompt(shape, policy, budget, given, profile)


def load_profile(path: Path | None) -> Profile | None:
    """The profile, if one is named; errors as `Profile.load`."""
    return None if path is None else Profile.load(path)


def run_file(
    pair: Pair,
    model: str,
    file: Path,
    policy: str,
    budget: str | None,
    options: Mapping[str, Any],
    *,
    tokens: int | None,
    new_tokens: int,
    save: Path | None,
    say: Say,
    profile: Path | None = None,
    chunk: int | None = None,
) -> Result:
    """Prefill a text in one process, send it under one policy, and continue it in the other.

    pair: two workers that may still be loading `model`, and the same `profile`; chunk: prefill so
    many tokens at a time, and send them while the next are computed.

    Raises:
        BadInput: see `read_prompt` and `plan_without_prompt`.
        ProfileMismatch: a profile of another model, or one that lacks what the policy needs.
        PeerLost, PeerSilent: a worker died, or stands still.
    """
    ids = read_prompt(model, file, tokens, new_tokens)
    shared = load_profile(profile)
    _check_plan(model, ids, policy, budget, options, shared, chunk)
    pair.ready()
    plan = {"policy": policy, "budget": budget, "options": options}
    say("prefilling")
    if chunk is not None:
        result = pair.transfer("send_chunks", ids=ids, chunk=chunk, **plan)
    else:
        signals = sorted(signals_of([policy], shared))
        result = pair.call(pair.prefill, "prefill", ids=ids, signals=signals)
        say("sending")
        result |= pair.call(pair.prefill, "plan", **plan)
    if save is not None:
        pair.call(pair.prefill, "save", path=str(save))
    if chunk is None:
        result |= pair.transfer()
    say("continuing")
    result |= pair.call(pair.decode, "generate", ids=ids, n=new_tokens)
    result["ttft_ms"] = ttft_ms(result)
    settings = {"policy": policy, "budget": budget, "profile": _hash(shared), **options}
    return _described("run", model, file, ids, settings, result)


def prefill_here(
    model: str,
    file: Path,
    to: str,
    token_file: Path,
    policy: str,
    budget: str | None,
    options: Mapping[str, Any],
    *,
    tokens: int | None,
    cache_dtype: str,
    allow_remote: bool,
    say: Say,
    profile: Path | None = None,
    decode_policy: str = FULL,
    chunk: int | None = None,
) -> Result:
    """Connect to a decode side, prefill a text here, and send its cache there.

    decode_policy: the decode side's, which may go on with the attention mass of the prompt; chunk:
    prefill so many tokens at a time, and send them while the next are computed.

    Raises:
        BadInput: see `read_prompt` and `plan_without_prompt`; a bad address or token file.
        TransportError: nobody listens there, or it does not hold our token, or it went away.
        ProfileMismatch: a profile of another model, or one that lacks what the policy needs.
        Rejected: the other side runs another model, or has another profile.
        CodecError: only the slow codec is there, and it was not asked for.
    """
    backend.refuse_slow()
    address, token, shared = parse_address(to), load_token(token_file), load_profile(profile)
    mass = needs_mass(decode_policy)
    if mass and chunk is not None:
        raise Unsupported(
            f"decode policy {decode_policy!r} goes on with the attention of all queries, which is "
            "not recorded in chunks; leave out --chunk"
        )
    ids = read_prompt(model, file, tokens)
    _check_plan(model, ids, policy, budget, options, shared, chunk)
    worker = PrefillWorker(model, token, cache_dtype, shared)
    say(f"connecting to {to}")
    with worker.connect(*address, allow_remote) as sender:
        say("prefilling")
        if chunk is not None:
            result = worker.send_chunks_over(sender, ids, policy, budget, chunk, options)
        else:
            result = worker.prefill(ids, sorted(signals_of([policy], shared)), mass)
            say("sending")
            result |= worker.plan(policy, budget, options, sender.capability)
            result |= worker.send_over(sender)
    settings = {"policy": policy, "budget": budget, "profile": _hash(shared), **options, "to": to}
    settings["decode_policy"] = decode_policy
    return _described("prefill", model, file, ids, settings, result)


def decode_here(
    model: str,
    file: Path,
    token_file: Path,
    *,
    host: str,
    port: int,
    tokens: int | None,
    new_tokens: int,
    timeout_s: float,
    allow_remote: bool,
    say: Say,
    profile: Path | None = None,
    decode_policy: str = FULL,
    decode_budget: str | None = None,
) -> Result:
    """Listen, take the prompt's cache from a prefill side, and continue it here.

    Raises:
        BadInput: see `read_prompt`; a bad token file, an address off loopback.
        AddressInUse: the port is taken.
        PeerSilent, PeerLost: no cache came in time, or the other side went away in the middle.
        PositionMismatch: the cache is of a longer or a shorter prompt.
        ProfileMismatch: a profile of another model.
        CodecError: only the slow codec is there, and it was not asked for.
    """
    backend.refuse_slow()
    token, shared = load_token(token_file), load_profile(profile)
    retention = Retention.parse(decode_policy, decode_budget)
    with addresses.listen(host, port, allow_remote=allow_remote):
        pass  # a port that is taken is found before the model is loaded
    ids = read_prompt(model, file, tokens, new_tokens)
    at: dict[str, Any] = {"host": host, "port": port, "allow_remote": allow_remote}
    with DecodeWorker(model, token, profile=shared, decode=retention, **at) as worker:
        address = format_address(*worker.address())
        console.say(f"listening on {address}")
        say("waiting for a cache")
        result = _receive(worker, timeout_s, len(ids))
        say("continuing")
        result |= worker.generate(ids, new_tokens)
    settings = {"address": address, "profile": _hash(shared), "decode": str(retention)}
    return _described("decode", model, file, ids, settings, result)


def _receive(worker: DecodeWorker, timeout_s: float, n_prompt: int) -> Result:
    """Whoever does not hold the token is refused, and does not end the wait for who does."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return worker.receive(max(0.0, deadline - time.monotonic()), n_prompt)
        except AuthenticationFailed as error:
            console.note(f"refused: {error}")


def parse_address(text: str) -> tuple[str, int]:
    """Host and port.

    Example:
        >>> parse_address("127.0.0.1:7000"), parse_address("[::1]:7000"), parse_address("shm:7000")
        (('127.0.0.1', 7000), ('::1', 7000), ('shm', 7000))

    Raises:
        BadInput: anything else.
    """
    match = re.fullmatch(r"(?:\[([0-9a-fA-F:.%\w]+)\]|([^:\[\]\s]+)):([0-9]{1,5})", text)
    if match is None:
        raise BadInput(f"{text!r} is not an address such as 127.0.0.1:7000, [::1]:7000 or shm:7000")
    return match[1] or match[2], int(match[3])


def format_address(host: str, port: int) -> str:
    """What `parse_address` reads."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _hash(profile: Profile | None) -> str | None:
    return None if profile is None else profile.hash.hex()


def _described(
    kind: str, model: str, file: Path, ids: list[int], settings: Result, result: Result
) -> Result:
    head = {"kind": kind, "model": model, "file": str(file), **settings}
    whole = {**head, "context_tokens": len(ids), **result}
    return {**whole, "definitions": {k: v for k, v in DEFINITIONS.items() if k in whole}}


def show_transfer(result: Result) -> None:
    """Print what one side, or both, did with one request."""
    names = TIMINGS[result["kind"]]
    columns = ["wire bytes", "of 16-bit", *console.timing_columns(names)]
    sizes = [console.size(result["wire_bytes"]), console.percent(result["fraction"])]
    row = [*sizes, *console.timings(names, result)]
    subject = f"{result['policy']}, " if "policy" in result else ""
    title = f"{subject}{result['context_tokens']} tokens on {result['model']}"
    console.table(f"{title}: one cold request, times in milliseconds", columns, [row])
    if "tiers" in result:
        tiers = ", ".join(f"{count} {name}" for name, count in result["tiers"].items() if count)
        console.say(f"tokens: {tiers}")
    elif result["kept_tokens"] < result["context_tokens"] - 1:
        console.say(f"tokens: {result['kept_tokens']} kept, the others were dropped")
    if "text" in result:
        console.say("the decode side goes on with:")
        console.say(result["text"])
