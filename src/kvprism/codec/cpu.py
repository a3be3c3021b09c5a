"""The nested code on the CPU at memory speed: `cpu.c`, called through ctypes.

Bit for bit what `reference.py` does, and whatever the kernels refuse, the reference is asked to
refuse, so that the words are its own. ctypes lets go of the interpreter lock during a call: shares
of a block run in threads, each on rows and parts of the planes of its own.
"""

import ctypes
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvprism.codec import reference
from kvprism.codec.planes import UNSOUND_SCALE
from kvprism.codec.reference import Conditioned
from kvprism.core import CONDITIONED_CODEC, DROP_CODEC, MAX_MENU, NATIVE_CODEC, NESTED_CODEC, Tier
from kvprism.errors import CodecError
from kvprism.layout import Plane, TierArray

SOURCE = Path(__file__).with_name("cpu.c")
LIBRARY = Path(__file__).with_name("libkvprism.so")
# Below this a second thread costs more than it saves.
MIN_NBYTES_PER_THREAD = 2**20

# As in cpu.c.
_DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_SKIP, _NATIVE, _EIGHT, _FOUR = range(4)
_KINDS = {
    (DROP_CODEC, 0): _SKIP,
    (NATIVE_CODEC, 16): _NATIVE,
    (NESTED_CODEC, 8): _EIGHT,
    (NESTED_CODEC, 4): _FOUR,
    (CONDITIONED_CODEC, 8): _EIGHT,
    (CONDITIONED_CODEC, 4): _FOUR,
}
_PLANES = (Plane.NATIVE, Plane.SCALE, Plane.ANCHOR, Plane.RESIDUAL)
_Counts = ctypes.c_int64 * 4


class _Block(ctypes.Structure):
    """`Block` of cpu.c, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("rows", "tiers")),
        *((plane.name.lower(), ctypes.c_void_p) for plane in _PLANES),
        *((name, ctypes.c_int64) for name in ("head_stride", "token_stride")),
        *((name, ctypes.c_int64) for name in ("tier_head_stride", "tier_token_stride")),
        *((name, ctypes.c_int64) for name in ("tokens", "channels", "itemsize")),
        ("dtype", ctypes.c_int32),
        ("kind", ctypes.c_uint8 * MAX_MENU),
    )


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where none were compiled.

    Raises:
        CodecError: they are there, and cannot be loaded or were made from another cpu.c.
    """
    if not LIBRARY.exists():
        return None
    way_out = "install kvprism again (make setup), or set KVPRISM_CODEC=reference"
    try:
        loaded = ctypes.CDLL(str(LIBRARY))
        loaded.kvprism_source.restype = ctypes.c_char_p
        made_from = loaded.kvprism_source().decode()
    except (OSError, AttributeError) as error:
        raise CodecError(f"the codec's kernels cannot be loaded: {error}; {way_out}") from error
    if made_from != source_hash():
        raise CodecError(f"{LIBRARY} was made from another cpu.c; {way_out}")
    rows = (ctypes.POINTER(_Block), ctypes.c_int64, ctypes.c_int64)
    loaded.kvprism_count.argtypes = (*rows, ctypes.c_int64, _Counts)
    loaded.kvprism_encode.argtypes = loaded.kvprism_decode.argtypes = (*rows, _Counts)
    loaded.kvprism_scales_are_sound.argtypes = (ctypes.c_void_p, ctypes.c_int64)
    loaded.kvprism_count.restype = loaded.kvprism_decode.restype = None
    return loaded


def source_hash() -> str:
    """What the library says of the cpu.c that it was made from (`scripts/build-codec`)."""
    return hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]


def suits(x: torch.Tensor, menu: Sequence[Tier]) -> bool:
    """Whether the kernels can read and write `x` `[head, token, channel]` in tiers of `menu`."""
    return (
        x.device.type == "cpu"
        and x.dtype in _DTYPES
        and x.numel() > 0
        and x.stride(-1) == 1
        and x.data_ptr() % x.element_size() == 0
        and all((tier.codec, tier.bits) in _KINDS for tier in menu)
    )


