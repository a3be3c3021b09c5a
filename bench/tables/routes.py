"""The tables of docs/polykv.md and docs/polykv-evidence.md."""

import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from statistics import median

from bench.tables.cells import RESULTS, ROOT, Row, table

PROFILES = ROOT / "bench" / "profiles"


def routes(model: str = "tiny", policies: Sequence[str] = ("polykv", "polykv-best")) -> list[str]:
    """The routes of a profile, as `kvprism calibrate` made them."""
    profile = json.loads((PROFILES / f"{model}-routes.json").read_text())
    heads = ["policy", "budget", "layers", "from"]
    lines = (
        f"| `{route['policy']}` | {route['tokens']}tok | {route['prefill']} | {route['note']} |"
        for route in profile["routes"]
        if route["policy"] in policies
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


def controls(name: str) -> list[str]:
    """A route's loss on tasks held out, beside that of the same policies or layers elsewhere."""
    kinds = ("inverse", "policies in other layers", "layers in other places", "one policy")
    heads = ["policy", "budget", "the route", *kinds]

    def lines() -> Iterator[str]:
        rows = json.loads((RESULTS / f"{name}.json").read_text())
        for (policy, tokens), own in groupby(rows, lambda row: (row["policy"], row["tokens"])):
            losses: dict[str, list[Row]] = {}
            for row in own:
                losses.setdefault(row["kind"], []).append(row)
            route = losses["route"][0]
            others = [_beside(route, losses.get(kind, ())) for kind in kinds]
            cells = [f"`{policy}`", f"{tokens}tok", _loss(route), *others]
            yield f"| {' | '.join(cells)} |"

    return table(heads, lines())


def _loss(row: Row) -> str:
    return f"{row['answer_nll']:.2f} ({100 * row['exact_match']:.0f} %)"


def _beside(route: Row, others: Sequence[Row]) -> str:
    """One of them as it is; of several the least, the median and the route's rank among all."""
    if not others:
        return "none"
    if len(others) == 1:
        return _loss(others[0])
    found = sorted(row["answer_nll"] for row in others)
    rank = 1 + sum(each < route["answer_nll"] for each in found)
    return f"{found[0]:.2f}, {median(found):.2f}; rank {rank} of {len(found) + 1}"
