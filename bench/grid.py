"""The rows of a large grid, made small for keeping, and what they say of single policies.

python -m bench.grid slim ROWS: keeps `METRICS`, a row a line. python -m bench.grid oracle ROWS:
the single policy that was best on the test at each budget, as `kvprism eval recovery` takes it.
"""

import json
import sys
from pathlib import Path

from bench.tables.cells import Row
from kvprism.evictions import EVICTIONS

METRICS = ("exact_match", "answer_nll", "kl_mean")


def main() -> None:
    command, path = sys.argv[1], Path(sys.argv[2])
    rows = json.loads(path.read_text())
    if command == "slim":
        path.write_text(slim(rows))
    elif command == "oracle":
        print("+".join(f"{policy}@{budget}" for budget, policy in oracle(rows).items()))
    else:
        sys.exit(f"unknown command {command!r}; known: slim, oracle")


def slim(rows: list[Row]) -> str:
    """The average of every metric kept, and each subtask's exact match, as JSON."""
    kept = [
        row
        for row in rows
        if row["metric"] == "exact_match"
        or (row["metric"] in METRICS and row["subtask"] == "average")
    ]
    return "[\n" + ",\n".join(json.dumps(row) for row in kept) + "\n]\n"


def oracle(rows: list[Row]) -> dict[str, str]:
    """Budget -> the single policy with the highest exact match on average over subtasks."""
    best: dict[str, Row] = {}
    for row in rows:
        measured = (row["metric"], row["subtask"]) == ("exact_match", "average")
        if not measured or row["policy"] not in EVICTIONS:
            continue
        if row["value"] > best.get(row["budget"], {"value": -1.0})["value"]:
            best[row["budget"]] = row
    return {budget: row["policy"] for budget, row in best.items()}


if __name__ == "__main__":
    main()
