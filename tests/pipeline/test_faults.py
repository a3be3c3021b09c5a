"""What a fault costs: damage, death, silence and slowness, on real connections."""

import gc
import math
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peers import (
    HOSTS,
    PATIENCE_S,
    SILENCE_S,
    TOKEN,
    Tap,
    each_transport,
    in_thread,
    peer_process,
    request,
    send_once,
    still_works,
)
from strategies import DROP, INT4, NATIVE, cache, plan_of, same_cache

from kvprism.codec.stream import decode, encode
from kvprism.errors import (
    AuthenticationFailed,
    CodecError,
    Damaged,
    KVPrismError,
    PeerLost,
    PeerSilent,
    ProtocolViolation,
    TicketRefused,
    WireError,
)
from kvprism.pipeline import Receiver, Sender, Sent
from kvprism.plans import Plan
from kvprism.tensors import RequestKV
from kvprism.transport import shm


@pytest.fixture
def receiver(request: pytest.FixtureRequest) -> Iterator[Receiver]:
    host = getattr(request, "param", "127.0.0.1")
    with Receiver(TOKEN, host=host, silence_s=PATIENCE_S) as listening:
        yield listening


over_each = each_transport("receiver", indirect=True)


@over_each
def test_an_error_of_the_senders_own_is_told_at_once(receiver: Receiver) -> None:
    kv, chosen = request()
    kv.layers[2].components["v"][3, 20] = math.nan
    started = time.monotonic()
    all_four = Plan(plan_of(kv, INT4).layers, chosen.menu, chosen.split)
    with in_thread(lambda: send_once(receiver.address, kv, all_four)) as sent:
        with pytest.raises(WireError, match=r"gave up .failed.: layer 2 component 'v': head 3 tok"):
            receiver.receive(PATIENCE_S)
        with pytest.raises(CodecError, match="head 3 token 20"):
            sent.result()
    assert time.monotonic() - started < PATIENCE_S / 2
    still_works(receiver)


@over_each
@pytest.mark.parametrize("tokens", [16, 8192])
def test_what_the_receiver_cannot_restore_is_not_acknowledged(
    receiver: Receiver, tokens: int
) -> None:
    kv = cache(layers=8, tokens=tokens, channels=64)
    uneven = np.full((2, tokens), NATIVE, np.uint8)
    uneven[1, 3] = DROP
    chosen = plan_of(kv, uneven)

    def send_unchecked() -> None:
        with Sender(receiver.address, TOKEN, silence_s=PATIENCE_S) as sender:
            transfer = sender.open(chosen.shape, chosen.menu)
            for layer_kv, layer in zip(kv.layers, chosen.layers, strict=True):
                transfer._encode_and_send(layer_kv, layer)  # past the sender's own check
            transfer.finish()

    with in_thread(send_unchecked) as sent:
        with pytest.raises(CodecError, match="one set of tokens per layer"):
            receiver.receive(PATIENCE_S)
        with pytest.raises(WireError, match=r"gave up .failed.: .*one set of tokens per layer"):
            sent.result()
    still_works(receiver)


def test_a_request_without_all_of_its_layers_is_not_complete(receiver: Receiver) -> None:
    kv, chosen = request()

    def send_some() -> None:
        with Sender(receiver.address, TOKEN, silence_s=PATIENCE_S) as sender:
            transfer = sender.open(chosen.shape, chosen.menu, chosen.split)
            transfer.send_layer(kv.layers[0], chosen.layers[0])
            transfer.finish()

    with in_thread(send_some) as sent:
        with pytest.raises(ProtocolViolation, match="rows never came"):
            receiver.receive(PATIENCE_S)
        with pytest.raises(ProtocolViolation, match=r"gave up .*rows never came"):
            sent.result()
    still_works(receiver)


def marked_request() -> tuple[RequestKV, Plan]:
    """Native rows of one value, which a tap recognises in the segments."""
    kv = cache(layers=2, heads=2, tokens=64)
    for layer in kv.layers:
        for x in layer.components.values():
            x.fill_(3.0)
    return kv, plan_of(kv, NATIVE)


def flip_in_segments(times: int) -> Callable[[bytes], bytes]:
    """Flip a bit of that value, `times` times."""
    mark = b"\x40\x40" * 32
    left = times

    def change(data: bytes) -> bytes:
        nonlocal left
        at = data.find(mark)
        if not left or at < 0:
            return data
        left -= 1
        return data[: at + 9] + b"\x41" + data[at + 10 :]

    return change


def test_a_damaged_segment_is_sent_again_and_right(receiver: Receiver) -> None:
    kv, chosen = marked_request()
    with Tap(receiver.address, flip_in_segments(1)) as tap:
        with in_thread(lambda: send_once(tap.address, kv, chosen)) as sent:
            received = receiver.receive(PATIENCE_S)
            assert sent.result().resent == 1
            assert sent.result().wire_nbytes == received.wire_nbytes == chosen.nbytes
        assert len(tap.recorded) > chosen.nbytes + chosen.nbytes // 3
    assert same_cache(received.kv, kv)


