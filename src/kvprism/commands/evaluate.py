"""`kvprism eval`: run a task with progress, print one table a cell, write rows."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec

from kvprism.commands import console
from kvprism.errors import BadInput
from kvprism.evaluate.arms import Arm, arms_of
from kvprism.evaluate.measure import LoadedModel
from kvprism.evaluate.needle import Needle
from kvprism.evaluate.perplexity import Perplexity
from kvprism.evaluate.records import Task, collect, load_records
from kvprism.evaluate.rows import Row, write_rows
from kvprism.evaluate.summary import Comparison, compare, rows_of
from kvprism.policies import PlanOptions

HEADINGS = {
    "perplexity": ("perplexity", "{:.3f}", "{:+.2%}"),
    "kl_mean": ("KL to raw x1000", "{:.4f}", None),
    "kl_p99": ("KL p99 x1000", "{:.2f}", None),
    "top1_flips_per_1000": ("flips / 1000", "{:.2f}", None),
    "exact_match": ("exact match", "{:.1%}", "{:+.1%}"),
    "digit_nll": ("digit NLL", "{:.4f}", "{:+.4f}"),
}
SCALE = {"kl_mean": 1000, "kl_p99": 1000}


def numbers(text: str, what: str) -> list[int]:
    """`1024,2048` -> [1024, 2048]; `BadInput` names what was meant."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise BadInput(f"{what} must be whole numbers such as 1024,2048, got {text!r}") from error


def parse_arms(
    policies: str, budgets: str, importance: str, codec: str, seed: int
) -> tuple[Arm, ...]:
    """The arms that the command line names."""
    options = PlanOptions(importance=importance, codec=codec, seed=seed)
    names = [name.strip() for name in policies.split(",") if name.strip()]
    return arms_of(names, [b for b in budgets.split(",") if b.strip()], options)


def run_perplexity(model: str, text: Path, **settings: Any) -> Perplexity:
    """The task that `kvprism eval perplexity` asks for."""
    return Perplexity(LoadedModel.load(model), text, **settings)


def run_needle(model: str, **settings: Any) -> Needle:
    """The task that `kvprism eval needle` asks for."""
    return Needle(LoadedModel.load(model), **settings)


def measure_and_show(task: Task, records: Path | None, json: Path | None) -> None:
    """Measure what is missing, print a table per cell, and write the rows."""
    with console.progress(f"{task.header.task} on {task.header.model}") as advance:
        measured = collect(task, records, advance)
    rows = rows_of(measured)
    show_rows(rows)
    if json is not None:
        write_rows(json, rows)


def show_rows(rows: Sequence[Row]) -> None:
    """One table per (length, distractors): an arm a line, its metrics with their 95 % intervals."""
    for (length, distractors), cell in groupby(rows, lambda r: (r.length, r.distractors)):
        arms = [list(arm) for _, arm in groupby(cell, lambda r: (r.policy, r.budget, r.codec))]
        names = [row.metric for row in arms[0]]
        columns = ["arm", "budget", "of 16-bit", "wire bytes", *(HEADINGS[n][0] for n in names)]
        title = f"{arms[0][0].task}: {length} tokens, n = {arms[0][0].n}"
        if distractors is not None:
            title += f", {distractors} distractors"
        console.table(f"{title}; in brackets the 95 % interval", columns, map(_line, arms))


def _line(arm: list[Row]) -> list[str]:
    first = arm[0]
    budget = "fixed" if first.budget is None else str(first.budget)
    if first.value is None or first.fraction is None or first.wire_bytes is None:
        return [first.policy, budget, "infeasible", "", *[""] * len(arm)]
    codec = "" if first.codec == "nested" else f" ({first.codec})"
    size = [console.percent(first.fraction), str(first.wire_bytes)]
    return [first.policy + codec, budget, *size, *(_figure(row) for row in arm)]


def _figure(row: Row) -> str:
    """A value, then the interval of its change where the metric has one that reads better."""
    if row.value is None or row.ci_low is None or row.ci_high is None:
        return ""
    _, value, change = HEADINGS[row.metric]
    scale = SCALE.get(row.metric, 1)
    low, high = ((change or value).format(scale * bound) for bound in (row.ci_low, row.ci_high))
    return f"{value.format(scale * row.value)} [{low}, {high}]"


def show_comparisons(comparisons: Sequence[Comparison]) -> None:
    """One table per metric: a policy against others on the same documents."""
    for metric, found in groupby(comparisons, lambda c: c.metric):
        scale, value = SCALE.get(metric, 1), HEADINGS[metric][2] or HEADINGS[metric][1]
        columns = ["policy", "budget", "versus", "of 16-bit", "length", "distractors", "n"]
        columns += [f"difference in {HEADINGS[metric][0]}", "95 % interval", "Holm p", ""]
        rows = [_comparison_line(comparison, scale, value) for comparison in found]
        console.table(f"{metric}: paired differences", columns, rows)


def _comparison_line(c: Comparison, scale: float, value: str) -> list[str]:
    cell = [str(c.length), "" if c.distractors is None else str(c.distractors), str(c.n)]
    head = [c.policy, str(c.budget), f"{c.versus} {c.versus_budget or ''}".strip()]
    if c.delta is None or c.ci_low is None or c.ci_high is None or c.versus_fraction is None:
        return [*head, "", *cell, "infeasible", "", "", ""]
    interval = f"[{value.format(scale * c.ci_low)}, {value.format(scale * c.ci_high)}]"
    share = console.percent(c.versus_fraction)
    p = "" if c.p_holm is None else f"{c.p_holm:.4f}"
    note = f"not ranked: {c.not_ranked}" if c.not_ranked else ""
    return [*head, share, *cell, value.format(scale * c.delta), interval, p, note]


def compare_and_show(
    records: Sequence[Path], policy: str, versus: Sequence[str], json: Path | None
) -> None:
    """Paired differences from record files."""
    found = [c for path in records for c in compare(load_records(path), policy, versus)]
    found.sort(key=lambda c: list(HEADINGS).index(c.metric))
    show_comparisons(found)
    console.write_json(json, msgspec.to_builtins(found))
