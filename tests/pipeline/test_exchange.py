"""Sender and Receiver over real connections: what arrives, and what is refused."""

import socket
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from peers import (
    PATIENCE_S,
    TOKEN,
    Tap,
    each_transport,
    exchanged,
    in_thread,
    request,
    send_once,
    still_works,
)
from strategies import DROP, INT4, INT8, NATIVE, cache, plan_of, same_cache, view_of

from kvprism.codec.stream import decode, encode
from kvprism.core import Capability, KVShape
from kvprism.errors import (
    AddressInUse,
    AuthenticationFailed,
    BadInput,
    Busy,
    KVPrismError,
    LimitExceeded,
    PeerLost,
    PeerSilent,
    PositionMismatch,
    Rejected,
    ShapeMismatch,
    Unsupported,
)
from kvprism.pipeline import Receiver, Sender
from kvprism.planning import PlanOptions, plan
from kvprism.plans import Plan
from kvprism.profiles import Profile
from kvprism.tensors import RequestKV


@pytest.fixture
def receiver(request: pytest.FixtureRequest) -> Iterator[Receiver]:
    host = getattr(request, "param", "127.0.0.1")
    with Receiver(TOKEN, host=host, silence_s=PATIENCE_S) as listening:
        yield listening


over_each = each_transport("receiver", indirect=True)


@over_each
@pytest.mark.parametrize("start", [0, 100])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_what_arrives_is_what_a_file_would_hold(receiver: Receiver, start: int, dtype: str) -> None:
    kv, chosen = request(start=start, dtype=dtype)
    sent, received = exchanged(receiver, kv, chosen)
    assert same_cache(received.kv, decode(encode(kv, chosen)))
    assert sent.wire_nbytes == received.wire_nbytes == chosen.nbytes == len(encode(kv, chosen))
    assert sent.request == received.request and sent.resent == 0
    assert 0 < sent.encode_s < sent.seconds and 0 < received.decode_s < received.seconds


@over_each
@pytest.mark.parametrize("policy", ["raw", "spectrum", "sinks-recent"])
def test_the_plans_of_policies_arrive(receiver: Receiver, policy: str) -> None:
    kv = cache(layers=2, tokens=150, channels=64)
    chosen = plan(view_of(kv), policy, None if policy == "raw" else 0.5)
    _, received = exchanged(receiver, kv, chosen)
    assert same_cache(received.kv, decode(encode(kv, chosen)))
    assert received.kv.next_position == 150


@over_each
def test_layers_leave_one_by_one_each_with_its_own_plan(receiver: Receiver) -> None:
    kv, chosen = request()

    def send_layers() -> int:
        with Sender(receiver.address, TOKEN) as sender:
            transfer = sender.open(chosen.shape, chosen.menu, chosen.split, b"r" * 16)
            for layer_kv, layer in zip(kv.layers, chosen.layers, strict=True):
                transfer.send_layer(layer_kv, layer)
            return transfer.finish().wire_nbytes

    with in_thread(send_layers) as sent:
        received = receiver.receive(PATIENCE_S)
        assert sent.result() == received.wire_nbytes == chosen.nbytes
    assert received.request == b"r" * 16
    assert same_cache(received.kv, decode(encode(kv, chosen)))


@over_each
def test_one_connection_carries_many_requests(receiver: Receiver) -> None:
    requests = [request(seed=seed, tokens=24, start=seed) for seed in range(5)]

    def send_all() -> list[int]:
        with Sender(receiver.address, TOKEN) as sender:
            return [sender.send(kv, chosen).wire_nbytes for kv, chosen in requests]

    with in_thread(send_all) as sent:
        received = [receiver.receive(PATIENCE_S) for _ in requests]
        assert sent.result() == [one.wire_nbytes for one in received]
    for (kv, chosen), one in zip(requests, received, strict=True):
        assert same_cache(one.kv, decode(encode(kv, chosen)))
    assert len({one.request for one in received}) == 5


@each_transport("host")
def test_a_small_credit_makes_the_sender_wait_not_fail(host: str) -> None:
    kv, chosen = request()
    with Receiver(TOKEN, host=host, credit_nbytes=8000) as receiver:
        assert chosen.nbytes > 4 * 8000
        sent, received = exchanged(receiver, kv, chosen)
    assert same_cache(received.kv, decode(encode(kv, chosen))) and sent.resent == 0


def test_a_manifest_above_the_whole_credit_is_refused_with_the_way_out() -> None:
    kv, chosen = request()
    with (
        Receiver(TOKEN, credit_nbytes=1000) as receiver,
        in_thread(lambda: send_once(receiver.address, kv, chosen)) as sent,
    ):
        with pytest.raises(LimitExceeded, match="gave up"):
            receiver.receive(PATIENCE_S)
        with pytest.raises(LimitExceeded, match="at most 1000 at once; send smaller"):
            sent.result()


def no_kv_bytes(tap: Tap, kv: RequestKV) -> bool:
    """The sender said only what a handshake and an offer take."""
    return 0 < len(tap.recorded) < 1000 < kv.shape().native_nbytes