def test_a_link_that_damages_again_and_again_is_given_up(receiver: Receiver) -> None:
    kv, chosen = marked_request()
    with (
        Tap(receiver.address, flip_in_segments(99)) as tap,
        in_thread(lambda: send_once(tap.address, kv, chosen)) as sent,
    ):
        with pytest.raises(Damaged, match="came damaged 3 times; check the link"):
            receiver.receive(PATIENCE_S)
        with pytest.raises(Damaged, match=r"gave up .damaged."):
            sent.result()
    still_works(receiver)


@pytest.mark.skipif(shm.HOST not in HOSTS, reason="shared memory is built on Linux's memfd")
@pytest.mark.parametrize("times", [1, 99])
def test_shared_memory_that_changes_under_way_is_damage(times: int) -> None:
    kv, chosen = request()

    def send_changing() -> Sent:
        with Sender(receiver.address, TOKEN, silence_s=PATIENCE_S) as sender:
            connection = sender._link.connection
            send, areas = connection.send, []

            def change(buffers: Sequence[Any]) -> None:
                """The first area is wrong the first `times` times that it is sent."""
                if len(buffers) == 2 and (not areas or buffers[1] is areas[0]):
                    areas.append(buffers[1])
                    buffers[1][9] ^= len(areas) in (1, times + 1)
                send(buffers)

            connection.send = change  # type: ignore[method-assign]
            return sender.send(kv, chosen)

    with (
        Receiver(TOKEN, host=shm.HOST, silence_s=PATIENCE_S) as receiver,
        in_thread(send_changing) as sent,
    ):
        if times == 1:
            assert same_cache(receiver.receive(PATIENCE_S).kv, decode(encode(kv, chosen)))
            assert sent.result().resent == 1
            return
        with pytest.raises(Damaged, match="came damaged 3 times"):
            receiver.receive(PATIENCE_S)
        with pytest.raises(Damaged, match="gave up"):
            sent.result()


def test_a_damaged_frame_ends_the_connection_with_a_typed_error(receiver: Receiver) -> None:
    kv, chosen = marked_request()

    def change(data: bytes) -> bytes:
        return data.replace(b"\x93\x00\xa1k", b"\x93\x00\xa1j").replace(b"maps", b"mops")

    with (
        Tap(receiver.address, change) as tap,
        in_thread(lambda: send_once(tap.address, kv, chosen)) as sent,
    ):
        with pytest.raises(Damaged, match=r"Manifest frame .* digest does not match"):
            receiver.receive(PATIENCE_S)
        with pytest.raises(KVPrismError):
            sent.result()
    still_works(receiver)


def test_recorded_bytes_cannot_be_played_again(receiver: Receiver) -> None:
    kv, chosen = request()
    with Tap(receiver.address) as tap:
        with in_thread(lambda: send_once(tap.address, kv, chosen)) as sent:
            receiver.receive(PATIENCE_S)
            sent.result()
        recorded = bytes(tap.recorded)
    assert len(recorded) > chosen.nbytes
    with socket.create_connection(receiver.address) as replay:
        replay.sendall(recorded)
        with pytest.raises(AuthenticationFailed):
            receiver.receive(PATIENCE_S)
    still_works(receiver)


def test_a_request_that_outlives_its_lease_is_refused() -> None:
    kv, chosen = request()
    with Receiver(TOKEN, lease_s=0.3, silence_s=PATIENCE_S) as receiver:

        def send_slowly() -> None:
            with Sender(receiver.address, TOKEN, silence_s=PATIENCE_S) as sender:
                transfer = sender.open(chosen.shape, chosen.menu, chosen.split)
                for layer_kv, layer in zip(kv.layers, chosen.layers, strict=True):
                    transfer.send_layer(layer_kv, layer)
                    time.sleep(0.2)
                transfer.finish()

        with in_thread(send_slowly) as sent:
            with pytest.raises(TicketRefused, match="has expired; offer the request again"):
                receiver.receive(PATIENCE_S)
            with pytest.raises(TicketRefused, match="refused our ticket"):
                sent.result()


def test_a_link_that_trickles_does_not_outlive_the_lease_either() -> None:
    kv = cache(layers=1, heads=8, tokens=4096, channels=64)
    started = time.monotonic()

    def throttled(data: bytes) -> bytes:
        time.sleep(0.1)
        return data

    with (
        Receiver(TOKEN, lease_s=1.0, silence_s=PATIENCE_S) as receiver,
        Tap(receiver.address, throttled) as tap,
        in_thread(lambda: send_once(tap.address, kv, plan_of(kv, NATIVE))) as sent,
    ):
        with pytest.raises(TicketRefused, match="has expired"):
            receiver.receive(PATIENCE_S)
        assert time.monotonic() - started < 5, "not after all of the 13 s that the segments take"
        with pytest.raises(KVPrismError):
            sent.result()


@contextmanager
def nothing_left() -> Iterator[None]:
    """Neither a name in the folder of shared memory nor a descriptor of a peer's memory here."""
    yield
    gc.collect()  # errors and the frames that they went through hold one another
    assert not list(Path("/dev/shm").glob("*kvprism*"))
    held = []
    for descriptor in Path("/proc/self/fd").glob("*"):
        with suppress(OSError):  # that of the listing itself is gone
            held.append(os.readlink(descriptor))
    assert not [link for link in held if "kvprism" in link]


