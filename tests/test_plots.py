"""Bench rows become a picture; what cannot be drawn or written is refused."""

from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from kvprism.errors import BadInput
from kvprism.plots import write_ttft_plot

ROW = {
    "context": 64,
    "policy": "raw",
    "budget": None,
    "chunk": None,
    "link_bits_per_s": 10**8,
    "prefill_s": 1.0,
    "exposed_s": -0.2,
    "first_token_s": 0.1,
    "ttft_p50_s": 0.9,
    "ttft_p95_s": 1.2,
    "bound_s": 0.8,
}


def rows(*links: int) -> list[dict[str, Any]]:
    arms = (ROW, ROW | {"policy": "spectrum", "budget": "0.3", "exposed_s": 0.5})
    return [arm | {"link_bits_per_s": link} for link in links for arm in arms]


def test_a_panel_for_every_link(tmp_path: Path) -> None:
    widths = []
    for links in ((10**8,), (10**8, 10**9)):
        write_ttft_plot(rows(*links), tmp_path / "plot.png")
        picture = imread(tmp_path / "plot.png")
        widths.append(picture.shape[1])
        assert len({tuple(pixel) for pixel in picture.reshape(-1, picture.shape[2])[::97]}) > 3
    assert widths[1] > 1.5 * widths[0]


def test_a_row_of_panels_for_every_context(tmp_path: Path) -> None:
    of_two = rows(10**8) + [row | {"context": 128} for row in rows(10**8, 10**9)]
    sizes = []
    for drawn in (rows(10**8, 10**9), of_two):
        write_ttft_plot(drawn, tmp_path / "plot.png")
        sizes.append(imread(tmp_path / "plot.png").shape)
    assert sizes[1][0] > 1.5 * sizes[0][0] and sizes[1][1] == sizes[0][1]


def test_what_cannot_be_drawn_or_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no rows"):
        write_ttft_plot([], tmp_path / "plot.png")
    with pytest.raises(BadInput, match="cannot write"):
        write_ttft_plot(rows(1), tmp_path / "nowhere" / "plot.png")