@over_each
def test_a_wrong_token_is_refused_before_any_kv_byte(receiver: Receiver) -> None:
    kv, chosen = request()
    with Tap(receiver.address) as tap:
        with in_thread(lambda: send_once(tap.address, kv, chosen, token=b"x" * 32)) as sent:
            with pytest.raises(AuthenticationFailed, match="give both the same token"):
                receiver.receive(PATIENCE_S)
            with pytest.raises(AuthenticationFailed, match="give both the same token"):
                sent.result()
        assert no_kv_bytes(tap, kv)
    still_works(receiver)


@each_transport("host")
def test_a_receiver_that_does_not_hold_the_token_gets_nothing(host: str) -> None:
    kv, chosen = request()
    with (
        Receiver(b"another token of 32 bytes.......", host=host, silence_s=PATIENCE_S) as impostor,
        in_thread(lambda: send_once(impostor.address, kv, chosen)) as sent,
    ):
        with pytest.raises(AuthenticationFailed):
            impostor.receive(PATIENCE_S)
        with pytest.raises(AuthenticationFailed):
            sent.result()


@pytest.mark.parametrize("field", ["fingerprint", "profile"])
def test_another_model_is_rejected_with_both_values(field: str) -> None:
    kv, chosen = request()
    stated = [b"s" * 32, b"r" * 32]
    given: list[Any] = stated
    if field == "profile":
        given = [Profile("ab" * 32), Profile("cd" * 32)]
        stated = [profile.hash for profile in given]
    ours, theirs = stated
    settings: dict[str, Any] = {field: given[1]}
    with Receiver(TOKEN, **settings) as receiver, Tap(receiver.address) as tap:
        with in_thread(lambda: send_once(tap.address, kv, chosen, **{field: given[0]})) as sent:
            with suppress(KVPrismError):
                receiver.receive(1)
            with pytest.raises(Rejected, match=f"{field} is {theirs.hex()} there") as raised:
                sent.result()
        assert (raised.value.ours, raised.value.theirs) == (ours.hex(), theirs.hex())
        assert no_kv_bytes(tap, kv)
        with in_thread(lambda: send_once(receiver.address, kv, chosen, **settings)):
            assert same_cache(receiver.receive(PATIENCE_S).kv, decode(encode(kv, chosen)))


def refused_then_sent(
    receiver: Receiver,
    refused: tuple[RequestKV, Plan],
    error: type[KVPrismError],
    message: str,
    *,
    receiver_too: bool = True,
) -> KVPrismError:
    """An offer is refused before any KV byte, and the same connection then carries another."""
    kv, chosen = request()

    def send_both() -> KVPrismError:
        with Sender(tap.address, TOKEN, silence_s=PATIENCE_S) as sender:
            with pytest.raises(error, match=message) as raised:
                sender.send(*refused)
            assert no_kv_bytes(tap, refused[0])
            sender.send(kv, chosen)
            return raised.value

    with Tap(receiver.address) as tap, in_thread(send_both) as sent:
        if receiver_too:
            with pytest.raises(error):
                receiver.receive(PATIENCE_S)
        assert same_cache(receiver.receive(PATIENCE_S).kv, decode(encode(kv, chosen)))
        raised: KVPrismError = sent.result()
    return raised


@each_transport("host")
def test_a_request_that_is_too_large_is_busy_and_a_smaller_one_goes_through(host: str) -> None:
    native = request()[0].shape().native_nbytes
    large = cache(layers=3, heads=4, tokens=25)
    with Receiver(TOKEN, host=host, max_request_nbytes=native) as receiver:
        error = refused_then_sent(receiver, (large, plan_of(large, INT4)), Busy, "busy")
    assert isinstance(error, Busy)
    assert (error.ours, error.theirs) == (str(large.shape().native_nbytes), str(native))


EXPECTED = KVShape.dense(layers=3, heads=4, channels=8, tokens=1, dtype="float32")


@pytest.mark.parametrize(
    "shape, field, ours, theirs",
    [
        ({"layers": 2}, "layers", "[0, 1]", "[0, 1, 2]"),
        ({"heads": 2}, "components of layer 0", "k 2 x 8, v 2 x 8", "k 4 x 8, v 4 x 8"),
        ({"channels": 16}, "components of layer 0", "k 4 x 16, v 4 x 16", "k 4 x 8, v 4 x 8"),
    ],
)
def test_another_shape_than_the_expected_one_is_rejected(
    shape: dict[str, Any], field: str, ours: str, theirs: str
) -> None:
    other = cache(**({"layers": 3, "heads": 4, "tokens": 24} | shape))
    with Receiver(TOKEN, expected=EXPECTED) as receiver:
        error = refused_then_sent(receiver, (other, plan_of(other, INT8)), Rejected, field)
    assert isinstance(error, Rejected) and error.code == "shape"
    assert (error.field, error.ours, error.theirs) == (field, ours, theirs)


