"""Bytes -> events, without I/O and without copies.

The reader always wants one buffer filled: a head, then its body, then, after a manifest, the whole
segment area. The caller receives straight into it:

    buffer = reader.next_buffer()
    events = reader.advance(connection.recv_into(buffer))

    wants   when filled                                   then wants
    head    type and length checked                       body
    body    event: the message                            head; after a Manifest: area
    area    event: Segments or DamagedSegments            head

The area is allocated by the first `next_buffer()` after its Manifest event, so a caller that
refuses the manifest has allocated nothing. After an error every call raises that error again.
"""

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from kvprism.errors import Truncated, WireError
from kvprism.wire.frames import (
    DEFAULT_LIMITS,
    DIGEST_BLOCK,
    HEAD_NBYTES,
    Buffer,
    FrameHead,
    Limits,
    block_digest,
    padded,
    parse_head,
    segments_nbytes,
    unpack,
)
from kvprism.wire.messages import Manifest, Message

_CACHE_LINE = 64


@dataclass(frozen=True)
class Segments:
    """The segment area of `manifest` is complete and every digest is right."""

    manifest: Manifest
    area: memoryview


@dataclass(frozen=True)
class DamagedSegments:
    """A digest or the padding is wrong, but the framing is intact: the stream goes on."""

    manifest: Manifest


Event = Message | Segments | DamagedSegments


class StreamReader:
    """The events of a byte stream, however it is cut.

    `allocate(nbytes)` gives the memory of a segment area: at least that many writable bytes.
    Without it an area's memory is used again as soon as nobody holds a view of it.
    """

    def __init__(
        self, limits: Limits = DEFAULT_LIMITS, allocate: Callable[[int], Buffer] | None = None
    ) -> None:
        self._limits = limits
        self._allocate = allocate or _AreaMemory()
        self._error: WireError | None = None
        self._head: FrameHead | None = None
        self._area: _AreaCheck | None = None
        self._wanted, self._filled = memoryview(bytearray(HEAD_NBYTES)), 0

    def next_buffer(self) -> memoryview:
        """The writable memory in which the next bytes of the stream belong; never empty."""
        if self._error is not None:
            raise self._error
        if self._area is not None and not self._wanted:
            nbytes = self._area.nbytes
            self._wanted = memoryview(self._allocate(nbytes)).cast("B")[:nbytes]
            assert len(self._wanted) == nbytes
        return self._wanted[self._filled :]

    def advance(self, n: int) -> list[Event]:
        """What the `n` bytes just written into `next_buffer()` complete.

        Raises:
            WireError: the stream is not valid; see `frames.parse_head` and `frames.unpack`.
        """
        if self._error is not None:
            raise self._error
        assert 0 < n <= len(self._wanted) - self._filled
        self._filled += n
        try:
            return self._progress()
        except WireError as error:
            self._error = error
            raise

    def feed(self, data: Buffer) -> list[Event]:
        """The events that `data` completes; it is copied, into areas that nobody checked first."""
        view = memoryview(data).cast("B")
        events: list[Event] = []
        while view:
            buffer = self.next_buffer()
            n = min(len(buffer), len(view))
            buffer[:n] = view[:n]
            view = view[n:]
            events += self.advance(n)
        return events

    def close(self) -> None:
        """No more bytes will come.

        Raises:
            Truncated: in the middle of a frame or of a segment area.
        """
        if self._error is not None:
            raise self._error
        if self._head is not None or self._area is not None or self._filled:
            raise Truncated(f"the stream ends {self._filled} bytes into {self._place()}")

    def _progress(self) -> list[Event]:
        if self._area is not None:
            self._area.check(self._wanted, self._filled)
        if self._filled < len(self._wanted):
            return []
        if self._area is not None:
            event = self._area.event(self._wanted)
            self._want_head()
            return [event]
        if self._head is None:
            self._head = parse_head(self._wanted)
            self._want(bytearray(self._head.body_nbytes))
            return []
        return self._take_message(unpack(self._head, self._wanted, self._limits))

    def _take_message(self, message: Message) -> list[Event]:
        self._want_head()
        if not isinstance(message, Manifest):
            return [message]
        area = _AreaCheck(message)
        if not area.nbytes:
            return [message, area.event(memoryview(b""))]
        self._area = area
        self._want(b"")  # allocated by next_buffer
        return [message]

    def _want_head(self) -> None:
        self._head = self._area = None
        self._want(bytearray(HEAD_NBYTES))

    def _want(self, buffer: Buffer) -> None:
        self._wanted = memoryview(buffer)
        self._filled = 0

    def _place(self) -> str:
        if self._area is not None:
            sequence, nbytes = self._area.manifest.sequence, self._area.nbytes
            return f"the segments of manifest {sequence} ({nbytes} bytes)"
        if self._head is not None:
            return f"a {self._head.kind.__name__} frame's body of {self._head.body_nbytes} bytes"
        return "a frame's head"


