"""The tables of docs/polykv.md and docs/polykv-evidence.md."""

import json
import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from statistics import median
from typing import Any

from bench.tables.cells import RESULTS, ROOT, Row, exact, rows, table

PROFILES = ROOT / "bench" / "profiles"
# Budgets at which `bench.controls` was run.
CONTROLLED = (128, 256, 512)
# The profile by which the decode phase was measured.
PHASES = "tiny-deep-routes-decode"


def _stored(profile: str) -> list[dict[str, Any]]:
    routes: list[dict[str, Any]] = json.loads((PROFILES / f"{profile}.json").read_text())["routes"]
    return routes


def routes(model: str = "tiny", policies: Sequence[str] = ("polykv", "polykv-best")) -> list[str]:
    """The routes of a profile, as `kvprism calibrate` made them."""
    heads = ["policy", "budget", "layers", "from"]
    lines = (
        f"| `{route['policy']}` | {route['tokens']}tok | {route['prefill']} | {route['note']} |"
        for route in _stored(f"{model}-routes")
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


def recovery(*names: str, subtasks: bool = True) -> list[str]:
    """What a policy wins back of what others lose, over all budgets; for each subtask, or not."""
    heads = ["subtask", "n", "against", "won back, %", "95 % CI", "difference at each budget"]

    def lines() -> Iterator[str]:
        for r in rows(*names):
            if r["metric"] != "exact_match" or not (subtasks or r["subtask"] == "average"):
                continue
            against = ", ".join(f"`{part}`" for part in r["versus"].split("+"))
            share = interval = r["reason"] or ""
            if r["value"] is not None:
                share = f"{100 * r['value']:.1f}"
                interval = f"[{100 * r['ci_low']:.1f}, {100 * r['ci_high']:.1f}]"
            points = ", ".join(f"{100 * d:+.1f}" for d in r["differences"].values())
            yield f"| {r['subtask']} | {r['n']} | {against} | {share} | {interval} | {points} |"

    return table(heads, lines())


def _averages(name: str) -> list[Row]:
    return [r for r in rows(name) if (r["metric"], r["subtask"]) == ("exact_match", "average")]


def protections(policies: Sequence[str], *names: str) -> list[str]:
    """Policies on the same cases, with the tokens of their own protected and with the same ones."""
    heads = ["policy", "kept in any case", *(f"{tokens}tok" for tokens in CONTROLLED)]

    def lines() -> Iterator[str]:
        averages = [_averages(name) for name in names]
        for policy in policies:
            for every in averages:
                found = [row for row in every if row["policy"] == policy]
                ends = found[0].get("protection") or "its own"
                cells = [f"`{policy}`", ends, *(exact(row) for row in found)]
                yield f"| {' | '.join(cells)} |"

    return table(heads, lines())


def on_test(name: str) -> list[str]:
    """Every policy's average over subtasks at each budget, the highest sum first."""
    found = _averages(name)
    budgets = list(dict.fromkeys(row["budget"] for row in found if row["budget"]))
    scores: dict[str, list[float]] = {}
    for row in found:
        again = len(budgets) if row["budget"] is None else 1
        scores.setdefault(row["policy"], []).extend([100 * row["value"]] * again)
    lines = (
        f"| `{policy}` | {' | '.join(f'{value:.1f}' for value in scores[policy])} |"
        for policy in sorted(scores, key=lambda policy: -sum(scores[policy]))
    )
    return table(["policy", *budgets], lines)


def decode_routes() -> list[str]:
    """What the routes keep while tokens are generated, where that is their own."""
    lines = (
        f"| `{route['policy']}` | {route['tokens']}tok | {route[phase]} | {words} |"
        for route in _stored(PHASES)
        if "decode" in route
        for phase, words in (("prefill", "the prompt"), ("decode", "while generating"))
    )
    return table(["policy", "budget", "layers", "of"], lines)


def phases(name: str) -> list[str]:
    """Prompt, decode phase and both, each by the routes of a policy."""
    found = [r for r in rows(name) if r["subtask"] == "average"]
    heads = ["of the prompt", "while generating", "n", "sent, of 16-bit", "held at the end"]
    heads += ["exact match [change]", "KL ×10⁻³"]

    def lines() -> Iterator[str]:
        routed = dict(_by_line())
        for row in found:
            if row["metric"] != "exact_match":
                continue
            [kl] = [r["value"] for r in found if _arm(r) == _arm(row) and r["metric"] == "kl_mean"]
            decode = "all" if row["decode"] is None else f"`{routed[row['decode']]}`"
            held = row["resident_bytes"] / row["reference_bytes"]
            cells = [f"`{row['policy']}`", decode, row["n"], f"{row['fraction']:.4f}"]
            cells += [f"{held:.3f}", exact(row), f"{1e3 * kl:.3g}"]
            yield f"| {' | '.join(map(str, cells))} |"

    return table(heads, lines())


def _arm(row: Row) -> tuple[object, ...]:
    return row["policy"], row["budget"], row["decode"]


def _by_line() -> Iterator[tuple[str, str]]:
    """A decode phase as rows have it -> whose route it is."""
    for route in _stored(PHASES):
        layers = route.get("decode", route["prefill"])
        yield re.sub(r"@(\d+)", r"@\1tok", layers), route["policy"]


def greedy(name: str) -> list[str]:
    """Right by the logits of the true answer, and as it is generated."""
    heads = ["policy", "budget", "n", "right by the true answer's logits", "right as generated"]
    lines = (
        f"| `{r['policy']}` | {r['budget'] or 'fixed'} | {r['n']} | {r['forced']} "
        f"| {r['generated']} | {r['agree']} |"
        for r in rows(name)
    )
    return table([*heads, "the same verdict"], lines)


def controls(*names: str) -> list[str]:
    """A route's loss on tasks held out, beside that of the same policies or layers elsewhere."""
    kinds = ("inverse", "policies in other layers", "layers in other places", "one policy")
    heads = ["policy", "budget", "the route", *kinds]

    def lines() -> Iterator[str]:
        for (policy, tokens), own in groupby(rows(*names), lambda r: (r["policy"], r["tokens"])):
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
