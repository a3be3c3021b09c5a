"""What the tests of the transports share."""

from kvprism.transport.connection import Connection


def read(connection: Connection, nbytes: int) -> bytes:
    buffer = memoryview(bytearray(nbytes))
    filled = 0
    while filled < nbytes:
        filled += connection.recv_into(buffer[filled:])
    return bytes(buffer)