def parse(blob: Buffer, limits: Limits = DEFAULT_LIMITS) -> Iterator[Event]:
    """The events of a whole stream in memory; segment areas are views of `blob`, nothing is copied.

    Raises:
        Truncated: the stream ends inside a frame or a segment area.
        WireError: see `frames.parse_head` and `frames.unpack`.
    """
    rest = memoryview(blob).cast("B")

    def take(nbytes: int, what: str) -> memoryview:
        nonlocal rest
        if nbytes > len(rest):
            raise Truncated(f"the stream ends {len(rest)} bytes into {what} of {nbytes} bytes")
        taken, rest = rest[:nbytes], rest[nbytes:]
        return taken

    while rest:
        head = parse_head(take(HEAD_NBYTES, "a frame's head"))
        message = unpack(
            head, take(head.body_nbytes, f"a {head.kind.__name__} frame's body"), limits
        )
        yield message
        if isinstance(message, Manifest):
            area = take(segments_nbytes(message), f"the segments of manifest {message.sequence}")
            check = _AreaCheck(message)
            check.check(area, len(area))
            yield check.event(area)


class _AreaMemory:
    """Gives the same memory again once it is free: on loopback, fresh pages halve the rate.

    It starts at a cache line: the kernel copies less than half as fast to where a bytearray starts.
    """

    def __init__(self) -> None:
        self._memory = bytearray(_CACHE_LINE)

    def __call__(self, nbytes: int) -> memoryview:
        try:
            self._memory.append(self._memory.pop())  # refused while anybody holds a view
            fits = len(self._memory) >= nbytes + _CACHE_LINE
        except BufferError:
            fits = False
        if not fits:
            self._memory = bytearray(nbytes + _CACHE_LINE)
        first = -ctypes.addressof(ctypes.c_char.from_buffer(self._memory)) % _CACHE_LINE
        return memoryview(self._memory)[first:]


class _AreaCheck:
    """Verifies a segment area while it arrives, when its bytes are still in the cache."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.nbytes = segments_nbytes(manifest)
        self._intact = True
        self._spans = _spans(manifest)
        self._next = next(self._spans, None)

    def check(self, area: memoryview, filled: int) -> None:
        while self._next is not None and self._next[1] <= filled:
            start, stop, digest = self._next
            piece = area[start:stop]
            self._intact &= not any(piece) if digest is None else block_digest(piece) == digest
            self._next = next(self._spans, None)

    def event(self, area: memoryview) -> Event:
        return Segments(self.manifest, area) if self._intact else DamagedSegments(self.manifest)


def _spans(manifest: Manifest) -> Iterator[tuple[int, int, bytes | None]]:
    """(start, stop, digest) of each 64 KiB and, with no digest, of each padding."""
    start = 0
    for block in manifest.blocks:
        for segment in block.segments:
            stop, end = start + segment.nbytes, start + padded(segment.nbytes)
            for i, at in enumerate(range(start, stop, DIGEST_BLOCK)):
                yield at, min(at + DIGEST_BLOCK, stop), segment.digests[8 * i : 8 * i + 8]
            if stop < end:
                yield stop, end, None
            start = end
