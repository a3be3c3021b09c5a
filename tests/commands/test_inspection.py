"""What inspect says of a saved stream, whole, cut and damaged."""

from pathlib import Path

import pytest
import torch

import kvprism
from kvprism.tensors import LayerKV, LayerView, RequestKV

from .conftest import Run, failure, read_json

LAYERS, HEADS, TOKENS, CHANNELS = 2, 2, 40, 16


@pytest.fixture(scope="module")
def stream() -> bytes:
    positions = torch.arange(TOKENS)
    layers = tuple(
        LayerKV(i, {n: torch.randn(HEADS, TOKENS, CHANNELS).bfloat16() for n in "kv"}, positions)
        for i in range(LAYERS)
    )
    view = [LayerView(layer) for layer in layers]
    plan = kvprism.plan(view, "sinks-recent", "60%")
    return kvprism.encode(RequestKV(layers, TOKENS), plan)


def test_a_saved_stream_is_counted_to_the_byte(run: Run, tmp_path: Path, stream: bytes) -> None:
    file, json = tmp_path / "stream.kvp", tmp_path / "stream.json"
    file.write_bytes(stream)
    result = run("inspect", file, "--json", json)
    assert result.exit_code == 0
    assert "complete, every digest is right" in result.stdout
    found = read_json(json)
    assert found["wire_bytes"] == len(stream)
    assert sum(found["plane_bytes"].values()) + found["overhead_bytes"] == len(stream)
    assert sum(found["rows_per_tier"].values()) == LAYERS * 2 * HEADS * TOKENS
    kept = kvprism.decode(stream).layers[0].positions
    assert found["rows_per_tier"]["native"] == LAYERS * 2 * HEADS * len(kept)
    assert found["next_position"] == TOKENS


@pytest.mark.parametrize("nbytes", [0, 5, 300, -1])
def test_a_truncated_stream_is_refused(
    run: Run, tmp_path: Path, stream: bytes, nbytes: int
) -> None:
    file = tmp_path / "stream.kvp"
    file.write_bytes(stream[:nbytes])
    result = run("inspect", file)
    assert result.exit_code == 3
    assert failure(result).startswith(f"error: Truncated: {file}: the stream ends")


@pytest.mark.parametrize("place", [0.001, 0.2, 0.5, 0.8, 0.999])
def test_a_flipped_bit_is_found(run: Run, tmp_path: Path, stream: bytes, place: float) -> None:
    damaged = bytearray(stream)
    damaged[int(place * len(stream))] ^= 1
    file = tmp_path / "stream.kvp"
    file.write_bytes(damaged)
    result = run("inspect", file)
    assert result.exit_code == 3
    assert str(file) in failure(result)


def test_other_files_and_no_files_are_refused(run: Run, tmp_path: Path, text: Path) -> None:
    assert "not a kvprism stream" in failure(run("inspect", text))
    missing = run("inspect", tmp_path / "missing")
    assert missing.exit_code == 2
    assert "No such file" in failure(missing)
