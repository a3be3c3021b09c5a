"""Rows of results as cells of tables."""

import json
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "bench" / "results"
Row = dict[str, Any]
Arm = dict[str, Row]


def rows(*names: str, folder: Path = RESULTS) -> list[Row]:
    return [row for name in names for row in json.loads((folder / f"{name}.json").read_text())]


def arms(found: list[Row]) -> list[Arm]:
    """Rows of one arm in one cell, by metric."""

    def arm(row: Row) -> tuple[object, ...]:
        names = ("policy", "budget", "codec", "length", "distractors", "subtask")
        return tuple(row.get(name) for name in names)

    return [{row["metric"]: row for row in group} for _, group in groupby(found, arm)]


def value(row: Row, scale: float, pattern: str) -> str:
    if row["value"] is None:
        return "infeasible"
    low, high = (scale * row[bound] for bound in ("ci_low", "ci_high"))
    return f"{pattern.format(scale * row['value'])} [{pattern.format(low)}, {pattern.format(high)}]"


def change(row: Row, pattern: str) -> str:
    if row["value"] is None:
        return "infeasible"
    numbers = (100 * row[name] for name in ("delta", "ci_low", "ci_high"))
    return "{} [{}, {}]".format(*(pattern.format(number) for number in numbers))


def exact(row: Row) -> str:
    if row["value"] is None:
        return "infeasible"
    low, high = 100 * row["ci_low"], 100 * row["ci_high"]
    return f"{100 * row['value']:.1f} [{low:+.1f}, {high:+.1f}]"


def label(row: Row) -> str:
    code = "" if row["codec"] == "nested" else f", {row['codec']} code"
    budget = row["budget"] or "fixed"
    budget = budget if isinstance(budget, str) else f"{budget:.2f}"
    fraction = "" if row["fraction"] is None else f"{row['fraction']:.4f}"
    return f"| `{row['policy']}`{code} | {budget} | {fraction} |"


def versions(found: Row) -> str:
    return ", ".join(f"{name} {version}" for name, version in found["versions"].items())


def table(heads: list[str], lines: Iterable[str]) -> list[str]:
    return [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *lines]
