"""The nested code and the affine ones on the CPU at memory speed: `cpu*.c`, through ctypes.

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
from kvprism.codec.affine import UNSOUND_NUMBER
from kvprism.codec.condition import turns
from kvprism.codec.planes import UNSOUND_SCALE
from kvprism.codec.reference import Conditioned
from kvprism.core import (
    AFFINE_CODEC,
    CONDITIONED_CODEC,
    DROP_CODEC,
    GROUPED_CODEC,
    HADAMARD_CODEC,
    KEYS,
    KIVI_CODEC,
    MAX_MENU,
    NATIVE_CODEC,
    NESTED_CODEC,
    Tier,
)
from kvprism.errors import CodecError
from kvprism.layout import Plane, Scales, TierArray, rows_in, scales_of

SOURCES = "cpu*.[ch]"
LIBRARY = Path(__file__).with_name("libkvprism.so")
# Below this a second thread costs more than it saves.
MIN_NBYTES_PER_THREAD = 2**20
# Restored caches of this size are written around the processor's caches (`stream` of cpu.h);
# smaller ones may still be there when they are read. Not asked of the machine: a virtual one may
# say 256 MiB (sysconf) where it has 32.
MIN_NBYTES_STREAMED = 2**26
WIDEST = 256  # channels of a row that is no plain one of kvp.nested/1, as in cpu.h

# As in cpu.h.
_DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_SKIP, _NATIVE, _EIGHT, _FOUR = range(4)
_CODECS = (NESTED_CODEC, CONDITIONED_CODEC, AFFINE_CODEC, HADAMARD_CODEC, GROUPED_CODEC)
_KINDS = {
    (DROP_CODEC, 0): _SKIP,
    (NATIVE_CODEC, 16): _NATIVE,
    **{(codec, 8): _EIGHT for codec in _CODECS},
    **{(codec, 4): _FOUR for codec in (*_CODECS, KIVI_CODEC)},
}
_PLANES = tuple(Plane)
_Counts = ctypes.c_int64 * 4


class _Block(ctypes.Structure):
    """`Block` of cpu.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("rows", "tiers")),
        *((plane.name.lower(), ctypes.c_void_p) for plane in _PLANES),
        *((name, ctypes.c_int64) for name in ("head_stride", "token_stride")),
        *((name, ctypes.c_int64) for name in ("tier_head_stride", "tier_token_stride")),
        *((name, ctypes.c_int64) for name in ("tokens", "channels", "itemsize", "group")),
        ("dtype", ctypes.c_int32),
        ("large", ctypes.c_int32),
        ("kind", ctypes.c_uint8 * MAX_MENU),
        *((name, ctypes.c_void_p) for name in ("cosine", "sine", "offset", "divisor")),
        ("normal", ctypes.c_float),
    )


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where none were compiled.

    Raises:
        CodecError: they are there, and cannot be loaded or were made from other sources.
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
        raise CodecError(f"{LIBRARY} was made from another {SOURCES}; {way_out}")
    rows = (ctypes.POINTER(_Block), ctypes.c_int64, ctypes.c_int64)
    loaded.kvprism_count.argtypes = (*rows, ctypes.c_int64, _Counts)
    for name in ("encode", "decode", "encode_affine", "decode_affine"):
        getattr(loaded, f"kvprism_{name}").argtypes = (*rows, _Counts)
    for name in ("scales", "numbers"):
        getattr(loaded, f"kvprism_{name}_are_sound").argtypes = (ctypes.c_void_p, ctypes.c_int64)
    loaded.kvprism_count.restype = None
    return loaded


def source_hash() -> str:
    """What the library says of the sources that it was made from (`scripts/build-codec`)."""
    paths = sorted(Path(__file__).parent.glob(SOURCES))
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:16]


def suits(
    x: torch.Tensor,
    menu: Sequence[Tier],
    conditioned: Conditioned | None = None,
    component: str = KEYS,
) -> bool:
    """Whether the kernels can read and write `x` `[head, token, channel]` in tiers of `menu`."""
    return (
        x.device.type == "cpu"
        and x.dtype in _DTYPES
        and x.numel() > 0
        and x.stride(-1) == 1
        and x.data_ptr() % x.element_size() == 0
        and all((tier.codec, tier.bits) in _KINDS for tier in menu)
        and (conditioned is None or x.shape[-1] <= WIDEST)
        and _cuts(x.shape[-1], menu, conditioned, component)
    )