def encode_into(
    x: torch.Tensor,
    tier_of: TierArray,
    menu: Sequence[Tier],
    planes: Mapping[Plane, memoryview],
    first: tuple[int, int] = (0, 0),
    conditioned: Conditioned | None = None,
    threads: int | None = None,
) -> None:
    """`reference.encode_into`, of tensors that `suits` accepts.

    threads: at most so many, by default as many as torch uses.

    Raises:
        CodecError: as the reference, and for planes of other sizes than the tiers need.
    """
    if conditioned is not None and Plane.SCALE in planes:
        return _encode_conditioned(x, tier_of, menu, planes, first, conditioned, threads)
    call = _Call(x, tier_of, _kinds(menu), planes, writable=True)
    if not all(call.in_shares(_kernels().kvprism_encode, threads)):
        reference.encode_into(x, tier_of, menu, planes, first)
        raise AssertionError("cpu.c refused a row that the reference takes")


def decode_into(
    planes: Mapping[Plane, memoryview],
    tier_of: TierArray,
    menu: Sequence[Tier],
    out: torch.Tensor,
    conditioned: Conditioned | None = None,
    threads: int | None = None,
) -> None:
    """`reference.decode_into`, into tensors that `suits` accepts, contiguous or not.

    threads: as in `encode_into`.

    Raises:
        CodecError: as the reference, and for planes of other sizes than the tiers need.
    """
    if conditioned is not None and Plane.SCALE in planes:
        return _decode_conditioned(planes, tier_of, menu, out, conditioned, threads)
    call = _Call(out, tier_of, _kinds(menu), planes, writable=False)
    call.check_scales()
    call.in_shares(_kernels().kvprism_decode, threads)


def _encode_conditioned(
    x: torch.Tensor,
    tier_of: TierArray,
    menu: Sequence[Tier],
    planes: Mapping[Plane, memoryview],
    first: tuple[int, int],
    conditioned: Conditioned,
    threads: int | None,
) -> None:
    """Native rows as they are; the others as torch conditions them."""
    quantised = conditioned.condition(x)
    unfit = ~reference._fits(quantised, x.dtype, menu, conditioned)
    reference._refuse(unfit, tier_of, menu, first)
    encode = _kernels().kvprism_encode
    for rows, kinds, part in _parts(x, quantised, menu, planes):
        _Call(rows, tier_of, kinds, part, writable=True).in_shares(encode, threads)


def _decode_conditioned(
    planes: Mapping[Plane, memoryview],
    tier_of: TierArray,
    menu: Sequence[Tier],
    out: torch.Tensor,
    conditioned: Conditioned,
    threads: int | None,
) -> None:
    quantised = torch.zeros(out.shape)
    for rows, kinds, part in _parts(out, quantised, menu, planes):
        call = _Call(rows, tier_of, kinds, part, writable=False)
        call.check_scales()
        call.in_shares(_kernels().kvprism_decode, threads)
    chosen = reference._rows(Plane.SCALE, tier_of, menu)
    values = quantised.view(len(chosen), -1)[chosen]
    restored = reference._restored(values, chosen, out, conditioned)
    out[chosen.view(out.shape[:2])] = restored.to(out.dtype)


def _parts(
    native: torch.Tensor,
    quantised: torch.Tensor,
    menu: Sequence[Tier],
    planes: Mapping[Plane, memoryview],
) -> list[tuple[torch.Tensor, list[int], dict[Plane, memoryview]]]:
    """A block as two: its native rows, and its quantised rows."""
    kinds = _kinds(menu)
    as_native = [kind if kind == _NATIVE else _SKIP for kind in kinds]
    as_quantised = [kind if kind != _NATIVE else _SKIP for kind in kinds]
    others = dict(planes)
    own = {plane: others.pop(plane) for plane in (Plane.NATIVE,) if plane in others}
    return [(native, as_native, dict(own)), (quantised, as_quantised, others)]


def _kinds(menu: Sequence[Tier]) -> list[int]:
    return [_KINDS[tier.codec, tier.bits] for tier in menu]


def _kernels() -> ctypes.CDLL:
    loaded = library()
    assert loaded is not None  # `suits` is asked only where there are kernels
    return loaded


