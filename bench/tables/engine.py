"""The tables of docs/vllm.md."""

import json
from collections import Counter
from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np

from bench.tables.cells import ROOT, Row, table, versions
from bench.tables.speed import speed

FOLDER = ROOT / "bench" / "vllm"
RESAMPLES = 10_000
OTHERS = ("nixl", "example")
NAMES = {"nixl": "NixlConnector", "example": "ExampleConnector", "raw": "kvprism, raw"}


def result(name: str) -> dict[str, Any] | None:
    """None where it was not measured yet."""
    path = FOLDER / f"{name}.json"
    found: dict[str, Any] | None = json.loads(path.read_text()) if path.is_file() else None
    return found


def made_by(found: dict[str, Any]) -> str:
    return (
        f"Commit `{found['commit'][:12]}` on {found['date']}: {versions(found)}; "
        f"{found['processor']}, {found['processors']} processors, load {found['load']:.1f}."
    )


def faults() -> list[str]:
    """What became of every request while servers were killed, a line for each side."""
    found = result("faults")
    if found is None:
        return ["Not run yet: `make test-vllm-faults`."]
    heads = ["killed", "kills", "of a transfer's bytes sent, median", "cache loaded"]
    heads += ["computed, same tokens", "error as its server was killed", "wrong tokens"]
    heads += ["error of a living server", "lost", "servers alive", "blocks free"]
    heads += ["start, median s"]

    def line(side: str) -> str:
        own = [row for row in found["rows"] if row["side"] == side]
        outcomes: Counter[str] = sum((Counter(row["outcomes"]) for row in own), Counter())
        sent = [row["held_at_nbytes"] / row["cache_nbytes"] for row in own]
        cells = [side, str(len(own)), f"{100 * median(sent):.0f} %" if own else ""]
        names = ("loaded", "computed", "error", "wrong", "failed", "lost")
        cells += [str(outcomes[name]) for name in names]
        cells += [f"{sum(row[name] for row in own)}" for name in ("alive", "blocks_free")]
        cells.append(f"{median(row['start_s'] for row in own):.0f}" if own else "")
        return f"| {' | '.join(cells)} |"

    return [*table(heads, map(line, ("prefill", "decode"))), "", made_by(found)]


def ttft() -> list[str]:
    """Milliseconds from a prompt to decode's first token, a line for each connector."""
    found = result("ttft")
    if found is None:
        return ["Not measured yet: `scripts/bench-vllm --json bench/vllm/ttft.json`."]
    rows = {row["name"]: row for row in found["rows"]}
    heads = ["connector", "p50 [quartiles]", "p95", "decode alone p50", "prefill p50", "after it"]
    heads += ["bytes a prompt", "of 16 bits", "of raw", "n"]
    heads += [
        f"{part} against {NAMES[o]}" for part in ("more than alone,", "after it,") for o in OTHERS
    ]
    heads += ["loses to Nixl above"]

    def line(row: Row) -> str:
        own = wire(row)
        low, middle, high, late = (1e3 * x for x in np.quantile(row["seconds"], QUANTILES))
        cells = [NAMES.get(row["name"], f"kvprism, {found['policy']} {row['name']}")]
        cells += [f"{middle:.1f} [{low:.1f}, {high:.1f}]", f"{late:.1f}"]
        times = (row[ALONE], row[PREFILL], over(row, PREFILL))
        cells += [f"{1e3 * median(each):.1f}" for each in times]
        cells += [f"{own:,.0f}", f"{own / found['reference_bytes']:.4f}"]
        cells += [f"{own / wire(rows['raw']):.4f}" if "raw" in rows else "", str(row_n(row))]
        cells += [
            difference(row, rows.get(other), part) for part in (ALONE, PREFILL) for other in OTHERS
        ]
        cells.append(break_even(row, rows.get("nixl")))
        return f"| {' | '.join(cells)} |"

    settings = (
        f"`{found['model']}` in {found['dtype']}, {found['tokens']} random tokens a prompt, sent "
        f"by {found['send']}, {found['rounds']} rounds. Differences are of medians, in ms, with "
        "95 % bootstrap intervals."
    )
    return [*table(heads, map(line, rows.values())), "", settings, "", made_by(found)]


QUANTILES = (0.25, 0.5, 0.75, 0.95)


def row_n(row: Row) -> int:
    return len(row["seconds"])


def wire(row: Row) -> float:
    """Bytes of a prompt."""
    return float(row["wire_bytes"] / row_n(row))


# What of a sample's seconds is taken from it: decode alone, just before it, and so the drift; or
# the prefill, so that what is left is from its answer to decode's first token.
ALONE, PREFILL = "alone_seconds", "prefill_seconds"


def over(row: Row, part: str) -> list[float]:
    """Seconds of each sample over that part of them."""
    return [total - less for total, less in zip(row["seconds"], row[part], strict=True)]


def difference(row: Row, other: Row | None, part: str) -> str:
    if other is None or other is row:
        return ""
    low, high = interval(over(row, part), over(other, part))
    middle = median(over(row, part)) - median(over(other, part))
    return f"{1e3 * middle:+.1f} [{1e3 * low:+.1f}, {1e3 * high:+.1f}]"


def interval(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """95 % of the difference of medians of two independent samples."""
    rng = np.random.default_rng(0)
    medians = [
        np.median(rng.choice(np.asarray(each), (RESAMPLES, len(each))), axis=1)
        for each in (ours, theirs)
    ]
    low, high = np.quantile(medians[0] - medians[1], (0.025, 0.975))
    return float(low), float(high)


def break_even(row: Row, other: Row | None) -> str:
    """The link at which the bytes saved take as long as this arm took more on loopback, after the
    prefill: what comes before it is the same model on the same prompts."""
    if other is None or other is row:
        return ""
    saved = wire(other) - wire(row)
    more_s = median(over(row, PREFILL)) - median(over(other, PREFILL))
    if more_s <= 0:
        return "no link" if saved >= 0 else "slower links only"
    return speed(8 * saved / more_s) if saved > 0 else "every link"
