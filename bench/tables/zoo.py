"""The tables of docs/zoo.md and docs/zoo-evidence.md: what was measured on each model so far."""

import json
from collections.abc import Iterator

from bench.tables.cells import (
    ROOT,
    Arm,
    Row,
    arms,
    change,
    exact,
    label,
    rows,
    table,
    value,
    versions,
)

ZOO = ROOT / "bench" / "zoo"
# What `scripts/zoo` measures, as in docs/zoo.md; other seeds of `mixed` follow.
ORDER = (
    "tiny",
    "tiny-llama31",
    "tiny-qwen3",
    "tiny-gemma2",
    "tiny-mistral",
    "tiny-qwen2",
    "tiny-qwen2-fragile",
    "tiny-qwen2-bias",
    "tiny-qwen2-bias-300",
    "tiny-qwen2-spiky",
    "tiny-qwen2-mixed-0",
    "tiny-qwen2-mixed-1",
)
# At one size, about 0.308 of 16 bits; a code takes its own.
SIZE = "floor+0.04"
OVERVIEW = (
    ("raw", None),
    ("int8", None),
    ("int4-kivi", None),
    ("spectrum", SIZE),
    ("spectrum-2tier", 0.308),
    ("spectrum-adaptive", SIZE),
    ("spectrum-conditioned", SIZE),
)


def measured(suffix: str) -> list[str]:
    """Models of which there is such a file, those of docs/zoo.md first."""
    found = {path.name.removesuffix(suffix) for path in ZOO.glob(f"*{suffix}")}
    return [name for name in ORDER if name in found] + sorted(found - set(ORDER))


def probes() -> list[str]:
    heads = ["model", "16 bits", "published probe", "INT4 tiers, exact 0.30", "conditioned"]
    heads += ["outliers in layers", "recommended"]

    def share(trials: Row | None) -> str:
        return "" if trials is None else f"{trials['successes']}/{trials['trials']}"

    def line(model: str) -> str:
        probe = json.loads((ZOO / f"{model}.probe.json").read_text())
        shares = [share(probe.get(arm)) for arm in ("raw", "published", "ours", "conditioned")]
        layers = ", ".join(map(str, probe["outlier_layers"])) or "none"
        whole = probe.get("keeps_all_from")
        drops = "" if whole is None else f"; drops none from {whole:.2f} on"
        return f"| `{model}` | {' | '.join(shares)} | {layers} | {probe['recommended']}{drops} |"

    return table(heads, map(line, measured(".probe.json")))


def plain() -> list[str]:
    """What INT4 without a remedy does to the text of models on which it loses the needle."""
    heads = ["model", "policy", "budget", "of 16-bit", "KL to raw ×10⁻³", "perplexity change, %"]
    suffix = "-greedy-perplexity"

    def line(model: str, arm: Arm) -> str:
        kl = value(arm["kl_mean"], 1e3, "{:.0f}")
        perplexity = change(arm["perplexity"], "{:+.1f}")
        return f"| `{model}` {label(arm['kl_mean'])} {kl} | {perplexity} |"

    found = [
        (model, arms(rows(model + suffix, folder=ZOO))) for model in measured(f"{suffix}.json")
    ]
    return table(heads, [line(model, arm) for model, its in found for arm in its])


def overview() -> list[str]:
    """Each model at one size: needles found without and with distractors, and KL to raw."""
    heads = ["model", "n", *(f"`{policy}`" for policy, _ in OVERVIEW)]

    def line(model: str) -> str:
        texts = {_key(arm): arm["kl_mean"] for arm in _arms(model, "perplexity")}
        needles = _needles(model)
        keys = [(*arm, "nested") for arm in OVERVIEW]
        cells = [_found(needles[key], texts[key]) if key in texts else "" for key in keys]
        return f"| `{model}` | {needles[keys[0]][0]['n']} | {' | '.join(cells)} |"

    return table(heads, map(line, measured("-drop-perplexity.json")))


def _found(needles: list[Row], text: Row) -> str:
    shares = ", ".join(f"{100 * row['value']:.1f}" for row in needles)
    return f"{shares}; {1e3 * text['value']:.3g}"


