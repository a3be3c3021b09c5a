"""What only shared memory has: what goes through it, who may do what to it, and what a peer breaks.

A `stranger` is a bare socket at the other end, which says what no connection of ours says.
"""

import fcntl
import os
import resource
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvprism.errors import PeerSilent, ProtocolViolation, TransportError, Truncated, Unsupported
from kvprism.transport import addresses, shm
from kvprism.transport.shm import Connection, dial, listen

from .reading import read

MIB = 2**20
SILENCE_S = 0.3

pytestmark = pytest.mark.skipif(
    not hasattr(os, "memfd_create"), reason="shared memory is built on Linux's memfd"
)


@pytest.fixture
def ends() -> Iterator[tuple[Connection, Connection]]:
    with listen() as listener, dial(listener.address[1]) as one, listener.accept(1.0) as other:
        yield one, other


@pytest.fixture
def stranger() -> Iterator[tuple[Connection, socket.socket]]:
    with listen(silence_s=SILENCE_S) as listener:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(listener._socket.getsockname())
        with sock, listener.accept(1.0) as connection:
            yield connection, sock


def filled(connection: Connection, nbytes: int, byte: int) -> memoryview:
    area = connection.allocate(nbytes)
    area[:] = bytes([byte]) * nbytes
    return area


def test_frames_and_areas_arrive_in_the_order_in_which_they_were_sent(
    ends: tuple[Connection, Connection],
) -> None:
    one, other = ends
    areas = [filled(one, nbytes, i + 1) for i, nbytes in enumerate((MIB, 1, 70_000))]
    sent = [b"first", areas[0], b"then", b"more", areas[2], areas[2], areas[0][5:9], areas[1], b"!"]
    one.send(sent)
    expected = b"".join(sent)
    assert read(other, len(expected)) == expected
    assert one.bytes_sent == other.bytes_received == len(expected)


def test_an_area_takes_sixteen_bytes_of_the_socket(
    stranger: tuple[Connection, socket.socket],
) -> None:
    connection, sock = stranger
    area = filled(connection, 3 * MIB, 7)
    connection.send([area])
    connection.send([area])
    record, descriptors, _, _ = socket.recv_fds(sock, 100, 2)
    assert struct.unpack("<QQ", record) == (3 * MIB, 0) and len(descriptors) == 1
    assert os.pread(descriptors[0], 4 * MIB, 0).startswith(bytes(area))
    again, none, _, _ = socket.recv_fds(sock, 100, 2)
    assert again == record and not none, "the descriptor is sent once"
    with pytest.raises(PermissionError):
        os.ftruncate(descriptors[0], 0)  # else we would get a SIGBUS
    os.close(descriptors[0])


def test_what_was_received_is_the_receivers_own(ends: tuple[Connection, Connection]) -> None:
    one, other = ends
    area = filled(one, 100, 1)
    one.send([area])
    buffer = memoryview(bytearray(100))
    assert other.readable(1.0) and other.recv_into(buffer[:60]) == 60
    area[:] = bytes([2]) * 100
    assert other.readable(0), "the rest is there, though nothing is on the socket"
    assert other.recv_into(buffer[60:]) == 40 and not other.readable(0)
    assert bytes(buffer) == bytes([1]) * 60 + bytes([2]) * 40


def test_memory_is_given_again_after_reuse_and_not_before(
    ends: tuple[Connection, Connection],
) -> None:
    one, other = ends
    first, second = filled(one, 5000, 1), filled(one, 5000, 2)
    one.send([first, second])
    one.reuse()
    third = filled(one, 5000, 3)
    assert bytes(first) == bytes(third) and bytes(second) == bytes([2]) * 5000
    assert read(other, 10000) == bytes([3]) * 5000 + bytes([2]) * 5000


