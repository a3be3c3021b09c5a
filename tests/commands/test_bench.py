"""What `bench codec` and doctor say of the codec; rows are checked, speeds are not."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from kvprism.codec import cpu
from kvprism.commands import bench, doctor
from kvprism.errors import CodecError

from .conftest import Run, failure, read_json

needs_kernels = pytest.mark.skipif(
    not cpu.LIBRARY.exists(), reason="the C kernels were not compiled (scripts/build-codec)"
)
FIELDS = {
    *(
        "code",
        "direction",
        "bits",
        "dtype",
        "backend",
        "threads",
        "channels",
        "raw_bytes",
        "plane_bytes",
    ),
    *("seconds_p50", "gb_per_s", "memcpy_gb_per_s", "ratio_to_memcpy", "roofline_share", "repeats"),
    "ratio_quartiles",
}


@needs_kernels
def test_a_row_for_every_codec_direction_width_and_thread_count(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "codec.json"
    threads = torch.get_num_threads()
    result = run("bench", "codec", "--mib", "1", "--threads", "1,2", "--json", file)
    assert result.exit_code == 0, result.stderr
    assert torch.get_num_threads() == threads
    written = read_json(file)
    assert {"commit", "date", "versions", "processor", "processors", "load"} < set(written)
    rows: list[dict[str, Any]] = written["rows"]
    cases = [(r["direction"], r["bits"], r["backend"], r["threads"]) for r in rows]
    assert len(set(cases)) == len(cases) == 16
    assert all(f"{d} nested INT{b}, {codec}" in result.stdout for d, b, codec, _ in cases)
    for row in rows:
        assert set(row) == FIELDS
        assert row["raw_bytes"] == 2**20
        # A row of 128 channels at 16 bits: a scale, 64 anchor bytes, and as many of the residual.
        assert row["plane_bytes"] == 2**20 // 256 * (2 + row["bits"] * 16)
        moved = (row["raw_bytes"] + row["plane_bytes"]) / (2 * row["raw_bytes"])
        assert row["roofline_share"] == pytest.approx(row["ratio_to_memcpy"] * moved)
        low, high = row["ratio_quartiles"]
        assert low <= row["ratio_to_memcpy"] <= high
        assert row["repeats"] == (15 if row["backend"] == "cpu" else 5)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--mib", "0"], "sizes and threads must be at least 1"),
        (["--mib", "big"], "--mib takes whole numbers"),
        (["--threads", "1,-2"], "sizes and threads must be at least 1"),
        (["--channels", "7"], "an even number of channels, got 7"),
        (["--channels", "1000000"], "hold no token of 8 x 1000000"),
        (["--cache-dtype", "int8"], "unknown dtype 'int8'"),
        (["--codec", "conditioned"], "unknown codec 'conditioned'; known: nested"),
        (["--codec", "grouped", "--channels", "48"], "48"),
    ],
)
def test_what_cannot_be_measured_is_refused(run: Run, arguments: list[str], message: str) -> None:
    result = run("bench", "codec", "--mib", "1", *arguments)
    assert result.exit_code == 2
    assert message in failure(result)


def test_the_codes_of_others_are_timed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "REFERENCE_REPEATS", 1)
    codes = ["affine", "kivi", "fp8"]
    rows = bench.run_bench([1], [1], "bfloat16", 128, 1, codes=codes)
    kernels = ["reference", *["cpu"] * cpu.LIBRARY.exists()]
    assert [(r["code"], r["direction"], r["bits"], r["backend"]) for r in rows] == [
        (code, direction, bits, codec)
        for code, widths, codecs in (
            ("affine", (4, 8), kernels), ("kivi", (4,), kernels), ("fp8", (8,), ["reference"])
        )
        for direction in ("encode", "decode")
        for bits in widths
        for codec in codecs
    ]  # fmt: skip
    # A row of 128 channels: a scale and an offset, and 64 or 128 bytes.
    sizes = {(r["bits"], r["plane_bytes"]) for r in rows if r["code"] == "affine"}
    assert sizes == {(4, 2**12 * (4 + 64)), (8, 2**12 * (4 + 128))}


@needs_kernels
@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_nothing_is_timed_that_is_not_the_references(
    direction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, f"{direction}_into", lambda *given, **named: None)
    with pytest.raises(CodecError, match="not what the reference makes; nothing was timed"):
        bench.run_bench([1], [1], "bfloat16", 128, 1)


def codec_finding() -> tuple[str, str]:
    finding = doctor._finding("codec speed", doctor._codec_speed)
    return finding["state"], finding["detail"]


@needs_kernels
@pytest.mark.usefixtures("small_speed_test")
def test_doctor_compares_the_kernels_with_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVPRISM_CODEC", raising=False)
    state, detail = codec_finding()
    assert state == "ok"
    assert detail.startswith("C kernels: ") and "the torch reference is" in detail


@pytest.mark.usefixtures("small_speed_test")
def test_doctor_says_when_the_reference_runs_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVPRISM_CODEC", "reference")
    state, detail = codec_finding()
    assert state == "ok" and detail.startswith("torch reference: ")
    assert "compiler" not in detail and re.search(r"\d+ x slower than a copy", detail)
    monkeypatch.delenv("KVPRISM_CODEC")
    monkeypatch.setattr(cpu, "library", lambda: None)
    state, detail = codec_finding()
    assert state == "missing" and "install a C compiler" in detail


def test_doctor_names_kernels_that_do_not_load(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "libkvprism.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(cpu, "LIBRARY", broken)
    monkeypatch.setattr(cpu, "library", cpu.library.__wrapped__)
    monkeypatch.delenv("KVPRISM_CODEC", raising=False)
    state, detail = codec_finding()
    assert state == "broken" and "cannot be loaded" in detail