def test_codes_that_the_receiver_does_not_read_are_rejected() -> None:
    kv = cache()
    published = plan(view_of(kv), "int8", options=PlanOptions(codec="published"))
    capability = Capability(codecs=("kvp.native/1", "kvp.drop/1", "kvp.nested/1"))
    with Receiver(TOKEN, capability=capability) as receiver:
        refused_then_sent(receiver, (kv, published), Rejected, "kvp.absmax/1", receiver_too=False)


def test_dropped_tokens_are_refused_where_the_receiver_cannot_hold_them() -> None:
    kv = cache()
    uneven = np.full((2, 16), INT8, np.uint8)
    uneven[1, 3] = DROP
    with Receiver(TOKEN, capability=Capability(drop="none")) as receiver:
        dropping = plan_of(kv, [NATIVE] * 15 + [DROP])
        refused_then_sent(receiver, (kv, dropping), Unsupported, "drop=none", receiver_too=False)
    with Receiver(TOKEN) as receiver:
        by_head = plan_of(kv, uneven)
        refused_then_sent(receiver, (kv, by_head), Unsupported, "drop=uniform", receiver_too=False)


def test_the_sender_knows_what_the_receiver_can_hold() -> None:
    capability = Capability(drop="none", codecs=("kvp.native/1",))
    with Receiver(TOKEN, capability=capability) as receiver:

        def ask() -> Capability:
            with Sender(receiver.address, TOKEN) as sender:
                return sender.capability

        with in_thread(ask) as told:
            with pytest.raises(PeerSilent, match=r"nobody connected|no request"):
                receiver.receive(1)
            assert told.result() == capability


def test_a_receiver_does_not_promise_what_is_not_built() -> None:
    with pytest.raises(Unsupported, match="is not built, use block=1"):
        Receiver(TOKEN, capability=Capability(block=16))


@over_each
def test_plans_for_other_caches_are_refused_before_they_are_offered(receiver: Receiver) -> None:
    kv, chosen = request()

    def send_all() -> None:
        with Sender(receiver.address, TOKEN) as sender:
            with pytest.raises(ShapeMismatch, match="plan it anew"):
                sender.send(request(tokens=23)[0], chosen)
            with pytest.raises(ShapeMismatch, match="the plan has 3 layers, the cache 2"):
                sender.send(request(layers=2)[0], chosen)
            with pytest.raises(PositionMismatch, match="goes on at position 99"):
                sender.send(RequestKV(kv.layers, 99), chosen)
            with pytest.raises(BadInput, match="no room"):
                sender.send(kv, chosen, request=b"short")
            transfer = sender.open(chosen.shape, chosen.menu, chosen.split)
            stranger = request(channels=16)
            with pytest.raises(
                ShapeMismatch,
                match=r"offered layer 0 \(k 4 x 8, v 4 x 8; \[0, 24\), bfloat16\), got layer",
            ):
                transfer.send_layer(stranger[0].layers[0], stranger[1].layers[0])
            for layer_kv, layer in zip(kv.layers, chosen.layers, strict=True):
                transfer.send_layer(layer_kv, layer)
            transfer.finish()

    with in_thread(send_all) as sent:
        assert same_cache(receiver.receive(PATIENCE_S).kv, decode(encode(kv, chosen)))
        sent.result()


def test_nobody_there_is_noticed_on_both_sides(receiver: Receiver) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = closed.getsockname()
    with pytest.raises(PeerLost, match="is the peer running"):
        Sender(address, TOKEN)
    for timeout_s in (0.0, 0.1, -1.0):
        with pytest.raises(PeerSilent, match="nobody connected"):
            receiver.receive(timeout_s)


def test_a_peer_with_nothing_to_offer_yet_is_kept(receiver: Receiver) -> None:
    kv, chosen = request()
    with (
        in_thread(lambda: receiver.receive(2.0)) as received,
        Sender(receiver.address, TOKEN) as sender,
    ):
        with pytest.raises(PeerSilent, match="offered no request in time; it stays connected"):
            received.result()
        with in_thread(lambda: receiver.receive(PATIENCE_S)) as received:
            sender.send(kv, chosen)
            assert same_cache(received.result().kv, decode(encode(kv, chosen)))


@over_each
def test_a_peer_that_leaves_between_requests_makes_room_for_the_next(receiver: Receiver) -> None:
    kv, chosen = request()
    exchanged(receiver, kv, chosen)
    exchanged(receiver, kv, chosen)
    still_works(receiver)


def test_addresses_that_cannot_be_used_are_refused(receiver: Receiver) -> None:
    with pytest.raises(AddressInUse, match="is taken"):
        Receiver(TOKEN, port=receiver.address[1])
    with pytest.raises(BadInput, match="not a loopback address"):
        Receiver(TOKEN, host="0.0.0.0")
    with pytest.raises(BadInput, match="not a loopback address"):
        Sender(("192.0.2.1", 1), TOKEN)
    for make in (lambda: Receiver(b"short"), lambda: Sender(receiver.address, b"short")):
        with pytest.raises(BadInput, match="at least 16 bytes, got 5"):
            make()
