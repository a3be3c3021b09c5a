"""The learning curve as a picture, drawn anew while the run goes on."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import msgspec

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from kvprism.errors import BadInput
from training.loop import CURVE, LOSS, Point


def read(folder: Path) -> list[Point]:
    """The points of a run, a resumed one's repeated steps once.

    Raises:
        BadInput: no curve there, or a damaged one.
    """
    path = folder / CURVE
    try:
        found = [msgspec.json.decode(line, type=Point) for line in path.read_bytes().splitlines()]
    except (OSError, msgspec.DecodeError) as error:
        raise BadInput(f"{path} is not the learning curve of a run: {error}") from error
    # What was learnt after the last checkpoint is learnt again: the later points stand.
    kept: list[Point] = []
    for point in found:
        while kept and kept[-1].step >= point.step:
            kept.pop()
        kept.append(point)
    return kept


def draw(folder: Path, title: str) -> Path:
    """`curve.svg` in the run's folder: losses above, shares of answer tokens right below."""
    points = read(folder)
    figure, (losses, hits) = plt.subplots(
        2, 1, figsize=(9, 7), sharex=True, constrained_layout=True, height_ratios=(2, 3)
    )
    for name in sorted({name for point in points for name in point.figures}):
        axes = losses if name.endswith(LOSS) else hits
        shown = [(p.tokens / 1e6, p.figures[name]) for p in points if name in p.figures]
        axes.plot(*zip(*shown, strict=True), label=name.removesuffix(LOSS), linewidth=1.3)
    for axes, label in ((losses, "nats per token"), (hits, "answer tokens right")):
        axes.set_ylabel(label)
        axes.grid(alpha=0.25)
        if axes.lines:
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
        _mark_stages(axes, points)
    hits.set_ylim(0, 1)
    hits.set_xlabel("million tokens")
    figure.suptitle(title)
    path = folder / "curve.svg"
    figure.savefig(path)
    plt.close(figure)
    return path


def _mark_stages(axes: Any, points: Sequence[Point]) -> None:
    begun: dict[int, Point] = {}
    for point in points:
        begun.setdefault(point.length, point)
    for length, point in begun.items():
        axes.axvline(point.tokens / 1e6, color="0.7", linewidth=0.8, linestyle=":")
        axes.annotate(
            str(length),
            (point.tokens / 1e6, 1),
            xycoords=("data", "axes fraction"),
            xytext=(2, -9),
            textcoords="offset points",
            fontsize=7,
            color="0.4",
        )
