"""What only TCP has: addresses off loopback, IPv6, and small frames at once."""

import socket

import pytest

from kvprism.errors import BadInput, TransportError
from kvprism.transport.tcp import dial, listen


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "example.org", "::", ""])
def test_an_address_off_loopback_is_refused_without_a_word(host: str) -> None:
    for call in (lambda: listen(host), lambda: dial(host, 9)):
        with pytest.raises(BadInput, match="allow_remote=True"):
            call()


def test_every_interface_can_be_asked_for() -> None:
    with listen("0.0.0.0", allow_remote=True) as listener:
        dial("127.0.0.1", listener.address[1]).close()


def test_an_address_of_another_machine_cannot_be_bound() -> None:
    with pytest.raises(TransportError, match=r"192\.0\.2\.1"):
        listen("192.0.2.1", allow_remote=True)


def test_the_ipv6_loopback_serves_too() -> None:
    try:
        listener = listen("::1")
    except TransportError as error:
        pytest.skip(f"no IPv6 here: {error}")
    with listener, dial(*listener.address) as one, listener.accept(1.0) as other:
        one.send([b"six"])
        assert other.recv_into(memoryview(bytearray(3))) == 3


def test_small_frames_are_not_delayed() -> None:
    with listen() as listener, dial(*listener.address) as one, listener.accept(1.0) as other:
        option = (socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert one._socket.getsockopt(*option) and other._socket.getsockopt(*option)
