"""`kvprism demo` and `kvprism run`: a prefill and a decode process, and what each policy sends."""

import datetime
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from kvprism.commands import console
from kvprism.errors import BadInput
from kvprism.evaluate.haystack import Facts, hide_facts
from kvprism.evaluate.rows import provenance
from kvprism.integrations import hf
from kvprism.integrations.worker import Worker
from kvprism.transport.token import create_token

REPEATS = 3
CONTINUATION = 128
FACTS = 4
ANSWER_TOKENS = 8

DEMO_ARMS: tuple[tuple[str, str, str | None], ...] = (
    ("raw", "raw", None),
    ("INT8", "int8", None),
    ("SpectrumKV 52 %", "spectrum", "52%"),
    ("SpectrumKV 30 %", "spectrum", "30%"),
    ("sinks + recent 30 %", "sinks-recent", "30%"),
    ("PDTrim 30 %", "pdtrim", "30%"),
)


@dataclass(frozen=True)
class Pair:
    """A prefill and a decode worker that know each other's address and token."""

    prefill: Worker
    decode: Worker
    address: list[Any]

    def transfer(
        self,
        policy: str,
        budget: str | None,
        options: Mapping[str, Any] | None = None,
        save: Path | None = None,
    ) -> dict[str, Any]:
        """Send what was prefilled and restore it; the timings of both sides."""
        self.decode.start("receive")
        sent = self.prefill.call(
            "send",
            policy=policy,
            budget=budget,
            address=self.address,
            options=dict(options or {}),
            save=None if save is None else str(save),
        )
        received = self.decode.wait()
        # From the offer to the acknowledgement, less encode: the receiver decodes within it.
        return {**sent, **received, "transfer_ms": sent["send_ms"] - sent["encode_ms"]}


@contextmanager
def worker_pair(model: str) -> Iterator[Pair]:
    """Start both workers side by side, with a token of their own in a 0600 file."""
    with tempfile.TemporaryDirectory(prefix="kvprism-") as folder:
        token_file = Path(folder) / "token"
        create_token(token_file)
        with Worker("prefill", model, token_file) as p, Worker("decode", model, token_file) as d:
            p.ready()
            d.ready()
            yield Pair(p, d, d.call("address")["address"])


