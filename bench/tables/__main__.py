"""Rows of results -> the tables of the pages that show them, between their markers.

With `--check` it writes nothing and fails when a page does not show what was measured.
"""

import sys

from bench.tables import engine, models, quality, routes, speed, zoo
from bench.tables.cells import ROOT

SECTIONS = {
    "docs/codec.md": {"codec": speed.codec},
    "README.md": {"summary": quality.summary},
    "kvprism-tiny/README.md": {
        "gates": lambda: models.gates("tiny"),
        "gates-deep": lambda: models.gates("tiny-deep"),
        "gates-llama31": lambda: models.gates("tiny-llama31"),
        "gates-qwen3": lambda: models.gates("tiny-qwen3"),
        "gates-gemma2": lambda: models.gates("tiny-gemma2"),
    },
    "docs/speed.md": {
        "ttft-machine": lambda: speed.measured_on("ttft"),
        "ttft": lambda: speed.ttft("ttft"),
        "links-machine": lambda: speed.measured_on("ttft-links"),
        "links": speed.links,
        "break-even": speed.break_even,
        "modelled": speed.modelled,
        "transport": speed.transport,
        "plan-machine": lambda: speed.measured_on("plan"),
        "plan": speed.planning,
    },
    "docs/polykv.md": {
        "routes": routes.routes,
        "routes-ruler": lambda: quality.ruler("ruler-routes"),
        "routes-compare": lambda: routes.route_comparisons("ruler-routes-compare"),
        "routes-ruler-128": lambda: quality.ruler("ruler-routes-128"),
        "routes-compare-128": lambda: routes.route_comparisons("ruler-routes-128-compare"),
        "routes-provenance": lambda: quality.provenance("ruler-routes"),
    },
    "docs/zoo.md": {
        "probes": zoo.probes,
        "plain": zoo.plain,
        "overview": zoo.overview,
        "remedies": lambda: zoo.remedies(zoo.SIZE),
    },
    "docs/zoo-evidence.md": {"remedies": zoo.remedies, "models": zoo.models},
    "docs/vllm.md": {"faults": engine.faults, "ttft": engine.ttft},
    "docs/polykv-evidence.md": {
        "deep-provenance": lambda: quality.provenance("deep-routes"),
        "deep-routes": lambda: routes.routes("tiny-deep"),
        "deep-singles": lambda: routes.singles("tiny-deep"),
        "deep-ruler": lambda: quality.ruler("deep-routes"),
        "deep-recovery": lambda: routes.recovery("deep-routes-compare-recovery"),
        "deep-variants": lambda: routes.recovery("deep-routes-compare-variants", subtasks=False),
        "deep-on-test": lambda: routes.on_test("deep-routes-singles"),
        "deep-oracle": lambda: routes.recovery("deep-routes-compare-oracle", subtasks=False),
        "deep-controls": lambda: routes.controls(
            *(f"deep-routes-compare-controls-{tokens}" for tokens in routes.CONTROLLED)
        ),
        "deep-protected": lambda: routes.protections(
            ("layer-defensivekv", "cake", "polykv-best"),
            "deep-routes",
            "deep-routes-protecting-4-32",
            "deep-routes-protecting-0-1",
        ),
        "deep-protected-4-32": lambda: routes.recovery(
            "deep-routes-compare-recovery-protecting-4-32", subtasks=False
        ),
        "deep-protected-0-1": lambda: routes.recovery(
            "deep-routes-compare-recovery-protecting-0-1", subtasks=False
        ),
        "deep-phase-routes": routes.decode_routes,
        "deep-phases": lambda: routes.phases("deep-routes-phases"),
        "deep-phase-variants": lambda: routes.phases("deep-routes-phase-variants"),
        "deep-aware": lambda: quality.ruler("deep-routes-aware"),
        "deep-tiny": lambda: quality.ruler("deep-routes-tiny"),
        "deep-zoo": lambda: quality.ruler("deep-routes-zoo"),
        "deep-zoo-routes": lambda: routes.routes("tiny-qwen2-spiky"),
        "deep-greedy": lambda: routes.greedy("deep-routes-compare-greedy"),
    },
    "docs/evidence.md": {
        "provenance": quality.provenance,
        "perplexity": quality.perplexity,
        "deep": quality.deep,
        "ruler": lambda: quality.suite("ruler"),
        "ruler-deep": lambda: quality.suite("deep-ruler"),
        "needle": lambda: quality.needle(("needle-1024", "needle-2048")),
        "kl": lambda: quality.comparisons("perplexity-compare", "kl_mean", 1e3),
        "equivalence": lambda: quality.comparisons("needle-equal-compare", "exact_match", 100),
    },
}


def main() -> None:
    stale = []
    for page, sections in SECTIONS.items():
        path = ROOT / page
        before = path.read_text()
        after = before
        for name, make in sections.items():
            start, stop = f"<!-- {name} -->\n", f"<!-- end {name} -->"
            head, rest = after.split(start)
            after = head + start + "\n".join(make()) + "\n" + stop + rest.split(stop)[1]
        if after != before:
            stale.append(page)
            if "--check" not in sys.argv:
                path.write_text(after)
    if "--check" in sys.argv and stale:
        sys.exit(f"{stale} differ from the results: run scripts/evidence-tables")


if __name__ == "__main__":
    main()