class _Call:
    """One block as the kernels see it, with everything checked that they rely on.

    Raises:
        CodecError: tiers of another shape or beyond the menu, or planes of other sizes.
    """

    def __init__(
        self,
        rows: torch.Tensor,
        tier_of: TierArray,
        kinds: list[int],
        planes: Mapping[Plane, memoryview],
        *,
        writable: bool,
    ) -> None:
        if tier_of.shape != rows.shape[:2] or tier_of.dtype != np.uint8:
            raise CodecError(f"tiers {tier_of.shape} do not fit rows {tuple(rows.shape)}")
        self._rows, self._tier_of, self._menu = rows, tier_of, len(kinds)
        self._data = {plane: np.frombuffer(data, np.uint8) for plane, data in planes.items()}
        if writable and not all(data.flags.writeable for data in self._data.values()):
            raise CodecError("a plane to encode into is read-only")
        self._block = self._as_block(kinds)
        self._check_planes(self._count(0, tier_of.size))

    def _as_block(self, kinds: list[int]) -> _Block:
        rows, tier_of = self._rows, self._tier_of
        itemsize = rows.element_size()
        return _Block(
            rows.data_ptr(),
            tier_of.ctypes.data,
            *(self._data[p].ctypes.data if p in self._data else None for p in _PLANES),
            rows.stride(0) * itemsize,
            rows.stride(1) * itemsize,
            *tier_of.strides,
            *rows.shape[1:],
            itemsize,
            _DTYPES[rows.dtype],
            (ctypes.c_uint8 * MAX_MENU)(*kinds),
        )

    def _count(self, first: int, last: int) -> Any:
        counts = _Counts()
        _kernels().kvprism_count(self._block, first, last, self._menu, counts)
        return counts

    def _check_planes(self, counts: Sequence[int]) -> None:
        """The kernels write as many rows as the tiers say, wherever a plane ends."""
        channels, itemsize = self._rows.shape[2], self._rows.element_size()
        if channels % 2 or sum(counts) != self._tier_of.size:
            raise CodecError("an odd number of channels, or a tier beyond the menu")
        quantised, half = counts[_EIGHT] + counts[_FOUR], channels // 2
        needed = {
            Plane.NATIVE: counts[_NATIVE] * channels * itemsize,
            Plane.SCALE: quantised * 2,
            Plane.ANCHOR: quantised * half,
            Plane.RESIDUAL: counts[_EIGHT] * half,
        }
        given = {plane: data.size for plane, data in self._data.items()}
        if given != {plane: size for plane, size in needed.items() if size or plane in given}:
            raise CodecError(f"the tiers need planes of {needed} bytes, got {given}")

    def check_scales(self) -> None:
        """Raises `CodecError` as the reference does."""
        scale = self._data.get(Plane.SCALE)
        if scale is None:
            return
        if not _kernels().kvprism_scales_are_sound(scale.ctypes.data, scale.size // 2):
            raise CodecError(UNSOUND_SCALE)

    def in_shares(self, kernel: Callable[..., int], threads: int | None) -> list[int]:
        """What `kernel` returns for each share of the rows, in threads when there are several."""
        n, nbytes = self._tier_of.size, self._rows.numel() * self._rows.element_size()
        wanted = torch.get_num_threads() if threads is None else threads
        shares = max(1, min(wanted, nbytes // MIN_NBYTES_PER_THREAD, n))
        if shares == 1:
            return [kernel(self._block, 0, n, _Counts())]
        ends = [n * i // shares for i in range(shares + 1)]
        before = self._before(ends)
        pool = _pool(os.getpid(), shares)
        return list(pool.map(kernel, [self._block] * shares, ends[:-1], ends[1:], before))

    def _before(self, ends: Sequence[int]) -> list[Any]:
        """Rows of each kind that stand before each share."""
        counts = [self._count(a, b) for a, b in pairwise(ends)]
        total = np.cumsum([[0] * 4, *(list(count) for count in counts[:-1])], axis=0)
        return [_Counts(*row) for row in total.tolist()]


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Kept between calls; a forked process has none of its parent's threads and gets its own."""
    return ThreadPoolExecutor(threads, f"kvprism-codec-{process}")
