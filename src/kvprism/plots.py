"""Rows of a bench as pictures; beside report.py the one file that imports matplotlib."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from kvprism.errors import BadInput

Row = Mapping[str, Any]
PARTS = (("prefill", "#8899aa"), ("after prefill", "#d97742"), ("first token", "#4a7fb0"))


def write_ttft_plot(rows: Sequence[Row], path: Path) -> None:
    """The rows of `kvprism bench ttft` as a PNG: a row a context, a panel a link, a bar an arm.

    A bar is the median prefill (what was waited for of it), what the transfer adds after it, and
    the first token; a dot is the p50 of the whole, its line ends at p95, a black bar is the bound.

    Raises:
        BadInput: no rows, or a place that cannot be written.
    """
    panels: dict[int, list[int]] = {}
    for row in rows:
        links = panels.setdefault(row["context"], [])
        links += [row["link_bits_per_s"]] * (row["link_bits_per_s"] not in links)
    if not panels:
        raise BadInput("there is nothing to draw: no rows")
    n_links = max(map(len, panels.values()))
    n_arms = len(rows) // sum(map(len, panels.values()))
    size_in = (4.2 * n_links + 1.5, (0.38 * n_arms + 1.2) * len(panels) + 0.4)
    figure = Figure(figsize=size_in, dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    places = figure.subplots(len(panels), n_links, sharey=True, squeeze=False)
    for line, (context, links) in zip(places, panels.items(), strict=True):
        for axes, link in zip(line, links, strict=False):
            own = [r for r in rows if (r["context"], r["link_bits_per_s"]) == (context, link)]
            _draw_ttft(axes, own)
        for axes in line[len(links) :]:
            axes.set_visible(False)
    places[0, 0].invert_yaxis()  # shared: from top to bottom, as the table is
    names = places[0, 0].get_legend_handles_labels()
    figure.legend(*names, loc="outside lower center", ncols=min(5, 2 * n_links))
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror}") from error


def _name(row: Row) -> str:
    chunks = "" if row["chunk"] is None else f", {row['chunk']} at a time"
    return f"{row['policy']} {row['budget'] or ''}".strip() + chunks


def _draw_ttft(axes: Axes, rows: Sequence[Row]) -> None:
    names = [_name(row) for row in rows]
    # The cache may be complete over there while the prefill's last layer is still computed here.
    prefill = [row["prefill_s"] + min(0.0, row["exposed_s"]) for row in rows]
    after = [max(0.0, row["exposed_s"]) for row in rows]
    widths = (prefill, after, [row["first_token_s"] for row in rows])
    left = [0.0] * len(rows)
    for (name, colour), width in zip(PARTS, widths, strict=True):
        axes.barh(names, width, left=left, color=colour, label=name, height=0.7)
        left = [a + b for a, b in zip(left, width, strict=True)]
    p50, p95 = ([r[f"ttft_{p}_s"] for r in rows] for p in ("p50", "p95"))
    spread = [[0.0] * len(rows), [b - a for a, b in zip(p50, p95, strict=True)]]
    axes.errorbar(p50, names, xerr=spread, fmt="o", color="black", ms=4, label="p50 to p95")
    bounds = [row["bound_s"] for row in rows]
    axes.scatter(bounds, names, marker="|", s=260, color="black", label="bound", zorder=3)
    axes.set_xlim(left=0)
    axes.set_title(f"{rows[0]['context']} tokens, {rows[0]['link_bits_per_s'] / 1e9:g} Gbps")
    axes.set_xlabel("seconds")