def models() -> list[str]:
    """Every arm of every model that was measured to its end."""
    return [text for model in measured("-drop-perplexity.json") for text in every_arm(model)]


def every_arm(model: str) -> list[str]:
    texts = _arms(model, "perplexity")
    needles = _needles(model)
    of_raw = needles[_key(texts[0])]
    heads = ["policy", "budget", "of 16-bit", "KL to raw ×10⁻³", "perplexity change, %"]
    heads += [f"needle, {row['distractors']} distractors" for row in of_raw]

    def line(text: Arm) -> str:
        exacts = " | ".join(map(exact, needles[_key(text)]))
        kl, perplexity = (
            value(text["kl_mean"], 1e3, "{:.3f}"),
            change(text["perplexity"], "{:+.2f}"),
        )
        return f"{label(text['kl_mean'])} {kl} | {perplexity} | {exacts} |"

    first, needle = texts[0]["kl_mean"], of_raw[0]
    about = (
        f"{first['n']} documents of {first['length']} + 512 tokens, {needle['n']} needles a cell "
        f"in {needle['length']} tokens. Commit `{first['commit'][:12]}`, {versions(first)}."
    )
    return [f"### `{model}`", "", about, "", *table(heads, map(line, texts)), ""]


def remedies(budget: str | None = None) -> list[str]:
    """Conditioned keys against raw, INT8, and plain and rotated tiers; at one budget, or at all."""
    heads = ["model", "budget", "against", "KL ×10⁻³ [95 % CI]", "perplexity, % [95 % CI]"]
    heads += ["needle, points [90 % CI]"]

    def lines() -> Iterator[str]:
        for model in measured("-compare-perplexity.json"):
            found = _comparisons(model, "perplexity")
            needles = _comparisons(model, "needle")
            for (at, versus), metrics in found.items():
                if budget not in (None, at):
                    continue
                kl = _difference(metrics["kl_mean"], 1e3, "ci")
                perplexity = _difference(metrics["perplexity"], 100, "ci")
                exacts = needles[at, versus]
                needle = "; ".join(_difference(row, 100, "ci90") for row in exacts.values())
                yield f"| `{model}` | {at} | {versus} | {kl} | {perplexity} | {needle} |"

    return table(heads, lines())


def _arms(model: str, task: str) -> list[Arm]:
    """Of both runs of a task; raw, from which both start, once."""
    tiers, drop = (arms(rows(f"{model}-{run}-{task}", folder=ZOO)) for run in ("tiers", "drop"))
    return [*tiers, *(arm for arm in drop if _key(arm)[0] != "raw")]


def _needles(model: str) -> dict[tuple[object, ...], list[Row]]:
    """Each arm's needles, those without distractors first."""
    found: dict[tuple[object, ...], list[Row]] = {}
    for arm in sorted(_arms(model, "needle"), key=lambda arm: arm["exact_match"]["distractors"]):
        found.setdefault(_key(arm), []).append(arm["exact_match"])
    return found


def _key(arm: Arm) -> tuple[object, ...]:
    row = next(iter(arm.values()))
    return row["policy"], row["budget"], row["codec"]


def _comparisons(model: str, task: str) -> dict[tuple[str, str], dict[str, Row]]:
    """By budget and what is compared with; below that by metric, or by number of distractors."""
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in json.loads((ZOO / f"{model}-compare-{task}.json").read_text()):
        if row["delta"] is None or (task == "needle" and row["metric"] != "exact_match"):
            continue
        code = "" if row.get("versus_codec", "nested") == "nested" else f", {row['versus_codec']}"
        against = f"`{row['versus']}`{code}"
        name = row["metric"] if task == "perplexity" else f"{row['length']}+{row['distractors']}"
        found.setdefault((row["budget"], against), {})[name] = row
    return found


def _difference(row: Row, scale: float, bounds: str) -> str:
    low, high = (f"{scale * row[f'{bounds}_{side}']:+.3g}" for side in ("low", "high"))
    return f"{scale * row['delta']:+.3g} [{low}, {high}]"
