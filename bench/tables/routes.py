"""The tables of docs/polykv.md."""

import json
from collections.abc import Iterator

from bench.tables.cells import RESULTS, ROOT, table

PROFILES = ROOT / "bench" / "profiles"


def routes() -> list[str]:
    """The routes of a profile, as `kvprism calibrate` made them."""
    profile = json.loads((PROFILES / "tiny-routes.json").read_text())
    heads = ["policy", "budget", "layers", "from"]
    lines = (
        f"| `{route['policy']}` | {route['tokens']}tok | {route['prefill']} | {route['note']} |"
        for route in profile["routes"]
    )
    return table(heads, lines)


def route_comparisons(name: str) -> list[str]:
    """Paired differences of the average over subtasks."""
    heads = ["against", "metric", "n", "difference", "95 % CI", "Holm p"]
    metrics = {"exact_match": ("exact match, points", 100), "answer_nll": ("answer NLL, nats", 1)}

    def lines() -> Iterator[str]:
        for c in json.loads((RESULTS / f"{name}.json").read_text()):
            if c["metric"] not in metrics or c["subtask"] != "average":
                continue
            metric, scale = metrics[c["metric"]]
            d, low, high = (f"{scale * c[bound]:+.3g}" for bound in ("delta", "ci_low", "ci_high"))
            p = f"{c['p_holm']:.4f}"
            parts = [f"`{c['versus']}`", metric, c["n"], d, f"[{low}, {high}]", p]
            yield f"| {' | '.join(map(str, parts))} |"

    return table(heads, lines())
