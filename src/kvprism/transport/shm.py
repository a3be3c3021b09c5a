"""Frames over a Unix socket, what was encoded through shared memory: two processes, one machine.

Who sends encodes into memory that it shares, and says in 16 bytes where; who receives copies it out
once, into memory of its own. So the peer cannot change what was checked before it is decoded, and
since nothing is mapped on that side, a peer that cuts its memory short is an error, not a SIGBUS.

    record  u64 nbytes, u64 offset   2^64 - 1: the bytes follow on the socket, else they lie there
                                     in the shared memory, whose descriptor comes with the first

Shared memory (memfd) and the socket's address (abstract) have no name in any file system: nothing
is left of them when a process is killed, and who holds the descriptor was given it.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import secrets
import socket
import struct
import time
import weakref
from collections.abc import Sequence
from itertools import groupby

from kvprism.errors import (
    AddressInUse,
    BadInput,
    PeerLost,
    PeerSilent,
    ProtocolViolation,
    TransportError,
    Truncated,
    Unsupported,
)
from kvprism.transport import connection
from kvprism.transport.connection import SILENCE_S, Buffer, named

HOST = "shm"  # in the place of a host: an address is shm:7000
REGION_NBYTES = 2**36  # addresses, not memory
KEPT_NBYTES = 2**28  # memory that stays for the next request: fresh pages take longer than a copy

_AT_ONCE = 2**18  # is digested while it is still in the processor's cache
_ON_SOCKET = 2**64 - 1
_RECORD = struct.Struct("<QQ")
_ANY_PORT = range(2**15, 2**16)


class Region:
    """Memory that the peer may read, given out piece by piece, and from its start after `reuse`.

    Raises:
        TransportError: the system gives no such memory.
    """

    def __init__(self) -> None:
        try:
            self.descriptor = os.memfd_create("kvprism", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            weakref.finalize(self, os.close, self.descriptor)
            os.ftruncate(self.descriptor, REGION_NBYTES)
            # The peer gets the descriptor too, and could cut the memory short under our mapping.
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, seals)
            self._memory = mmap.mmap(self.descriptor, REGION_NBYTES)
        except OSError as error:
            raise TransportError(f"no shared memory: {error.strerror}; use TCP") from error
        self._start = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._used = self._backed = 0

    def allocate(self, nbytes: int) -> memoryview:
        """The next `nbytes`; there is real memory behind them.

        Raises:
            TransportError: there is none, or the region ends before.
        """
        start, stop = self._used, self._used + nbytes
        if stop > REGION_NBYTES:
            raise TransportError(
                f"{nbytes} bytes more than the {start} that the peer has not acknowledged are over "
                f"the {REGION_NBYTES} of shared memory; send smaller requests"
            )
        if stop > self._backed:
            self._back(stop)
        self._used = -(-stop // mmap.PAGESIZE) * mmap.PAGESIZE
        return memoryview(self._memory)[start:stop]

    def reuse(self) -> None:
        """Nobody needs what `allocate` gave; the system gets back what is beyond `KEPT_NBYTES`."""
        self._used = 0
        if self._backed > KEPT_NBYTES:
            self._memory.madvise(mmap.MADV_REMOVE, KEPT_NBYTES, self._backed - KEPT_NBYTES)
            self._backed = KEPT_NBYTES

    def offset_of(self, view: memoryview) -> int | None:
        """Where these bytes lie in the region; None: elsewhere."""
        if view.obj is not self._memory:
            return None
        return ctypes.addressof(ctypes.c_char.from_buffer(view)) - self._start

    def _back(self, stop: int) -> None:
        # Else a full machine would show as a SIGBUS in the encoder.
        try:
            os.posix_fallocate(self.descriptor, self._backed, stop - self._backed)
        except OSError as error:
            raise TransportError(
                f"no {stop} bytes of memory to share: {error.strerror}; use TCP"
            ) from error
        self._backed = stop


class _Shared:
    """The peer's region: a descriptor to read from.

    Raises:
        ProtocolViolation: something else, which might block a reader or come to an end.
    """

    def __init__(self, descriptor: int, peer: str) -> None:
        self.descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)
        try:
            sealed = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
        except OSError:
            sealed = 0
        if not sealed:
            raise ProtocolViolation(f"{peer} shares something that is no memory of a fixed size")
        self.nbytes = os.fstat(descriptor).st_size


class Connection(connection.Connection):
    """One established connection; both ends are processes of this machine."""

    def __init__(self, sock: socket.socket, peer: str, silence_s: float) -> None:
        super().__init__(sock, peer, silence_s)
        self._ours: Region | None = None
        self._theirs: _Shared | None = None
        self._known = False  # to the peer: our region
        # Of the record that is being read: bytes that are left, and where, if not on the socket.
        self._left, self._at = 0, _ON_SOCKET

    def allocate(self, nbytes: int) -> memoryview:
        self._ours = self._ours or Region()
        return self._ours.allocate(nbytes)

    def reuse(self) -> None:
        if self._ours is not None:
            self._ours.reuse()

    def recv_into(self, buffer: memoryview) -> int:
        """As of every connection.

        Raises:
            ProtocolViolation, Truncated: records that no connection of ours sends, or of memory
                that is not there.
        """
        if not self._left:
            self._next_record()
        buffer = buffer[: self._left]
        n = super().recv_into(buffer) if self._at == _ON_SOCKET else self._copy(buffer[:_AT_ONCE])
        self._left -= n
        return n

    def readable(self, timeout_s: float) -> bool:
        return bool(self._left and self._at != _ON_SOCKET) or super().readable(timeout_s)

    def close(self) -> None:
        super().close()
        self._ours = self._theirs = None

    def _send(self, views: Sequence[memoryview]) -> None:
        pending: list[Buffer] = []
        for offset, alike in groupby(views, self._offset_of):
            group = list(alike)
            if offset is None:
                pending += [_RECORD.pack(sum(map(len, group)), _ON_SOCKET), *group]
                continue
            if not self._known:
                self._put(pending)
                pending = []
                self._introduce(_RECORD.pack(len(group.pop()), offset))
            pending += [_RECORD.pack(len(view), offset) for view in group]
        self._put(pending)
        self.bytes_sent += sum(map(len, views))

    def _offset_of(self, view: memoryview) -> int | None:
        return None if self._ours is None else self._ours.offset_of(view)

    def _introduce(self, record: Buffer) -> None:
        """Send the first record of shared memory, and the memory's descriptor with it."""
        assert self._ours is not None
        with self._failures("take"):
            sent = socket.send_fds(self._socket, [record], [self._ours.descriptor])
        assert sent == len(record), "so few bytes go whole or not at all"
        self._known = True

    def _next_record(self) -> None:
        nbytes, at = _RECORD.unpack(self._receive_record())
        if not nbytes:
            raise ProtocolViolation(f"{self._peer} sent an empty record")
        if at != _ON_SOCKET:
            if self._theirs is None:
                raise ProtocolViolation(f"{self._peer} sends from memory that it does not share")
            if at + nbytes > self._theirs.nbytes:
                raise Truncated(
                    f"{self._peer} sends bytes {at} to {at + nbytes} of its shared memory, which "
                    f"has {self._theirs.nbytes}"
                )
        self._left, self._at = nbytes, at

    def _receive_record(self) -> bytes:
        record, started = b"", time.monotonic()
        while len(record) < _RECORD.size:
            with self._failures("give"):
                data, descriptors, _, _ = socket.recv_fds(
                    self._socket, _RECORD.size - len(record), 1, socket.MSG_CMSG_CLOEXEC
                )
            for descriptor in descriptors:
                shared = _Shared(descriptor, self._peer)
                if self._theirs is not None:
                    raise ProtocolViolation(f"{self._peer} shares memory for the second time")
                self._theirs = shared
            self._check_open(len(data))
            record += data
            if len(record) < _RECORD.size and time.monotonic() - started > self.silence_s:
                raise PeerSilent(f"{self._peer} did not finish a record for {self.silence_s:g} s")
        return record

    def _copy(self, buffer: memoryview) -> int:
        assert self._theirs is not None
        with self._failures("give"):
            n = os.preadv(self._theirs.descriptor, [buffer], self._at)
        if n == 0:
            raise Truncated(f"the shared memory of {self._peer} ends at byte {self._at}")
        self._at += n
        self.bytes_received += n
        return n


