"""`kvprism bench ttft`: time to first token over a shaped link, phase by phase."""

from dataclasses import asdict
from statistics import median
from typing import Any

from kvprism.codec.backend import REFERENCE
from kvprism.commands import console
from kvprism.commands.bench import DECODE, ENCODE, run_bench, with_provenance
from kvprism.commands.dry_run import link_bytes_per_s
from kvprism.errors import UnknownName
from kvprism.evaluate.links import SHAPINGS, shaped_link
from kvprism.evaluate.ttft import (
    DEFINITIONS,
    Case,
    Row,
    places,
    raw_equals_prefill_bits_per_s,
    run_ttft,
)
from kvprism.evaluate.ttft_model import Rates, modelled
from kvprism.integrations import hf
from kvprism.integrations.worker import worker_pair

Result = dict[str, Any]
PLAN_SHARE = 0.05
EQUAL = "prefill"  # the link on which raw transfer takes as long as a prefill
CODEC_MIB, CODEC_REPEATS = 64, 15


def bench_ttft(
    model: str,
    contexts: list[int],
    policies: str,
    budgets: str,
    links: str,
    *,
    repeats: int,
    shaping: str,
    pin: bool,
    extrapolate: bool,
    chunk: int | None = None,
) -> Result:
    """Measure every context, link, policy and budget; what was measured, and on what.

    chunk: as `Case` has it.

    Raises:
        UnknownName: no such model, policy or shaping.
        BadInput: a budget, link or context that is none; BudgetTooSmall: nothing legal fits.
        Unsupported: shaping `tc` where it does not work.
    """
    if shaping not in SHAPINGS:
        raise UnknownName("shaping", shaping, list(SHAPINGS))
    config = hf.load_config(model)
    rates = tuple(
        None if link.strip() == EQUAL else round(8 * link_bytes_per_s(link))
        for link in links.split(",")
    )
    cases = [
        Case(
            context,
            tuple(policies.split(",")),
            tuple(budgets.split(",")),
            rates,
            repeats,
            chunk=chunk,
        )
        for context in contexts
    ]
    for case in cases:
        hf.shape_of(config, case.context)
    rows: list[Row] = []
    with shaped_link(shaping) as link:
        where, placement = places(link, pin)
        if link.shaping != shaping:
            console.note(f"shaping: {link.shaping}")
        console.note(f"workers: {placement}")
        with worker_pair(model, places=where) as pair:
            with console.status("starting a prefill and a decode worker"):
                pair.ready()
            for case in cases:
                with console.progress(f"requests of {case.context} tokens") as advance:
                    rows += run_ttft(pair, link, config.vocab_size, case, advance)
    result = with_provenance([{"model": model, **row} for row in rows])
    result |= {"placement": placement, "definitions": DEFINITIONS}
    if extrapolate:
        longest = [row for row in rows if row["context"] == max(contexts)]
        codec = codec_rates()
        result |= {"codec_rates": asdict(codec), "modelled": modelled(longest, codec)}
    return result


def codec_rates() -> Rates:
    """Of one core on a buffer far larger than its caches; the slower of INT8 and INT4."""
    with console.progress("codec") as advance:
        rows = run_bench([CODEC_MIB], [1], "bfloat16", 128, CODEC_REPEATS, advance)
    best = (
        rows
        if all(r["backend"] == REFERENCE for r in rows)
        else [row for row in rows if row["backend"] != REFERENCE]
    )
    encode, decode = (
        min(1e9 * row["gb_per_s"] for row in best if row["direction"] == direction)
        for direction in (ENCODE, DECODE)
    )
    return Rates(encode, decode, 1e9 * median(row["memcpy_gb_per_s"] for row in best))


def show_ttft(result: Result) -> None:
    """Print a table for each context and link, then what they mean."""
    rows: list[Row] = result["rows"]
    for context, link in dict.fromkeys((row["context"], row["link_bits_per_s"]) for row in rows):
        own = [r for r in rows if (r["context"], r["link_bits_per_s"]) == (context, link)]
        title = f"{context} tokens over {_speed(link)} ({own[0]['shaping']}), ms"
        columns = ["", "of 16-bit", "prefill", "plan", "encode", "exposed", "decode"]
        columns += ["TTFT p50", "p95", "second", "bound", "over it", "gain"]
        console.table(title, columns, map(_cells, own))
    for context in dict.fromkeys(row["context"] for row in rows):
        _show_findings([row for row in rows if row["context"] == context])


def _cells(row: Row) -> list[str]:
    times = ("prefill", "plan", "encode", "exposed", "decode", "ttft_p50", "ttft_p95")
    return [
        _name(row) + (" (overlap)" if row["overlap"] else ""),
        f"{row['wire_bytes'] / row['reference_bytes']:.4f}",
        *(f"{1e3 * row[f'{each}_s']:.1f}" for each in times),
        f"{1e3 * row['second_token_s']:.1f}",
        f"{1e3 * row['bound_s']:.1f}",
        f"{100 * row['over_bound']:+.0f} %",
        f"{100 * row['gain']:+.0f} %",
    ]


def _show_findings(rows: list[Row]) -> None:
    context = rows[0]["context"]
    equal = raw_equals_prefill_bits_per_s(rows)
    console.say(f"{context} tokens: raw transfer takes as long as the prefill at {_speed(equal)}")
    worst = max(rows, key=lambda row: row["plan_share"])
    console.say(
        f"planning: at most {100 * worst['plan_share']:.1f} % of the prefill ({worst['policy']}; "
        f"the limit is {100 * PLAN_SHARE:.0f} %)"
    )
    for name in dict.fromkeys(map(_name, rows)):
        own = [row for row in rows if _name(row) == name]
        even = own[-1]["break_even_with_plan_bits_per_s"]
        if even is None:
            continue
        loses = [_speed(row["link_bits_per_s"]) for row in own if row["gain"] < 0]
        console.say(
            f"{name}: codec and planning break even at {_speed(even)}; measured slower than raw "
            f"at {', '.join(loses) or 'no link'}"
        )


def _name(row: Row) -> str:
    budget = "" if row["budget"] is None else f" {row['budget']}"
    chunks = "" if row["chunk"] is None else f", chunks of {row['chunk']}"
    return f"{row['policy']}{budget}{chunks}"


def _speed(bits_per_s: float) -> str:
    return f"{bits_per_s / 1e9:.3g} Gbps"
