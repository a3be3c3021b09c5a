"""`bench transport`: two real processes, a row for each size and transport."""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from kvprism.commands import bench_transport
from kvprism.errors import TransportError

from .conftest import Run, failure, read_json


@pytest.fixture(scope="module")
def other() -> Iterator[Any]:
    """The receiving process: both tests are served by one, which starts for seconds."""
    with bench_transport._other_process() as other:
        yield other


def test_a_row_for_every_size_and_transport(
    run: Run, tmp_path: Path, other: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_transport, "_other_process", lambda: nullcontext(other))
    file = tmp_path / "transport.json"
    result = run("bench", "transport", "--mib", "1,2", "--repeats", 2, "--json", file)
    assert result.exit_code == 0, result.output
    rows: list[dict[str, Any]] = read_json(file)["rows"]
    assert [row["transport"] for row in rows] == ["tcp", "shm"] * 2
    for row, mib in zip(rows, (1, 1, 2, 2), strict=True):
        assert mib * 2**20 < row["wire_bytes"] < 1.05 * mib * 2**20
        assert 0 < row["encode_s_p50"] + row["decode_s_p50"] < 2 * row["seconds_p50"]
        assert (row["times_tcp"] == 1) == (row["transport"] == "tcp")


def test_nothing_is_timed_that_did_not_arrive(other: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_transport, "_other_process", lambda: nullcontext(other))
    monkeypatch.setattr(bench_transport, "_digest", lambda kv: "another")
    with pytest.raises(TransportError, match="another cache arrived; nothing was timed"):
        bench_transport.bench_transport([1], 2)


def test_sizes_must_be_positive(run: Run) -> None:
    result = run("bench", "transport", "--mib", "0")
    assert result.exit_code == 2
    assert "at least 1 MiB" in failure(result)