Listener = connection.Listener[Connection]


def listen(port: int = 0, *, silence_s: float = SILENCE_S) -> Listener:
    """Take the address `shm:port`, or any free one for 0; of this network namespace.

    Raises:
        AddressInUse: it is taken.
        BadInput: an impossible port.
        Unsupported: this system has no such memory or no such sockets.
    """
    _check(port)
    chosen = port or secrets.choice(_ANY_PORT)
    sock = _socket()
    try:
        sock.bind(_name(chosen))
        sock.listen()
    except OSError as error:
        sock.close()
        if error.errno != errno.EADDRINUSE:
            raise TransportError(f"cannot listen on {HOST}: {error.strerror}") from error
        if not port:
            return listen(0, silence_s=silence_s)
        raise AddressInUse(
            f"port {port} on {HOST} is taken; choose another, or 0 for any"
        ) from error
    address = HOST, chosen
    return Listener(sock, address, lambda accepted: Connection(accepted, named(address), silence_s))


def dial(port: int, timeout_s: float = SILENCE_S, *, silence_s: float = SILENCE_S) -> Connection:
    """Connect to a listener.

    Raises:
        PeerLost: nobody listens there.
        PeerSilent: no answer within `timeout_s`.
        BadInput, Unsupported: as `listen`.
    """
    _check(port)
    sock = _socket()
    sock.settimeout(timeout_s)
    try:
        sock.connect(_name(port))
    except (TimeoutError, BlockingIOError) as error:  # BlockingIOError: its queue is full
        sock.close()
        raise PeerSilent(f"{HOST} port {port} did not answer") from error
    except OSError as error:
        sock.close()
        raise PeerLost(
            f"cannot reach {HOST} port {port}: {error.strerror}; is the peer running, on this "
            "machine and in this network namespace?"
        ) from error
    return Connection(sock, named((HOST, port)), silence_s)


def _check(port: int) -> None:
    if not 0 <= port <= 65535:
        raise BadInput(f"port {port} is not in [0, 65535]")
    if not (hasattr(os, "memfd_create") and hasattr(socket, "send_fds")):
        raise Unsupported("shared memory needs Linux (memfd); use TCP, such as 127.0.0.1:7000")


def _socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)


def _name(port: int) -> bytes:
    return b"\0kvprism/%d" % port
