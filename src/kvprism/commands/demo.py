"""`kvprism demo`: a prefill and a decode process, and what each policy sends and keeps."""

import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import msgspec
import numpy as np

from kvprism.commands import console
from kvprism.errors import BadInput, BudgetTooSmall
from kvprism.evaluate.haystack import Facts, hide_facts
from kvprism.evaluate.rows import provenance
from kvprism.integrations import hf
from kvprism.integrations.definitions import DEFINITIONS, ttft_ms
from kvprism.integrations.worker import Pair

REPEATS = 5
CONTINUATION = 128
FACTS = 4
ANSWER_TOKENS = 8
SIZES = ("wire_bytes", "fraction", "fraction_native", "resident_bytes", "tiers", "tier_of_token")
SHOWN_TIMINGS = ("prefill", "plan", "encode", "transfer", "decode", "first_token", "ttft")
TIMINGS = ("plan_ms", "encode_ms", "transfer_ms", "decode_ms")


class Arm(NamedTuple):
    """A line of the comparison."""

    label: str
    policy: str
    budget: str | None = None


ARMS = (
    Arm("raw", "raw"),
    Arm("INT8", "int8"),
    Arm("SpectrumKV 52 %", "spectrum", "52%"),
    Arm("SpectrumKV 30 %", "spectrum", "30%"),
    Arm("sinks + recent 30 %", "sinks-recent", "30%"),
    Arm("PDTrim 30 %", "pdtrim", "30%"),
)
NOTES = {
    "repeats": f"every *_ms is the median of {REPEATS} runs after one that is not counted; "
    f"first_token_ms and second_token_ms of the {FACTS} questions",
    "answers": f"asked after the transfer, each on a fresh restored cache, {ANSWER_TOKENS} greedy "
    "tokens; right: they begin with the hidden number",
    "kl_to_raw": f"mean KL(raw || arm) in nats per token over {CONTINUATION} tokens that the model "
    "drew from the raw cache",
}


