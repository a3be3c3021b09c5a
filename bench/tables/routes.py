"""The tables of docs/polykv.md and docs/polykv-evidence.md."""

import json
from collections.abc import Iterator

from bench.tables.cells import RESULTS, ROOT, table

PROFILES = ROOT / "bench" / "profiles"


def routes(model: str = "tiny") -> list[str]:
    """The routes of a profile, as `kvprism calibrate` made them."""
    profile = json.loads((PROFILES / f"{model}-routes.json").read_text())
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


def singles(model: str) -> list[str]:
    """Every whole policy's loss on the calibration documents, the least over all budgets first."""
    report = json.loads((PROFILES / f"{model}-routes.report.json").read_text())
    budgets = {f"{each['tokens']}tok": each["singles"] for each in report["budgets"]}
    total = {p: sum(each[p] for each in budgets.values()) for p in report["budgets"][0]["singles"]}
    lines = (
        f"| `{policy}` | {' | '.join(f'{each[policy]:.3f}' for each in budgets.values())} "
        f"| {total[policy]:.3f} |"
        for policy in sorted(total, key=lambda policy: total[policy])
    )
    return table(["policy", *budgets, "sum"], lines)


def recovery(name: str) -> list[str]:
    """What a policy wins back of what others lose, over all budgets, for each subtask."""
    heads = ["subtask", "n", "against", "won back, %", "95 % CI", "difference at each budget"]

    def lines() -> Iterator[str]:
        for r in json.loads((RESULTS / f"{name}.json").read_text()):
            if r["metric"] != "exact_match":
                continue
            against = ", ".join(f"`{part}`" for part in r["versus"].split("+"))
            share = interval = r["reason"] or ""
            if r["value"] is not None:
                share = f"{100 * r['value']:.1f}"
                interval = f"[{100 * r['ci_low']:.1f}, {100 * r['ci_high']:.1f}]"
            points = ", ".join(f"{100 * d:+.1f}" for d in r["differences"].values())
            yield f"| {r['subtask']} | {r['n']} | {against} | {share} | {interval} | {points} |"

    return table(heads, lines())