def _cuts(
    channels: int, menu: Sequence[Tier], conditioned: Conditioned | None, component: str
) -> bool:
    """Whether rows of so many channels can be cut into the groups of a menu's affine code."""
    scales = _affine_scales(menu, component)
    if scales is None:
        return True
    rotates = any(tier.codec == HADAMARD_CODEC for tier in menu)
    whole = channels & (channels - 1) == 0 if rotates else channels % (scales.channels or 1) == 0
    return conditioned is None and channels <= WIDEST and whole


def _affine_scales(menu: Sequence[Tier], component: str) -> Scales | None:
    """What shares a scale and an offset, where a menu's code has offsets."""
    found = (scales_of(tier.codec, component) for tier in menu)
    return next((scales for scales in found if scales.numbers == 2), None)


def encode_into(
    x: torch.Tensor,
    tier_of: TierArray,
    menu: Sequence[Tier],
    planes: Mapping[Plane, memoryview],
    first: tuple[int, int] = (0, 0),
    conditioned: Conditioned | None = None,
    component: str = KEYS,
    threads: int | None = None,
) -> None:
    """`reference.encode_into`, of tensors that `suits` accepts.

    threads: at most so many, by default as many as torch uses.

    Raises:
        CodecError: as the reference, and for planes of other sizes than the tiers need.
    """
    call = _Call(x, tier_of, menu, planes, conditioned, component, encode=True)
    if not all(call.in_shares(threads)) or not call.come_back():
        reference.encode_into(x, tier_of, menu, planes, first, conditioned, component)
        raise AssertionError("the kernels refused a row that the reference takes")


