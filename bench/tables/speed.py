"""The tables of docs/speed.md and docs/codec.md."""

import json
from collections.abc import Iterator
from itertools import groupby
from typing import Any

from bench.tables.cells import ROOT, Row, table, versions

SPEED = ROOT / "bench" / "speed"

# Of one thread on a cache of this many bytes or more, against a copy of the same bytes.
CODEC_GATES = {("encode", 4): 0.8, ("encode", 8): 0.6, ("decode", 4): 0.8, ("decode", 8): 0.8}
GATED_NBYTES = 2**28


def result(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((SPEED / f"{name}.json").read_text())
    return found


def speed(bits_per_s: float) -> str:
    return f"{bits_per_s / 1e9:.3g} Gbps"


def arm_of(row: Row) -> tuple[int, str, str, str]:
    return row["context"], row["policy"], str(row["budget"]), str(row["chunk"])


def arm_cells(row: Row) -> list[str]:
    how = "" if row["chunk"] is None else f", chunks of {row['chunk']}"
    name = f"`{row['policy']}`" + how + (", overlap" if row["overlap"] else "")
    return [name, "fixed" if row["budget"] is None else row["budget"]]


def measured_on(name: str) -> list[str]:
    """What rows of a bench were measured on, and whether anything else ran beside them."""
    found = result(name)
    row = found["rows"][0]
    busy = f"load {found['load']:.1f} on {found['processors']} cores when it ended"
    commit, _, dirty = found["commit"].partition("-")
    with_changes = " with changes" if dirty else ""
    lines = [
        f"Commit `{commit[:12]}`{with_changes}, {versions(found)}; {found['processor']}, {busy}."
    ]
    if "placement" in found:
        lines.append(
            f"Workers: {found['placement']}. Shaping: `{row['shaping']}`. Repeats: {row['n']}."
        )
    return lines


def ttft(name: str) -> list[str]:
    """Milliseconds of every phase, a table for each context and link."""
    times = ("prefill", "plan", "encode", "exposed", "decode", "ttft_p50", "ttft_p95", "ttft_iqr")
    heads = ["policy", "budget", "of 16-bit", "prefill", "plan", "encode", "exposed", "decode"]
    heads += ["TTFT p50", "p95", "IQR", "second token", "bound", "over it", "gain"]

    def line(row: Row) -> str:
        cells = [*arm_cells(row), f"{row['wire_bytes'] / row['reference_bytes']:.4f}"]
        cells += [f"{1e3 * row[f'{each}_s']:.1f}" for each in (*times, "second_token")]
        cells += [f"{1e3 * row['bound_s']:.1f}", f"{100 * row['over_bound']:+.0f} %"]
        cells.append(f"{100 * row['gain']:+.0f} %")
        return f"| {' | '.join(cells)} |"

    lines: list[str] = []
    for (context, link), own in groupby(
        result(name)["rows"], lambda row: (row["context"], row["link_bits_per_s"])
    ):
        lines += ["", f"{context} tokens, {speed(link)}, ms:", "", *table(heads, map(line, own))]
    return lines[1:]


def links() -> list[str]:
    """p50, what it gains over raw, and how far it is above its bound; a column a link."""
    found = sorted(result("ttft-links")["rows"], key=lambda row: row["context"])
    speeds = sorted({row["link_bits_per_s"] for row in found})

    def cell(row: Row) -> str:
        gain, over = 100 * row["gain"], 100 * row["over_bound"]
        return f"{1e3 * row['ttft_p50_s']:.0f} ({gain:+.0f}, {over:+.0f})"

    def lines() -> Iterator[str]:
        arms: dict[tuple[int, str, str, str], dict[int, Row]] = {}
        for row in found:
            arms.setdefault(arm_of(row), {})[row["link_bits_per_s"]] = row
        for own in arms.values():
            first = next(iter(own.values()))
            cells = [str(first["context"]), *arm_cells(first), *(cell(own[s]) for s in speeds)]
            yield f"| {' | '.join(cells)} |"

    return table(["tokens", "policy", "budget", *map(speed, speeds)], lines())


def break_even() -> list[str]:
    """Up to which link codec and planning pay, and on which links an arm was slower than raw."""
    heads = ["tokens", "policy", "budget", "codec alone", "codec and planning"]
    heads += ["planning / prefill", "slower than raw at"]

    def lines() -> Iterator[str]:
        rows = result("ttft-links")["rows"]
        found = [row for row in rows if row["break_even_bits_per_s"] is not None]
        for _, own in groupby(sorted(found, key=arm_of), arm_of):
            *_, last = same = list(own)
            slower = [speed(row["link_bits_per_s"]) for row in same if row["gain"] < 0]
            cells = [str(last["context"]), *arm_cells(last)]
            cells += [speed(last[f"break_even_{x}bits_per_s"]) for x in ("", "with_plan_")]
            cells += [f"{100 * last['plan_share']:.2f} %", ", ".join(slower) or "no link"]
            yield f"| {' | '.join(cells)} |"

    return table(heads, lines())


def modelled() -> list[str]:
    """TTFT in ms of large models by formula, a column a link."""
    found = result("ttft").get("modelled")
    if found is None:
        return ["Not in these rows: the bench ran without `--extrapolate`."]
    links = list(dict.fromkeys(row["link_bits_per_s"] for row in found))
    names = ("model", "context", "policy", "budget")
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in found:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    heads = ["model", "tokens", "policy", "budget", "prefill", *map(speed, links)]

    def lines() -> Iterator[str]:
        for (model, context, *_), own in groups.items():
            cells = [model, str(context), *arm_cells(own[0]), f"{1e3 * own[0]['prefill_s']:.0f}"]
            cells += [f"{1e3 * r['ttft_s']:.0f} ({100 * r['gain']:+.0f} %)" for r in own]
            yield f"| {' | '.join(cells)} |"

    return table(heads, lines())


def planning() -> list[str]:
    """Processor milliseconds of ranking and solving, and how they grow."""
    found = result("plan")["rows"]
    lengths = list(dict.fromkeys(row["tokens"] for row in found))
    heads = ["shape", "policy", *(f"{n} tokens" for n in lengths), "last step grows as tokens^"]

    def lines() -> Iterator[str]:
        for (shape, policy), own in groupby(found, lambda row: (row["shape"], row["policy"])):
            same = list(own)
            cells = [shape, f"`{policy}`", *(f"{1e3 * row['solve_cpu_s']:.1f}" for row in same)]
            cells.append(f"{same[-1]['exponent']:.2f}")
            yield f"| {' | '.join(cells)} |"

    return table(heads, lines())


def transport() -> list[str]:
    """Milliseconds of a raw request between two processes of one machine."""
    heads = ["transport", "bytes sent", "ms", "quartiles", "encode", "decode", "GB/s"]
    heads += ["times as fast as TCP", "a plain copy, ms"]

    def lines() -> Iterator[str]:
        for row in result("transport")["rows"]:
            cells = [f"`{row['transport']}`", f"{row['wire_bytes'] / 2**20:.1f} MiB"]
            low, high = row["seconds_quartiles"]
            cells += [f"{1e3 * row['seconds_p50']:.1f}", f"{1e3 * low:.1f} to {1e3 * high:.1f}"]
            cells += [f"{1e3 * row[f'{each}_s_p50']:.1f}" for each in ("encode", "decode")]
            low, high = row["times_tcp_quartiles"]
            cells += [f"{row['gb_per_s']:.2f}", f"{row['times_tcp']:.2f} [{low:.2f}, {high:.2f}]"]
            cells.append(f"{1e3 * row['memcpy_s_p50']:.1f}")
            yield f"| {' | '.join(cells)} |"

    return [*measured_on("transport"), "", *table(heads, lines())]


def codec() -> list[str]:
    """What `kvprism bench codec` found, a line a case."""
    found = result("codec")
    # Rows of before there were several codes name none.
    rows = [{"code": "nested", **row} for row in found["rows"]]

    def same(row: Row, **other: object) -> float | None:
        names = ("code", "raw_bytes", "direction", "bits", "dtype", "backend", "threads")
        wanted = {name: row[name] for name in names} | other
        matching = [r for r in rows if wanted.items() <= r.items()]
        return matching[0]["seconds_p50"] if matching else None

    def gate(row: Row) -> str:
        case = row["code"], row["backend"], row["threads"]
        if case != ("nested", "cpu", 1) or row["raw_bytes"] < GATED_NBYTES:
            return ""
        least = CODEC_GATES[row["direction"], row["bits"]]
        return f"≥ {least}, {'held' if row['ratio_to_memcpy'] >= least else 'not held'}"

    def name(row: Row) -> str:
        nested = row["code"] == "nested"
        return f"INT{row['bits']}" if nested else f"`{row['code']}` {row['bits']} bits"

    def times(slower: float | None, row: Row) -> str:
        return "" if slower is None else f"{slower / row['seconds_p50']:.1f}"

    heads = ["MiB", "", "codec", "threads", "GB/s", "memcpy GB/s", "of memcpy [quartiles]", "gate"]
    heads += ["of roofline", "× torch", "× 1 thread"]
    lines = (
        f"| {row['raw_bytes'] // 2**20} | {row['direction']} {name(row)} | {row['backend']} "
        f"| {row['threads']} | {row['gb_per_s']:.2f} | {row['memcpy_gb_per_s']:.2f} "
        f"| {row['ratio_to_memcpy']:.2f} [{', '.join(f'{q:.2f}' for q in row['ratio_quartiles'])}] "
        f"| {gate(row)} | {row['roofline_share']:.2f} "
        f"| {times(same(row, backend='reference'), row)} | {times(same(row, threads=1), row)} |"
        for row in rows
    )
    row = rows[0]
    made_by = (
        f"{row['dtype']}, rows of {row['channels']}; commit `{found['commit'][:12]}` on "
        f"{found['date']}: {versions(found)}; {found['processor']}, {found['processors']} "
        f"processors, load {found['load']:.1f}."
    )
    return [*table(heads, lines), "", made_by]