def test_memory_beyond_what_is_kept_goes_back(
    ends: tuple[Connection, Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shm, "KEPT_NBYTES", MIB)
    one, other = ends
    filled(one, 3 * MIB, 1)
    assert one._ours is not None
    assert os.fstat(one._ours.descriptor).st_blocks * 512 >= 3 * MIB
    one.reuse()
    assert os.fstat(one._ours.descriptor).st_blocks * 512 == MIB
    one.send([filled(one, 2 * MIB, 2)])
    assert read(other, 2 * MIB) == bytes([2]) * 2 * MIB


def test_a_region_that_is_full_says_so(
    ends: tuple[Connection, Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shm, "REGION_NBYTES", MIB)
    ends[0].allocate(600_000)
    with pytest.raises(
        TransportError, match=r"600000 bytes more than the 602112 .*smaller requests"
    ):
        ends[0].allocate(600_000)


def test_a_system_that_gives_no_memory_is_an_error(ends: tuple[Connection, Connection]) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, limits[1]))
    try:
        with pytest.raises(TransportError, match="no shared memory: File too large; use TCP"):
            ends[0].allocate(1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_system_without_such_memory_is_told_to_use_tcp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    for call in (lambda: addresses.listen("shm", 0), lambda: addresses.dial("shm", 7)):
        with pytest.raises(Unsupported, match=r"Linux .*use TCP, such as 127\.0\.0\.1:7000"):
            call()


def test_it_is_no_link_that_could_be_slowed_down(ends: tuple[Connection, Connection]) -> None:
    ends[0].pace(None)
    with pytest.raises(TransportError, match="paced"):
        ends[0].pace(1000)


def memory(nbytes: int, seals: int = fcntl.F_SEAL_SHRINK) -> int:
    descriptor = os.memfd_create("theirs", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, nbytes)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


def refused(stranger: tuple[Connection, socket.socket], error: type[Exception], match: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(error, match=match):
        read(stranger[0], 8)
    stranger[0].close()
    assert len(os.listdir("/proc/self/fd")) < before, "nothing that it sent stays open"


@pytest.mark.parametrize(
    "record, error, match",
    [
        ((0, 0), ProtocolViolation, "empty record"),
        ((8, 0), ProtocolViolation, "memory that it does not share"),
    ],
)
def test_records_of_nothing_are_refused(
    stranger: tuple[Connection, socket.socket],
    record: tuple[int, int],
    error: type[Exception],
    match: str,
) -> None:
    stranger[1].send(struct.pack("<QQ", *record))
    refused(stranger, error, match)


@pytest.mark.parametrize("record", [(8, 4089), (4097, 0), (8, 2**63), (2**64 - 1, 2**64 - 2)])
def test_records_beyond_the_memory_are_refused(
    stranger: tuple[Connection, socket.socket], record: tuple[int, int]
) -> None:
    descriptor = memory(4096)
    socket.send_fds(stranger[1], [struct.pack("<QQ", *record)], [descriptor])
    os.close(descriptor)
    refused(stranger, Truncated, "shared memory, which has 4096")


def pipe() -> int:
    reading, writing = os.pipe()
    os.close(writing)
    return reading


@pytest.mark.parametrize(
    "make",
    [
        pipe,
        lambda: os.open(__file__, os.O_RDONLY),
        lambda: os.open("/dev/zero", os.O_RDONLY),
        lambda: memory(4096, seals=0),
    ],
)
def test_what_could_block_or_be_cut_short_is_refused(
    stranger: tuple[Connection, socket.socket], make: Callable[[], int]
) -> None:
    descriptor = make()
    socket.send_fds(stranger[1], [struct.pack("<QQ", 8, 0)], [descriptor])
    os.close(descriptor)
    refused(stranger, ProtocolViolation, "no memory of a fixed size")


def test_memory_is_shared_once(stranger: tuple[Connection, socket.socket]) -> None:
    connection, sock = stranger
    for _ in range(2):
        descriptor = memory(4096)
        socket.send_fds(sock, [struct.pack("<QQ", 8, 0)], [descriptor])
        os.close(descriptor)
    assert read(connection, 8) == bytes(8)
    refused(stranger, ProtocolViolation, "for the second time")


def test_descriptors_where_none_belong_are_closed(
    stranger: tuple[Connection, socket.socket],
) -> None:
    connection, sock = stranger
    before = len(os.listdir("/proc/self/fd"))
    sock.send(struct.pack("<QQ", 8, 2**64 - 1))
    descriptor = memory(4096)
    socket.send_fds(sock, [b"8 bytes!"], [descriptor])
    os.close(descriptor)
    assert read(connection, 8) == b"8 bytes!"
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_record_that_trickles_in_is_given_up(stranger: tuple[Connection, socket.socket]) -> None:
    connection, sock = stranger
    record, started = struct.pack("<QQ", 8, 2**64 - 1), time.monotonic()

    def trickle() -> None:
        for byte in record:
            sock.send(bytes([byte]))
            time.sleep(SILENCE_S / 3)

    thread = threading.Thread(target=trickle)
    thread.start()
    with pytest.raises(PeerSilent, match="did not finish a record"):
        connection.recv_into(memoryview(bytearray(8)))
    assert time.monotonic() - started < 16 * SILENCE_S / 3, "before the record was complete"
    thread.join()


def test_no_name_is_left_in_the_file_system(ends: tuple[Connection, Connection]) -> None:
    before = set(Path("/dev/shm").iterdir()) if Path("/dev/shm").exists() else set()
    one, other = ends
    one.send([filled(one, MIB, 1)])
    read(other, MIB)
    assert not Path("/dev/shm").exists() or set(Path("/dev/shm").iterdir()) <= before
    assert one._ours is not None
    link = os.readlink(f"/proc/self/fd/{one._ours.descriptor}")
    assert link.startswith("/memfd:kvprism") and link.endswith("(deleted)")