def run_demo(model: str, context: int, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Hide facts in a long text, prefill it once, and send it once per arm.

    Timings are medians of `REPEATS` warm transfers. Answers are really generated, greedily; KL to
    raw is the mean over `CONTINUATION` tokens drawn from the model at 16 bits.
    """
    started = time.perf_counter()
    tokenizer = hf.load_tokenizer(model)
    facts = hide_facts(tokenizer, context, FACTS, seed)
    ids = facts.context_ids.tolist()
    with worker_pair(model) as pair:
        say("prefilling")
        pair.prefill.call("prefill", ids=ids[:-1])  # warm-up: the first call is never typical
        prefilled = pair.prefill.call("prefill", ids=ids[:-1])
        pair.transfer("raw", None)
        continuation = pair.decode.call("sample", ids=ids, n=CONTINUATION, seed=seed)["tokens"]
        arms = []
        for label, policy, budget in DEMO_ARMS:
            say(f"sending: {label}")
            arm = _arm(pair, facts, continuation, policy, budget, prefilled["prefill_ms"])
            arms.append({"label": label, **arm})
    return {
        "kind": "demo",
        "model": _describe(model),
        "context_tokens": len(ids),
        "reference_bytes": prefilled["reference_bytes"],
        "native_bytes": prefilled["native_bytes"],
        "machine": _machine(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **msgspec.to_builtins(provenance()),
        "seconds": time.perf_counter() - started,
        "prompt": [tokenizer.decode([token]) for token in ids],
        "needles": [
            {key: getattr(needle, key) for key in ("key", "value", "start", "stop", "line")}
            for needle in facts.needles
        ],
        "arms": arms,
    }


def _describe(name: str) -> dict[str, Any]:
    config = hf.load_config(name)
    layer = hf.shape_of(config, 1).layers[0]
    return {
        "name": name,
        "architecture": hf.architecture_of(config),
        "layers": config.num_hidden_layers,
        "kv_heads": layer.components[0].heads,
        "head_dim": layer.components[0].channels,
    }


def _machine() -> str:
    return f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}"


def _arm(
    pair: Pair,
    facts: Facts,
    continuation: list[int],
    policy: str,
    budget: str | None,
    prefill_ms: float,
) -> dict[str, Any]:
    ids = facts.context_ids.tolist()
    runs = [pair.transfer(policy, budget) for _ in range(REPEATS)]
    timings = {
        name: statistics.median(run[name] for run in runs)
        for name in ("plan_ms", "encode_ms", "transfer_ms", "decode_ms")
    }
    timings["prefill_ms"] = prefill_ms
    scored = pair.decode.call("score", ids=ids + continuation, name="kl", raw=policy == "raw")
    answers, first, second = [], [], []
    for needle in facts.needles:
        question = ids + needle.question_ids.tolist()
        generated = pair.decode.call("generate", ids=question, n=ANSWER_TOKENS)
        got = generated["text"].strip()
        answers.append(
            {
                "question": needle.question,
                "expected": needle.value,
                "got": got,
                "right": got.startswith(needle.value),
            }
        )
        first.append(generated["steps_ms"][0])
        second.append(generated["steps_ms"][1])
    keys = ("wire_bytes", "fraction", "fraction_native", "resident_bytes", "tiers", "tier_of_token")
    return {
        "policy": policy,
        "budget": budget,
        **{key: runs[0][key] for key in keys},
        **timings,
        "first_token_ms": statistics.median(first),
        "ttft_ms": sum(timings.values()) - timings["decode_ms"] + statistics.median(first),
        "second_token_ms": statistics.median(second),
        "answers_right": sum(answer["right"] for answer in answers),
        "answers_total": len(answers),
        "answers": answers,
        "kl_to_raw": statistics.fmean(scored["kl"]),
    }


def show_demo(result: dict[str, Any]) -> None:
    """Print the comparison."""
    columns = ["arm", "wire", "of 16-bit", "answers", "KL to raw", "prefill ms", "plan", "encode"]
    columns += ["transfer", "(decode)", "first token", "TTFT"]
    timings = ("prefill_ms", "plan_ms", "encode_ms", "transfer_ms", "decode_ms", "first_token_ms")
    timings += ("ttft_ms",)
    rows = [
        [
            arm["label"],
            console.size(arm["wire_bytes"]),
            console.percent(arm["fraction"]),
            f"{arm['answers_right']}/{arm['answers_total']}",
            f"{arm['kl_to_raw']:.2g}",
            *(console.ms(arm[name]) for name in timings),
        ]
        for arm in result["arms"]
    ]
    title = f"{result['context_tokens']} tokens on {result['model']['name']}, loopback TCP"
    console.table(title, columns, rows)
    console.out.print(
        f"Two processes, one machine: {result['seconds']:.0f} s. Every wire byte is counted: payload, "
        "scales, tier maps, manifests, digests, padding."
    )


def run_file(
    model: str,
    file: Path,
    policy: str,
    budget: str | None,
    options: Mapping[str, Any],
    tokens: int | None,
    new_tokens: int,
    save: Path | None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Prefill a text here, send it under one policy, and continue it in the other process.

    Raises:
        BadInput: the file cannot be read or is longer than the model's context.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read {file} as UTF-8 text: {error}") from error
    ids = list(hf.load_tokenizer(model)(text)["input_ids"])[:tokens]
    longest = hf.load_config(model).max_position_embeddings - new_tokens
    if not 2 <= len(ids) <= longest:
        raise BadInput(
            f"{file} has {len(ids)} tokens, {model} takes 2 to {longest} before {new_tokens} new ones; "
            f"use --tokens {longest} to take the first ones"
        )
    with worker_pair(model) as pair:
        say("prefilling")
        prefilled = pair.prefill.call("prefill", ids=ids[:-1])
        say("sending")
        moved = pair.transfer(policy, budget, options, save)
        say("continuing")
        generated = pair.decode.call("generate", ids=ids, n=new_tokens)
    del moved["tier_of_token"]
    return {
        "kind": "run",
        "model": model,
        "file": str(file),
        "policy": policy,
        "budget": budget,
        **options,
        "context_tokens": len(ids),
        **prefilled,
        **moved,
        "first_token_ms": generated["steps_ms"][0],
        "second_token_ms": generated["steps_ms"][1] if new_tokens > 1 else None,
        "text": generated["text"],
    }


def show_run(result: dict[str, Any]) -> None:
    """Print what one request sent and how it went on."""
    names = ("prefill_ms", "plan_ms", "encode_ms", "transfer_ms", "decode_ms", "first_token_ms")
    columns = ["policy", "wire", "of 16-bit", *(name.removesuffix("_ms") + " ms" for name in names)]
    row = [
        result["policy"],
        console.size(result["wire_bytes"]),
        console.percent(result["fraction"]),
        *(console.ms(result[name]) for name in names),
    ]
    console.table(f"{result['context_tokens']} tokens on {result['model']}", columns, [row])
    tiers = ", ".join(f"{count} {name}" for name, count in result["tiers"].items() if count)
    console.out.print(f"tokens: {tiers}")
    console.out.print("the decode process goes on with:")
    console.out.print(result["text"], markup=False)
