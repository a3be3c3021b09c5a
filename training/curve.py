"""The learning curve as a picture, drawn anew while the run goes on."""

from collections.abc import Iterator, Sequence
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
        shown = list(_told(points, name))
        axes.plot(*zip(*shown, strict=True), label=name.removesuffix(LOSS), linewidth=1.3)
    for axes, label in ((losses, "nats per token"), (hits, "answer tokens right")):
        axes.set_ylabel(label)
        axes.grid(alpha=0.25)
        if axes.lines:
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
    _mark_stages(losses, hits, points)
    hits.set_ylim(0, 1)
    hits.set_xlabel("million tokens")
    figure.suptitle(title)
    path = folder / "curve.svg"
    figure.savefig(path)
    plt.close(figure)
    return path


def _told(points: Sequence[Point], name: str) -> Iterator[tuple[float, float]]:
    """Where a figure moved: an average stands still where the stage has no such sequences."""
    last: float | None = None
    for point in points:
        value = point.figures.get(name, last)
        if value is not None and value != last:
            yield point.tokens / 1e6, value
        last = value


def _mark_stages(losses: Any, hits: Any, points: Sequence[Point]) -> None:
    """A line where a stage begins, and above it the length of its sequences."""
    begun: dict[int, Point] = {}
    for point in points[:-1]:  # the last one may stand in a stage that never began
        begun.setdefault(point.stage, point)
    for point in list(begun.values())[1:]:
        for axes in (losses, hits):
            axes.axvline(point.tokens / 1e6, color="0.7", linewidth=0.8, linestyle=":")
        losses.annotate(
            str(point.length),
            (point.tokens / 1e6, 1),
            xycoords=("data", "axes fraction"),
            xytext=(2, -2),
            textcoords="offset points",
            rotation=90,  # stages may be shorter than their number is wide
            verticalalignment="top",
            fontsize=7,
            color="0.4",
        )
