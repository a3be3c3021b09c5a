"""The tables of the built-in models' cards."""

import json

from bench.tables.cells import ROOT, Row, table, versions

GATES = ROOT / "bench" / "gates"


def gates(model: str) -> list[str]:
    """What `scripts/gate-tiny` found, a column a seed."""
    reports = [
        report
        for path in sorted(GATES.glob(f"{model}-[0-9]*.json"))
        for report in json.loads(path.read_text())
    ]

    def cell(figure: Row) -> str:
        value = figure["value"]
        if not figure["share"]:
            return f"{value:.4g}"
        if figure["low"] is None:
            return f"{100 * value:.1f}"
        return f"{100 * value:.1f} [{100 * figure['low']:.1f}, {100 * figure['high']:.1f}]"

    def gate(figure: Row) -> str:
        if figure["gate"] is None:
            return ""
        scale = 100 if figure["share"] else 1
        sign = "≤" if figure["lower_is_better"] else "≥"
        return f"{sign} {scale * figure['gate']:g}"

    heads = ["figure", "n", "gate", *(f"seed {report['seed']}" for report in reports)]
    lines = (
        f"| {' | '.join([same[0]['name'], str(same[0]['n']), gate(same[0]), *map(cell, same)])} |"
        for same in zip(*(report["figures"] for report in reports), strict=True)
    )
    measured = (
        f"Seed {report['seed']} measured at commit `{report['commit'][:12]}` on {report['date']}: "
        f"{versions(report)}."
        for report in reports
    )
    return [*table(heads, lines), "", "  \n".join(measured)]
