"""`kvprism bench codec`: the codec against a copy of the same bytes; checked before it is timed."""

import ctypes
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

import numpy as np
import torch

from kvprism.codec import backend, cpu, reference
from kvprism.commands import console
from kvprism.core import MENUS, NATIVE, ONE_WIDTH_MENUS, Tier
from kvprism.errors import BadInput, CodecError, UnknownName
from kvprism.evaluate.rows import provenance
from kvprism.layout import Plane, TierArray, check_menu, plane_nbytes
from kvprism.tensors import DTYPES

HEADS = 8
# Eager torch takes a second where a kernel takes a fiftieth: its median needs no more.
REFERENCE_REPEATS = 5
ENCODE, DECODE = "encode", "decode"
# Without the conditioned code, whose work depends on a profile.
CODES = {name: m for name, m in (MENUS | ONE_WIDTH_MENUS).items() if name != "conditioned"}

Say = Callable[[int, int], None]
Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One row of the result; `nbytes`: of the cache that is encoded or restored."""

    direction: str
    bits: int
    dtype: str
    backend: str
    threads: int
    nbytes: int
    channels: int
    code: str = "nested"

    @property
    def menu(self) -> tuple[Tier, ...]:
        return CODES[self.code]

    @property
    def tier(self) -> int:
        """Its index in the menu."""
        return next(i for i, tier in enumerate(self.menu) if tier.bits == self.bits)


class Timed(NamedTuple):
    """Seconds of each repeat, and of the copy right after it."""

    work: list[float]
    copy: list[float]


def run_bench(
    mib: list[int],
    threads: list[int],
    dtype: str,
    channels: int,
    repeats: int,
    advance: Say = lambda done, total: None,
    codes: Sequence[str] = ("nested",),
) -> list[Row]:
    """Time every case; a row for each code, backend, direction, width, thread count and size.

    mib: sizes of the cache in MiB; advance: called with (cases done, all cases); codes: of `CODES`.

    Raises:
        BadInput: sizes or threads that are not positive, or channels that a code cannot cut.
        UnknownName: no such dtype or code.
        CodecError: the kernels are broken, or their bytes are not the reference's.
    """
    _check(mib, threads, dtype, channels, codes)
    cases = [case for code in codes for case in _cases(mib, threads, dtype, channels, code)]
    before = torch.get_num_threads()
    rows = []
    try:
        for done, case in enumerate(cases):
            advance(done, len(cases))
            torch.set_num_threads(case.threads)
            rows.append(_measured(case, repeats))
    finally:
        torch.set_num_threads(before)
    return rows


def _check(
    mib: list[int], threads: list[int], dtype: str, channels: int, codes: Sequence[str]
) -> None:
    if min(*mib, *threads, 1) < 1:
        raise BadInput(f"sizes and threads must be at least 1, got {mib} and {threads}")
    if channels < 2 or channels % 2:
        raise BadInput(f"a row has an even number of channels, got {channels}")
    if dtype not in DTYPES:
        raise UnknownName("dtype", dtype, list(DTYPES))
    for code in codes:
        if code not in CODES:
            raise UnknownName("codec", code, list(CODES))
        check_menu(CODES[code], channels, DTYPES[dtype].itemsize)


def _cases(
    mib: list[int], threads: list[int], dtype: str, channels: int, code: str
) -> Iterator[Case]:
    empty = torch.empty(1, 1, channels, dtype=DTYPES[dtype])
    suits = cpu.library() is not None and cpu.suits(empty, CODES[code])
    backends = [backend.REFERENCE, *[backend.CPU] * suits]
    widths = sorted(tier.bits for tier in CODES[code] if 0 < tier.bits < NATIVE.bits)
    for size in mib:
        for n in threads:
            for direction in (ENCODE, DECODE):
                for bits in widths:
                    for codec in backends:
                        nbytes = size * 2**20
                        yield Case(direction, bits, dtype, codec, n, nbytes, channels, code)


class _Bench:
    """The buffers of one case, written once before anything is timed: pages are there."""

    def __init__(self, case: Case) -> None:
        self.case = case
        dtype = DTYPES[case.dtype]
        tokens = case.nbytes // (HEADS * case.channels * dtype.itemsize)
        if not tokens:
            raise BadInput(f"{case.nbytes} bytes hold no token of {HEADS} x {case.channels}")
        drawn = torch.Generator().manual_seed(0)
        self.x = torch.randn(HEADS, tokens, case.channels, generator=drawn).to(dtype)
        self.out, self.copied = torch.zeros_like(self.x), torch.zeros_like(self.x)
        self.tiers: TierArray = np.full((HEADS, tokens), case.tier, np.uint8)
        self.planes = self.new_planes()
        reference.encode_into(self.x, self.tiers, case.menu, self.planes)

    @property
    def nbytes(self) -> int:
        return self.x.numel() * self.x.element_size()

    @property
    def plane_nbytes(self) -> int:
        return sum(len(data) for data in self.planes.values())

    def new_planes(self) -> dict[Plane, memoryview]:
        sizes = plane_nbytes(self.tiers, self.case.menu, self.case.channels, self.x.element_size())
        return {plane: memoryview(bytearray(size)) for plane, size in sizes.items()}

    def work(self) -> None:
        """Encode or decode once."""
        menu = self.case.menu
        own = {"threads": self.case.threads} if self.case.backend == backend.CPU else {}
        codec: Any = cpu if self.case.backend == backend.CPU else reference
        if self.case.direction == ENCODE:
            codec.encode_into(self.x, self.tiers, menu, self.planes, **own)
        else:
            codec.decode_into(self.planes, self.tiers, menu, self.out, **own)

    def check(self) -> None:
        """Raises `CodecError` unless `work` makes what the reference makes."""
        expected, restored = self.planes, torch.zeros_like(self.out)
        reference.decode_into(expected, self.tiers, self.case.menu, restored)
        self.planes = self.new_planes() if self.case.direction == ENCODE else expected
        self.work()
        if self.case.direction == ENCODE:
            same = all(self.planes[plane] == data for plane, data in expected.items())
        else:
            same = torch.equal(self.out.view(torch.uint8), restored.view(torch.uint8))
        if not same:
            raise CodecError(f"{self.case}: not what the reference makes; nothing was timed")

    def copy(self, pool: ThreadPoolExecutor) -> None:
        """memcpy of as many bytes as the cache has, in as many threads as the codec may use."""
        n, total = self.case.threads, self.nbytes
        ends = [total * i // n for i in range(n + 1)]
        into, source = self.copied.data_ptr(), self.x.data_ptr()
        shares = [(into + a, source + a, b - a) for a, b in pairwise(ends)]
        if n == 1:
            ctypes.memmove(*shares[0])
        else:
            list(pool.map(lambda share: ctypes.memmove(*share), shares))


def _measured(case: Case, repeats: int) -> Row:
    bench = _Bench(case)
    bench.check()
    n = repeats if case.backend == backend.CPU else min(repeats, REFERENCE_REPEATS)
    with ThreadPoolExecutor(case.threads) as pool:
        bench.copy(pool)
        timed = Timed([], [])
        for _ in range(n):
            timed.work.append(_seconds(bench.work))
            timed.copy.append(_seconds(lambda: bench.copy(pool)))
    return _row(case, bench, timed)


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def quartiles(values: list[float]) -> list[float]:
    """The lower quartile, the median and the upper one; three times the same of a single value."""
    return quantiles(values, n=4) if len(values) > 1 else values * 3


def _row(case: Case, bench: _Bench, timed: Timed) -> Row:
    seconds, copy_s = median(timed.work), median(timed.copy)
    ratios = [copy / work for work, copy in zip(timed.work, timed.copy, strict=True)]
    low, ratio, high = quartiles(ratios)
    nbytes = bench.nbytes
    return {
        "code": case.code,
        "direction": case.direction,
        "bits": case.bits,
        "dtype": case.dtype,
        "backend": case.backend,
        "threads": case.threads,
        "channels": case.channels,
        "raw_bytes": nbytes,
        "plane_bytes": bench.plane_nbytes,
        "seconds_p50": seconds,
        "gb_per_s": nbytes / seconds / 1e9,
        "memcpy_gb_per_s": nbytes / copy_s / 1e9,
        "ratio_to_memcpy": ratio,
        "ratio_quartiles": [low, high],
        "roofline_share": ratio * (nbytes + bench.plane_nbytes) / (2 * nbytes),
        "repeats": len(timed.work),
    }


def with_provenance(rows: list[Row]) -> dict[str, Any]:
    """The rows, and what they were measured on."""
    made = provenance()
    return {
        "commit": made.commit,
        "versions": made.versions,
        "date": datetime.now(UTC).date().isoformat(),
        "processor": _processor(),
        "processors": os.cpu_count(),
        "load": os.getloadavg()[0],
        "rows": rows,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def show_bench(rows: list[Row]) -> None:
    """Print a table for each size; the last column is the gain over the reference."""
    if all(row["backend"] == backend.REFERENCE for row in rows):
        console.note("no C kernels were compiled (kvprism doctor): the reference alone")
    for nbytes in dict.fromkeys(row["raw_bytes"] for row in rows):
        own = [row for row in rows if row["raw_bytes"] == nbytes]
        title = f"{console.size(nbytes)} of {own[0]['dtype']}, rows of {own[0]['channels']}"
        columns = ["", "threads", "GB/s", "memcpy", "of memcpy", "of roofline", "reference ×"]
        console.table(title, columns, [_cells(row, own) for row in own])


def _cells(row: Row, rows: list[Row]) -> list[str]:
    case = ("code", "direction", "bits", "threads")
    slow = next(
        each
        for each in rows
        if each["backend"] == backend.REFERENCE and all(each[key] == row[key] for key in case)
    )
    return [
        f"{row['direction']} {row['code']} INT{row['bits']}, {row['backend']}",
        str(row["threads"]),
        f"{row['gb_per_s']:.2f}",
        f"{row['memcpy_gb_per_s']:.2f}",
        f"{row['ratio_to_memcpy']:.2f}",
        f"{row['roofline_share']:.2f}",
        f"{slow['seconds_p50'] / row['seconds_p50']:.1f}",
    ]