def within_deadline(action: Callable[[], Any], silence_s: float = SILENCE_S) -> None:
    """Silence is noticed after `silence_s`, with a tenth and a second of grace."""
    started = time.monotonic()
    with pytest.raises(PeerSilent):
        action()
    assert 0.9 * silence_s < time.monotonic() - started < 1.1 * silence_s + 1


@each_transport("host")
def test_a_sender_that_is_killed_or_stopped_in_the_middle_is_noticed(host: str) -> None:
    with nothing_left(), Receiver(TOKEN, host=host, silence_s=SILENCE_S) as receiver:
        for stop, error in ((signal.SIGKILL, PeerLost), (signal.SIGSTOP, PeerSilent)):
            with (
                in_thread(lambda: receiver.receive(PATIENCE_S)) as received,
                peer_process("send", *receiver.address) as (process, said),
            ):
                assert said == "sent"
                stopped = time.monotonic()
                os.kill(process.pid, stop)
                with pytest.raises(error):
                    received.result()
                assert time.monotonic() - stopped < 1.1 * SILENCE_S + 1
        still_works(receiver)


@each_transport("host")
def test_a_receiver_that_is_stopped_or_killed_in_the_middle_is_noticed(host: str) -> None:
    kv, chosen = request()
    large = cache(layers=4, heads=8, tokens=4096, channels=64)
    raw = plan_of(large, NATIVE)
    with peer_process("receive", host) as (process, port):
        address = (host, int(port))
        with Sender(address, TOKEN, silence_s=SILENCE_S) as sender:
            sender.send(kv, chosen)
            transfer = sender.open(raw.shape, raw.menu)
            transfer.send_layer(large.layers[0], raw.layers[0])
            os.kill(process.pid, signal.SIGSTOP)

            def send_the_rest() -> None:
                for layer_kv, layer in zip(large.layers[1:], raw.layers[1:], strict=True):
                    transfer.send_layer(layer_kv, layer)
                transfer.finish()

            within_deadline(send_the_rest)
        within_deadline(lambda: send_once(address, kv, chosen, silence_s=SILENCE_S))
        os.kill(process.pid, signal.SIGCONT)
        with Sender(address, TOKEN, silence_s=PATIENCE_S) as sender:
            transfer = sender.open(chosen.shape, chosen.menu, chosen.split)
            transfer.send_layer(kv.layers[0], chosen.layers[0])
            process.kill()
            with pytest.raises(PeerLost):
                transfer.send_layer(kv.layers[1], chosen.layers[1])
                transfer.finish()
        process.wait()
        with Receiver(TOKEN, host=host, port=int(port)) as next_one:
            assert next_one.address == address, "its address is free again"
    assert not list(Path("/dev/shm").glob("*kvprism*"))


def test_a_peer_that_says_nothing_is_noticed_on_both_sides() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        host, port = mute.getsockname()
        within_deadline(lambda: Sender((host, port), TOKEN, silence_s=SILENCE_S))
    with Receiver(TOKEN, silence_s=SILENCE_S) as receiver:
        with socket.create_connection(receiver.address):
            within_deadline(lambda: receiver.receive(PATIENCE_S))
        still_works(receiver)


def test_a_peer_that_introduces_itself_byte_by_byte_does_not_hold_the_receiver() -> None:
    with (
        Receiver(TOKEN, silence_s=SILENCE_S) as receiver,
        socket.create_connection(receiver.address) as slow,
    ):

        def trickle() -> None:
            with suppress(OSError):
                for byte in b"KVPF\x02" + bytes(30):
                    slow.sendall(bytes([byte]))
                    time.sleep(0.2)

        with in_thread(trickle):
            within_deadline(lambda: receiver.receive(PATIENCE_S))


def test_pings_keep_a_slow_prefill_alive() -> None:
    kv, chosen = request()
    with Receiver(TOKEN, silence_s=SILENCE_S) as receiver:

        def send_slowly(ping: bool) -> None:
            with Sender(receiver.address, TOKEN, silence_s=PATIENCE_S) as sender:
                transfer = sender.open(chosen.shape, chosen.menu, chosen.split)
                for layer_kv, layer in zip(kv.layers, chosen.layers, strict=True):
                    for _ in range(4):
                        time.sleep(0.15 * SILENCE_S if ping else 0.4 * SILENCE_S)
                        if ping:
                            transfer.ping()
                    transfer.send_layer(layer_kv, layer)
                transfer.finish()

        with in_thread(lambda: send_slowly(ping=True)) as sent:
            assert same_cache(receiver.receive(PATIENCE_S).kv, decode(encode(kv, chosen)))
            sent.result()
        with in_thread(lambda: send_slowly(ping=False)) as sent:
            with pytest.raises(PeerSilent):
                receiver.receive(PATIENCE_S)
            with pytest.raises(PeerLost):
                sent.result()
