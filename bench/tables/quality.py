"""The tables of README.md and docs/evidence.md."""

import json
from collections.abc import Iterator

from bench.tables.cells import (
    RESULTS,
    Arm,
    arms,
    change,
    exact,
    label,
    rows,
    table,
    value,
    versions,
)

BUDGETS = (0.3, 0.4, 0.52)
NEEDLE_CELLS = ((1024, 0), (1024, 3), (2048, 0), (2048, 3))


def summary() -> list[str]:
    """One line a policy: KL at every budget, perplexity and needles at the smallest."""
    text, needles = arms(rows("perplexity")), arms(rows("needle-1024", "needle-2048"))
    heads = ["policy", *(f"KL ×10⁻³ at {b:.2f}" for b in BUDGETS), "perplexity % at 0.30"]
    heads += [f"needle {length}+{n} at 0.30" for length, n in NEEDLE_CELLS]

    def lines() -> Iterator[str]:
        for policy in dict.fromkeys(arm["kl_mean"]["policy"] for arm in text):
            own = [arm for arm in text if arm["kl_mean"]["policy"] == policy]
            kls = [f"{1e3 * arm['kl_mean']['value']:.3g}" for arm in own]
            if own[0]["kl_mean"]["budget"] is None:
                kls = [f"{kls[0]} (size {own[0]['kl_mean']['fraction']:.3f})", "", ""]
            cells = [
                f"{100 * arm['exact_match']['value']:.1f}"
                for cell in NEEDLE_CELLS
                for arm in needles
                if (arm["exact_match"]["length"], arm["exact_match"]["distractors"]) == cell
                and arm["exact_match"]["policy"] == policy
                and arm["exact_match"]["budget"] in (None, BUDGETS[0])
            ]
            ppl = f"{100 * own[0]['perplexity']['delta']:+.2f}"
            yield f"| {' | '.join([f'`{policy}`', *kls, ppl, *cells])} |"

    return table(heads, lines())


def perplexity() -> list[str]:
    remedies = arms([row for row in rows("perplexity-conditioned") if row["policy"] != "raw"])
    return continuations([*arms(rows("perplexity", "perplexity-published")), *remedies])


def deep() -> list[str]:
    return [*provenance("deep-perplexity"), "", *continuations(arms(rows("deep-perplexity")))]


def continuations(found: list[Arm]) -> list[str]:
    heads = ["policy", "budget", "of 16-bit", "KL to raw ×10⁻³", "KL p99 ×10⁻³", "flips / 1000"]
    lines = (
        f"{label(arm['kl_mean'])} {value(arm['kl_mean'], 1e3, '{:.3f}')} "
        f"| {value(arm['kl_p99'], 1e3, '{:.2f}')} "
        f"| {value(arm['top1_flips_per_1000'], 1, '{:.1f}')} "
        f"| {change(arm['perplexity'], '{:+.2f}')} |"
        for arm in found
    )
    return table([*heads, "perplexity change, %"], lines)


def needle(names: tuple[str, ...]) -> list[str]:
    found = arms(rows(*names))
    cells: dict[tuple[int, int], list[Arm]] = {}
    for arm in found:
        row = arm["exact_match"]
        cells.setdefault((row["length"], row["distractors"]), []).append(arm)
    heads = ["policy", "budget", "of 16-bit"]
    heads += [f"{length} tokens, {n} distractors" for length, n in cells]
    lines = (
        f"{label(same[-1]['exact_match'])} "
        + " | ".join(exact(arm["exact_match"]) for arm in same)
        + " |"
        for same in zip(*cells.values(), strict=True)
    )
    return table(heads, lines)


def comparisons(name: str, metric: str, scale: float) -> list[str]:
    heads = ["spectrum at", "versus", "its size", "cell", "n", "difference"]
    heads += ["95 % CI", "90 % CI", "Holm p"]
    bounds = ("delta", "ci_low", "ci_high", "ci90_low", "ci90_high")

    def lines() -> Iterator[str]:
        for c in json.loads((RESULTS / f"{name}.json").read_text()):
            if c["metric"] != metric or c["delta"] is None:
                continue
            cell = str(c["length"]) + ("" if c["distractors"] is None else f"+{c['distractors']}")
            d, low, high, low90, high90 = (f"{scale * c[bound]:+.4g}" for bound in bounds)
            p = f"{c['p_holm']:.4f}"
            parts = [c["budget"], f"`{c['versus']}`", f"{c['versus_fraction']:.4f}", cell, c["n"]]
            parts += [d, f"[{low}, {high}]", f"[{low90}, {high90}]", p]
            yield f"| {' | '.join(map(str, parts))} |"

    return table(heads, lines())


def ruler(name: str) -> list[str]:
    """Exact match of every subtask, and the average with its change against raw; KL of all."""
    found = arms(rows(name))
    subtasks = list(dict.fromkeys(arm["exact_match"]["subtask"] for arm in found))
    heads = ["policy", "budget", "of 16-bit", *subtasks[:-1], "average [change]", "KL ×10⁻³"]

    def lines() -> Iterator[str]:
        cells = [[a for a in found if a["exact_match"]["subtask"] == task] for task in subtasks]
        for *tasks, average in zip(*cells, strict=True):
            shares = " | ".join(f"{100 * arm['exact_match']['value']:.1f}" for arm in tasks)
            row, kl = average["exact_match"], f"{1e3 * average['kl_mean']['value']:.3g}"
            yield f"{label(row)} {shares} | {exact(row)} | {kl} |"

    return table(heads, lines())


def suite(name: str) -> list[str]:
    return [*provenance(name), "", *ruler(name)]


def provenance(name: str = "perplexity") -> list[str]:
    row = rows(name)[0]
    return [f"Commit `{row['commit'][:12]}`, {versions(row)}."]