def run_demo(
    pair: Pair, model: str, context: int, seed: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Hide facts in a long text, prefill it, and send its cache under every policy.

    pair: two workers that may still be loading `model`.

    Raises:
        UnknownName: no such model.
        BadInput: a context that is too short for the facts, or too long for the model.
        PeerLost, PeerSilent: a worker died, or stands still.
    """
    facts, prompt = _facts(model, context, seed)
    pair.ready()
    described = _describe(model, pair)
    say("prefilling")
    prefilled = _prefill(pair, facts.context_ids.tolist())
    arms, continuation = [], list[int]()
    for arm in ARMS:
        say(f"sending and asking: {arm.label}")
        arms.append(_measured(pair, arm, facts, prefilled["prefill_ms"], continuation, seed))
    return {
        "kind": "demo",
        "model": described,
        "context_tokens": len(prompt),
        "reference_bytes": prefilled["reference_bytes"],
        "native_bytes": prefilled["native_bytes"],
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **msgspec.to_builtins(provenance()),
        "seed": seed,
        "seconds": time.monotonic() - pair.started,
        "definitions": {**DEFINITIONS, **NOTES},
        "prompt": prompt,
        "needles": [
            {key: getattr(needle, key) for key in ("key", "value", "start", "stop", "line")}
            for needle in facts.needles
        ],
        "arms": arms,
    }


def _facts(model: str, context: int, seed: int) -> tuple[Facts, list[str]]:
    """The text with its facts, and its tokens as they are written."""
    longest = hf.load_config(model).max_position_embeddings - CONTINUATION
    if context > longest:
        raise BadInput(f"context {context}: {model} takes at most {longest} here")
    tokenizer = hf.load_tokenizer(model)
    facts = hide_facts(tokenizer, context, FACTS, seed)
    return facts, [str(tokenizer.decode([token])) for token in facts.context_ids.tolist()]


def _describe(name: str, pair: Pair) -> dict[str, Any]:
    config = hf.load_config(name)
    layer = hf.shape_of(config, 1).layers[0]
    return {
        "name": name,
        "architecture": hf.architecture_of(config),
        "layers": config.num_hidden_layers,
        "kv_heads": layer.components[0].heads,
        "head_dim": layer.components[0].channels,
        **pair.call(pair.prefill, "describe"),
    }


def _prefill(pair: Pair, ids: list[int]) -> dict[str, Any]:
    runs = [pair.call(pair.prefill, "prefill", ids=ids) for _ in range(1 + REPEATS)]
    return {**runs[-1], "prefill_ms": _median(runs[1:], "prefill_ms")}


def _measured(
    pair: Pair, arm: Arm, facts: Facts, prefill_ms: float, continuation: list[int], seed: int
) -> dict[str, Any]:
    """One arm, or why there is none; raw comes first and draws the `continuation`."""
    plan = {"policy": arm.policy, "budget": arm.budget}
    try:
        runs = [
            {**pair.call(pair.prefill, "plan", **plan), **pair.transfer()}
            for _ in range(1 + REPEATS)
        ]
    except BudgetTooSmall as error:
        return {**arm._asdict(), "error": str(error)}
    ids = facts.context_ids.tolist()
    if not continuation:
        continuation += pair.call(pair.decode, "sample", ids=ids, n=CONTINUATION, seed=seed)
    answers, steps = _ask(pair, facts)
    timings = {"prefill_ms": prefill_ms, **{name: _median(runs[1:], name) for name in TIMINGS}}
    timings |= {name: _median(steps, name) for name in ("first_token_ms", "second_token_ms")}
    fed = ids + continuation
    return {
        **arm._asdict(),
        **{key: runs[0][key] for key in SIZES},
        **timings,
        "ttft_ms": ttft_ms(timings),
        "answers_right": sum(answer["right"] for answer in answers),
        "answers_total": len(answers),
        "answers": answers,
        "kl_to_raw": pair.call(pair.decode, "kl_to_raw", ids=fed, raw=arm.policy == "raw"),
    }


def _ask(pair: Pair, facts: Facts) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Every question on the restored cache: the answers, and how long their tokens took."""
    answers, steps = [], []
    generate = partial(pair.call, pair.decode, "generate", ignore_eos=True)
    questions = [np.r_[facts.context_ids, needle.question_ids].tolist() for needle in facts.needles]
    generate(ids=questions[0], n=ANSWER_TOKENS)  # not counted
    for needle, question in zip(facts.needles, questions, strict=True):
        said = generate(ids=question, n=ANSWER_TOKENS)
        got = said["text"].strip()
        right = got.startswith(needle.value)
        answers.append(
            {"question": needle.question, "expected": needle.value, "got": got, "right": right}
        )
        steps.append(said)
    return answers, steps


def _median(runs: list[dict[str, Any]], name: str) -> float:
    return statistics.median(float(run[name]) for run in runs)


def show_demo(result: dict[str, Any]) -> None:
    """Print what was sent, what it kept, and how long it took."""
    measured = [arm for arm in result["arms"] if "error" not in arm]
    rows = [
        [
            arm["label"],
            console.size(arm["wire_bytes"]),
            console.percent(arm["fraction"]),
            f"{arm['answers_right']} of {arm['answers_total']}",
            f"{arm['kl_to_raw']:.2g}",
            console.size(arm["resident_bytes"]),
        ]
        for arm in measured
    ]
    title = f"{result['context_tokens']} tokens on {result['model']['name']}: what is sent and kept"
    columns = ["arm", "wire bytes", "of 16-bit", "answers right", "KL to raw", "in memory"]
    console.table(title, columns, rows)
    rows = [[arm["label"], *console.timings(SHOWN_TIMINGS, arm)] for arm in measured]
    columns = ["arm", *console.timing_columns(SHOWN_TIMINGS)]
    console.table("milliseconds, medians of warm runs, loopback TCP", columns, rows)
    for arm in result["arms"]:
        if "error" in arm:
            console.say(f"{arm['label']}: {arm['error']}")
    console.say(
        "Decoding goes on while layers are encoded and moved: it lies within encode + transfer.\n"
        f"Two processes on one machine, {result['seconds']:.0f} s in all."
    )
