"""Who is let in, and which offers: nothing moves before both are settled."""

import msgspec
import pytest

from kvprism.errors import AuthenticationFailed, BadInput, Busy, ProtocolViolation, Rejected
from kvprism.wire.intake import native_nbytes
from kvprism.wire.messages import FORMAT, NOT_STATED, Hello, Message
from kvprism.wire.session import SenderSession

from .examples import (
    CODECS,
    REQUEST,
    TOKEN,
    answered,
    config_of,
    every_message,
    introduced,
    messages,
    offer_of,
    opened,
    receiver_of,
    sender_of,
    told,
)


def test_a_sender_with_another_token_is_refused_before_anything_else() -> None:
    receiver, sender = receiver_of(), sender_of(bytes(32))
    auth = sender.handle(messages([receiver.greeting()])[0])
    with pytest.raises(AuthenticationFailed) as raised:
        receiver.handle(messages(auth)[0])
    assert "token file" in told(sender, receiver.farewell(raised.value), AuthenticationFailed)
    with pytest.raises(ProtocolViolation):
        receiver.handle(offer_of(REQUEST))


def test_a_receiver_with_another_token_is_refused_by_the_sender() -> None:
    receiver, sender = receiver_of(), sender_of()
    auth = sender.handle(messages([receiver.greeting()])[0])
    welcome = messages(receiver.handle(messages(auth)[0]))[0]
    with pytest.raises(AuthenticationFailed):
        sender.handle(msgspec.structs.replace(welcome, proof=bytes(32)))
    with pytest.raises(ProtocolViolation):
        sender.offer(offer_of(REQUEST))


def test_a_proof_does_not_serve_on_another_connection() -> None:
    first, second, sender = receiver_of(), receiver_of(), sender_of()
    auth = messages(sender.handle(messages([first.greeting()])[0]))[0]
    with pytest.raises(AuthenticationFailed):
        second.handle(auth)


@pytest.mark.parametrize("message", every_message(), ids=lambda m: type(m).__name__)
def test_only_a_proof_is_heard_before_authentication(message: Message) -> None:
    expected = AuthenticationFailed if type(message).__name__ == "Auth" else ProtocolViolation
    with pytest.raises(expected):
        receiver_of().handle(message)


def test_short_tokens_and_odd_configurations_are_refused() -> None:
    with pytest.raises(BadInput):
        sender_of(bytes(15))
    for change in ({"token": b""}, {"profile": b""}, {"credit_nbytes": 0}, {"lease_s": -1.0}):
        with pytest.raises(BadInput):
            config_of(**change)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"format": (2, 0)}, "version"),
        ({"digests": ("crc32",)}, "digest"),
        ({"fingerprint": bytes(31) + b"\x01"}, "fingerprint"),
        ({"profile": bytes(31) + b"\x01"}, "profile"),
    ],
)
def test_a_sender_leaves_when_the_hello_rules_it_out(change: dict[str, object], code: str) -> None:
    hello = messages([receiver_of().greeting()])[0]
    with pytest.raises(Rejected) as raised:
        sender_of().handle(msgspec.structs.replace(hello, **change))
    assert raised.value.code == code


def test_a_later_minor_version_is_spoken_to() -> None:
    hello = messages([receiver_of().greeting()])[0]
    later = msgspec.structs.replace(hello, format=(FORMAT[0], FORMAT[1] + 1))
    assert len(sender_of().handle(later)) == 1


@pytest.mark.parametrize(
    ("change", "error", "code"),
    [
        ({"format": (2, 0)}, Rejected, "version"),
        ({"digest": "crc32"}, Rejected, "digest"),
        ({"fingerprint": b"\x01" * 32}, Rejected, "fingerprint"),
        ({"profile": b"\x01" * 32}, Rejected, "profile"),
        (
            {"menu": (msgspec.structs.replace(offer_of().menu[0], codec="new/1"),)},
            Rejected,
            "codec",
        ),
        (
            {"layers": (msgspec.structs.replace(offer_of().layers[0], dtype="int8"),)},
            Rejected,
            "shape",
        ),
    ],
)
def test_a_mismatch_is_refused_with_both_values_before_accept(
    change: dict[str, object], error: type[Rejected], code: str
) -> None:
    receiver, sender = receiver_of(), sender_of()
    introduced(receiver, sender)
    sender.offer(offer_of(REQUEST))
    with pytest.raises(error) as raised:
        receiver.handle(offer_of(REQUEST, **change))
    assert raised.value.code == code
    (reject,) = messages(receiver.farewell(raised.value))
    with pytest.raises(error) as theirs:
        sender.handle(reject)
    assert (theirs.value.ours, theirs.value.theirs) == (raised.value.theirs, raised.value.ours)
    assert (receiver.state, sender.state) == ("ready", "ready")
    answered(sender, receiver.handle(messages([sender.offer(offer_of(REQUEST))])[0]))
    assert sender.state == "open"


def test_a_request_above_the_cap_is_busy_at_once() -> None:
    nbytes = native_nbytes(offer_of())
    opened(receiver_of(max_request_nbytes=nbytes), sender_of())
    receiver, sender = receiver_of(max_request_nbytes=nbytes - 1), sender_of()
    introduced(receiver, sender)
    with pytest.raises(Busy) as raised:
        receiver.handle(messages([sender.offer(offer_of(REQUEST))])[0])
    assert str(nbytes - 1) in told(sender, receiver.farewell(raised.value), Busy)


def test_a_sender_does_not_offer_a_codec_that_the_receiver_lacks() -> None:
    receiver, sender = receiver_of(codecs=CODECS[:2]), sender_of()
    introduced(receiver, sender)
    with pytest.raises(Rejected, match="codec"):
        sender.offer(offer_of(REQUEST))
    assert sender.state == "ready"


def test_a_hello_says_what_the_receiver_is_and_can_hold() -> None:
    receiver = receiver_of(drop="none", block=16, fingerprint=b"\x01" * 32)
    (hello,) = messages([receiver.greeting()])
    assert isinstance(hello, Hello)
    assert (hello.drop, hello.block, hello.codecs) == ("none", 16, CODECS)
    assert (hello.fingerprint, hello.profile) == (b"\x01" * 32, NOT_STATED)
    sender = SenderSession(TOKEN, b"\x01" * 32, NOT_STATED)
    introduced(receiver, sender)
    assert sender.hello == hello