def decode_into(
    planes: Mapping[Plane, memoryview],
    tier_of: TierArray,
    menu: Sequence[Tier],
    out: torch.Tensor,
    conditioned: Conditioned | None = None,
    component: str = KEYS,
    threads: int | None = None,
) -> None:
    """`reference.decode_into`, into tensors that `suits` accepts, contiguous or not.

    threads: as in `encode_into`.

    Raises:
        CodecError: as the reference, and for planes of other sizes than the tiers need.
    """
    call = _Call(out, tier_of, menu, planes, conditioned, component, encode=False)
    call.check_scales()
    if not all(call.in_shares(threads)):
        scratch = torch.zeros(out.shape, dtype=out.dtype)
        reference.decode_into(planes, tier_of, menu, scratch, conditioned, component)
        raise AssertionError("the kernels refused a row that the reference restores")


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
        menu: Sequence[Tier],
        planes: Mapping[Plane, memoryview],
        conditioned: Conditioned | None,
        component: str,
        *,
        encode: bool,
    ) -> None:
        if tier_of.shape != rows.shape[:2] or tier_of.dtype != np.uint8:
            raise CodecError(f"tiers {tier_of.shape} do not fit rows {tuple(rows.shape)}")
        self._rows, self._tier_of, self._menu = rows, tier_of, menu
        self._conditioned = conditioned if Plane.SCALE in planes else None
        self._affine = _affine_scales(menu, component)
        work = "encode" if encode else "decode"
        self._kernel: Callable[..., int] = getattr(
            _kernels(), f"kvprism_{work}{'_affine' if self._affine else ''}"
        )
        self._data = {plane: np.frombuffer(data, np.uint8) for plane, data in planes.items()}
        if encode and not all(data.flags.writeable for data in self._data.values()):
            raise CodecError("a plane to encode into is read-only")
        self._tables = _tables(self._conditioned, undo=encode)
        self._block = self._as_block()
        self._check_planes(self._count(0, tier_of.size))

    def _as_block(self) -> _Block:
        rows, tier_of = self._rows, self._tier_of
        itemsize = rows.element_size()
        group = (self._affine and self._affine.channels) or rows.shape[2]
        return _Block(
            rows.data_ptr(),
            tier_of.ctypes.data,
            *(self._data[p].ctypes.data if p in self._data else None for p in _PLANES),
            rows.stride(0) * itemsize,
            rows.stride(1) * itemsize,
            *tier_of.strides,
            *rows.shape[1:],
            itemsize,
            group,
            _DTYPES[rows.dtype],
            rows.numel() * itemsize >= MIN_NBYTES_STREAMED,
            (ctypes.c_uint8 * MAX_MENU)(*(_KINDS[tier.codec, tier.bits] for tier in self._menu)),
            *(table.data_ptr() for table in self._tables or [torch.empty(0)] * 4),
            rows.shape[-1] ** -0.5 if self._rotates() else 0.0,
        )

    def _rotates(self) -> bool:
        given = self._conditioned
        rotates = given is not None and given.conditioning.rotate
        return rotates or any(tier.codec == HADAMARD_CODEC for tier in self._menu)

    def _count(self, first: int, last: int) -> Any:
        counts = _Counts()
        _kernels().kvprism_count(self._block, first, last, len(self._menu), counts)
        return counts

    def _check_planes(self, counts: Sequence[int]) -> None:
        """The kernels write as many rows as the tiers say, wherever a plane ends."""
        channels, itemsize = self._rows.shape[2], self._rows.element_size()
        if channels % 2 or sum(counts) != self._tier_of.size:
            raise CodecError("an odd number of channels, or a tier beyond the menu")
        native, eight, four = counts[_NATIVE], counts[_EIGHT], counts[_FOUR]
        half = channels // 2
        needed = {
            Plane.NATIVE: native * channels * itemsize,
            Plane.SCALE: self._scales_nbytes(eight + four),
            Plane.ANCHOR: (four if self._affine else eight + four) * half,
            Plane.RESIDUAL: 0 if self._affine else eight * half,
            Plane.BYTE: eight * channels if self._affine else 0,
        }
        given = {plane: data.size for plane, data in self._data.items()}
        if given != {plane: size for plane, size in needed.items() if size or plane in given}:
            raise CodecError(f"the tiers need planes of {needed} bytes, got {given}")

    def _scales_nbytes(self, quantised: int) -> int:
        scales, (heads, tokens, channels) = self._affine or Scales(), self._rows.shape
        if scales.tokens == 1:
            return scales.nbytes(quantised, channels)
        # What rows share begins anew in every head.
        counts = [self._count(head * tokens, (head + 1) * tokens) for head in range(heads)]
        return sum(scales.nbytes(count[_EIGHT] + count[_FOUR], channels) for count in counts)

    def check_scales(self) -> None:
        """Raises `CodecError` as the reference does."""
        scale = self._data.get(Plane.SCALE)
        if scale is None:
            return
        kernels, at = _kernels(), scale.ctypes.data
        if self._affine is None:
            if not kernels.kvprism_scales_are_sound(at, scale.size // 2):
                raise CodecError(UNSOUND_SCALE)
        elif not kernels.kvprism_numbers_are_sound(at, scale.size // 4):
            raise CodecError(UNSOUND_NUMBER)

    def come_back(self) -> bool:
        """Whether all rows that were conditioned and encoded are within their dtype again."""
        if self._conditioned is None:
            return True
        quantised = torch.from_numpy(rows_in(Plane.SCALE, self._tier_of, self._menu))
        scale = torch.zeros(quantised.shape)
        scale[quantised] = torch.from_numpy(self._data[Plane.SCALE].copy()).view(torch.half).float()
        fits = self._conditioned.come_back(scale, self._rows.dtype)
        return bool(fits[quantised].all())

    def in_shares(self, threads: int | None) -> list[int]:
        """What the kernel returns for each share of the rows, in threads when there are several."""
        n, nbytes = self._tier_of.size, self._rows.numel() * self._rows.element_size()
        wanted = torch.get_num_threads() if threads is None else threads
        if self._affine is not None and self._affine.tokens > 1:
            wanted = 1  # where a share's scales begin is known only when those before are counted
        shares = max(1, min(wanted, nbytes // MIN_NBYTES_PER_THREAD, n))
        if shares == 1:
            return [self._kernel(self._block, 0, n, _Counts())]
        ends = [n * i // shares for i in range(shares + 1)]
        before = self._before(ends)
        pool = _pool(os.getpid(), shares)
        return list(pool.map(self._kernel, [self._block] * shares, ends[:-1], ends[1:], before))

    def _before(self, ends: Sequence[int]) -> list[Any]:
        """Rows of each kind that stand before each share."""
        counts = [self._count(a, b) for a, b in pairwise(ends)]
        total = np.cumsum([[0] * 4, *(list(count) for count in counts[:-1])], axis=0)
        return [_Counts(*row) for row in total.tolist()]


def _tables(conditioned: Conditioned | None, *, undo: bool) -> tuple[torch.Tensor, ...] | None:
    """float32 cosines, sines, offsets and divisors as `Block` of cpu.h points to them."""
    if conditioned is None:
        return None
    given = conditioned.conditioning
    tables = (*turns(conditioned.positions, given, undo=undo), given.offset, given.scale)
    return tuple(table.float().contiguous() for table in tables)


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Kept between calls; a forked process has none of its parent's threads and gets its own."""
    return ThreadPoolExecutor(threads, f"kvprism-codec-{process}")
