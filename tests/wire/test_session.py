"""Both ends of a connection, without one: who may say what and when."""

from typing import Any

import msgspec
import pytest

from kvprism.errors import (
    Damaged,
    KVPrismError,
    LimitExceeded,
    PeerLost,
    PeerSilent,
    ProtocolViolation,
    TicketRefused,
    WireError,
)
from kvprism.wire.frames import pack
from kvprism.wire.intake import manifest_nbytes
from kvprism.wire.messages import (
    NO_ID,
    Abort,
    Accept,
    Ack,
    Credit,
    End,
    Manifest,
    Message,
    Ping,
    Pong,
    Reject,
    Resend,
)
from kvprism.wire.session import ReceiverSession, SenderSession, TicketBook
from kvprism.wire.stream import DamagedSegments, Event, Segments

from .examples import (
    REQUEST,
    answered,
    config_of,
    every_message,
    introduced,
    manifests_of,
    messages,
    offer_of,
    opened,
    receiver_of,
    sender_of,
    told,
)

MANIFESTS = [manifest for manifest, _ in manifests_of()]
NBYTES = [manifest_nbytes(manifest) for manifest in MANIFESTS]


def pair(**changes: Any) -> tuple[ReceiverSession, SenderSession]:
    """An open request."""
    receiver, sender = receiver_of(**changes), sender_of()
    opened(receiver, sender)
    return receiver, sender


def deliver(
    receiver: ReceiverSession, sender: SenderSession, sequence: int, damaged: bool = False
) -> list[Message]:
    """Send one manifest and its segments; what the receiver answers, which the sender has read."""
    assert sender.take_credit(NBYTES[sequence])
    manifest = messages([sender.manifest(MANIFESTS[sequence])])[0]
    assert isinstance(manifest, Manifest)
    answers = receiver.handle(manifest)
    event: Event = DamagedSegments(manifest) if damaged else Segments(manifest, memoryview(b""))
    answers += receiver.handle(event)
    if not damaged:
        answers.append(receiver.consumed(manifest))
    return answered(sender, answers)


def test_a_request_goes_through() -> None:
    receiver, sender = pair()
    for sequence in range(3):
        (credit,) = deliver(receiver, sender, sequence)
        assert isinstance(credit, Credit) and credit.nbytes == NBYTES[sequence]
    assert not receiver.complete
    (ack,) = answered(sender, receiver.handle(messages([sender.end()])[0]))
    assert isinstance(ack, Ack) and receiver.complete
    assert (sender.state, receiver.state) == ("ready", "ready")
    assert sender.credit == receiver.config.credit_nbytes


def test_one_connection_carries_one_request_after_another() -> None:
    receiver, sender = pair()
    tickets = [sender.ticket]
    for _ in range(2):
        for sequence in range(3):
            deliver(receiver, sender, sequence)
        answered(sender, receiver.handle(messages([sender.end()])[0]))
        assert receiver.complete
        answered(sender, receiver.handle(messages([sender.offer(offer_of(REQUEST))])[0]))
        assert not receiver.complete
        tickets.append(sender.ticket)
    assert len(set(tickets)) == 3


def test_the_stream_of_a_request_is_as_long_as_its_file() -> None:
    _, sender = pair()
    frames = [sender.manifest(manifest) for manifest in MANIFESTS]
    assert [len(frame) for frame in frames] == [len(pack(manifest)) for manifest in MANIFESTS]
    (end,) = messages([sender.end()])
    assert isinstance(end, End) and end.nbytes == len(pack(offer_of())) + sum(NBYTES)


# Tickets.


def test_a_replayed_ticket_is_refused() -> None:
    receiver, sender = pair()
    replayed = messages([sender.manifest(MANIFESTS[0])])[0]
    assert isinstance(replayed, Manifest)
    receiver.handle(replayed)
    receiver.handle(Segments(replayed, memoryview(b"")))
    receiver.consumed(replayed)
    for sequence in (1, 2):
        deliver(receiver, sender, sequence)
    answered(sender, receiver.handle(messages([sender.end()])[0]))
    assert receiver.complete
    with pytest.raises(TicketRefused, match="already used") as raised:
        receiver.handle(replayed)
    (reject,) = messages(receiver.farewell(raised.value))
    assert isinstance(reject, Reject) and reject.code == "ticket"


def test_a_ticket_of_another_connection_is_refused() -> None:
    book = TicketBook(lambda: 0.0)
    receivers = [ReceiverSession(config_of(), book) for _ in range(2)]
    senders = [sender_of() for _ in range(2)]
    for receiver, sender in zip(receivers, senders, strict=True):
        opened(receiver, sender)
    with pytest.raises(TicketRefused, match="another connection"):
        receivers[1].handle(messages([senders[0].manifest(MANIFESTS[0])])[0])


def test_an_expired_ticket_is_refused() -> None:
    now = [0.0]
    receiver, sender = receiver_of(lambda: now[0], lease_s=30.0), sender_of()
    opened(receiver, sender)
    now[0] = 29.9
    deliver(receiver, sender, 0)
    now[0] = 30.0
    with pytest.raises(TicketRefused, match="expired") as raised:
        receiver.handle(messages([sender.manifest(MANIFESTS[1])])[0])
    assert "expired" in told(sender, receiver.farewell(raised.value), TicketRefused)


def test_a_manifest_without_any_request_is_refused() -> None:
    receiver, sender = receiver_of(), sender_of()
    introduced(receiver, sender)
    with pytest.raises(TicketRefused):
        receiver.handle(MANIFESTS[0])


# Credits.


def test_no_credit_no_send() -> None:
    receiver, sender = pair(credit_nbytes=max(NBYTES))
    assert sender.take_credit(max(NBYTES))
    assert not sender.take_credit(1)
    sender.handle(Credit(sender.request, sender.ticket, 1))
    assert sender.take_credit(1)
    with pytest.raises(LimitExceeded, match="smaller"):
        sender.take_credit(max(NBYTES) + 1)
    assert receiver.state == "open"


def test_more_than_the_credit_is_refused() -> None:
    receiver, sender = pair(credit_nbytes=NBYTES[0] + NBYTES[1] - 1)
    receiver.handle(messages([sender.manifest(MANIFESTS[0])])[0])
    with pytest.raises(ProtocolViolation, match="credit") as raised:
        receiver.handle(messages([sender.manifest(MANIFESTS[1])])[0])
    assert "credit" in told(sender, receiver.farewell(raised.value), ProtocolViolation)


def test_credit_comes_back_once_per_manifest() -> None:
    receiver, sender = pair()
    manifest = messages([sender.manifest(MANIFESTS[0])])[0]
    assert isinstance(manifest, Manifest)
    receiver.handle(manifest)
    receiver.handle(Segments(manifest, memoryview(b"")))
    assert receiver.consumed(manifest) and not receiver.consumed(manifest)


# Damage.


def test_a_damaged_manifest_is_sent_again_and_counts_once() -> None:
    receiver, sender = pair()
    resend, credit = deliver(receiver, sender, 0, damaged=True)
    assert isinstance(resend, Resend) and resend.sequence == 0 and isinstance(credit, Credit)
    deliver(receiver, sender, 1)
    deliver(receiver, sender, 0)
    deliver(receiver, sender, 2)
    answered(sender, receiver.handle(messages([sender.end()])[0]))
    assert receiver.complete and sender.state == "ready"


def test_the_end_waits_for_what_came_damaged_and_is_not_yet_consumed() -> None:
    receiver, sender = pair()
    for sequence in range(3):
        deliver(receiver, sender, sequence, damaged=sequence == 2)
    assert receiver.handle(messages([sender.end()])[0]) == []
    assert (receiver.state, receiver.complete) == ("ended", False)
    again = messages([sender.manifest(MANIFESTS[2])])[0]
    assert isinstance(again, Manifest)
    assert receiver.handle(again) == receiver.handle(Segments(again, memoryview(b""))) == []
    assert not receiver.complete
    (ack,) = answered(sender, [receiver.consumed(again)])
    assert isinstance(ack, Ack) and receiver.complete and sender.state == "ready"


def test_damage_that_stays_ends_the_request() -> None:
    receiver, sender = pair()
    deliver(receiver, sender, 0, damaged=True)
    deliver(receiver, sender, 0, damaged=True)
    with pytest.raises(Damaged, match="3 times") as raised:
        deliver(receiver, sender, 0, damaged=True)
    told(sender, receiver.farewell(raised.value), Damaged)


def test_a_manifest_is_not_repeated_unasked() -> None:
    receiver, sender = pair()
    deliver(receiver, sender, 0)
    with pytest.raises(ProtocolViolation):
        sender.manifest(MANIFESTS[0])
    named = msgspec.structs.replace(MANIFESTS[0], request=sender.request, ticket=sender.ticket)
    with pytest.raises(ProtocolViolation):
        receiver.handle(named)


def test_only_what_was_sent_can_be_asked_for_again() -> None:
    _, sender = pair()
    with pytest.raises(ProtocolViolation, match="Resend"):
        sender.handle(Resend(sender.request, sender.ticket, 0))


# Order.


def receiver_in(state: str) -> tuple[ReceiverSession, SenderSession]:
    receiver, sender = receiver_of(), sender_of()
    if state != "auth":
        introduced(receiver, sender)
    if state in ("open", "ended"):
        answered(sender, receiver.handle(messages([sender.offer(offer_of(REQUEST))])[0]))
    if state == "ended":
        for sequence in range(3):
            deliver(receiver, sender, sequence, damaged=sequence == 0)
        receiver.handle(messages([sender.end()])[0])
    assert receiver.state == state
    return receiver, sender


RECEIVER_HEARS = {
    "auth": {"Auth"},
    "ready": {"Offer", "Ping", "Pong", "Abort"},
    "open": {"Manifest", "End", "Ping", "Pong", "Abort"},
    "ended": {"Manifest", "End", "Ping", "Pong", "Abort"},
}
SENDER_HEARS = {
    "hello": {"Hello"},
    "welcome": {"Welcome", "Reject", "Ping", "Pong", "Abort"},
    "ready": {"Ping", "Pong", "Abort"},
    "offered": {"Accept", "Reject", "Ping", "Pong", "Abort"},
    "open": {"Reject", "Credit", "Resend", "Ping", "Pong", "Abort"},
    "ended": {"Reject", "Credit", "Resend", "Ack", "Ping", "Pong", "Abort"},
}


def out_of_place(hears: dict[str, set[str]]) -> list[object]:
    return [
        pytest.param(state, message, id=f"{state}-{type(message).__name__}")
        for state in hears
        for message in every_message()
        if type(message).__name__ not in hears[state]
    ]


@pytest.mark.parametrize(("state", "message"), out_of_place(RECEIVER_HEARS))
def test_a_receiver_refuses_what_may_not_come_now(state: str, message: Message) -> None:
    receiver, _ = receiver_in(state)
    with pytest.raises((ProtocolViolation, TicketRefused)):
        receiver.handle(message)
    assert receiver.state == "closed"
    with pytest.raises((ProtocolViolation, TicketRefused)):
        receiver.handle(Ping())


def sender_in(state: str) -> SenderSession:
    receiver, sender = receiver_of(), sender_of()
    if state == "welcome":
        sender.handle(messages([receiver.greeting()])[0])
    elif state != "hello":
        introduced(receiver, sender)
    if state in ("offered", "open", "ended"):
        frame = sender.offer(offer_of(REQUEST))
        if state != "offered":
            answered(sender, receiver.handle(messages([frame])[0]))
    if state == "ended":
        sender.end()
    assert sender.state == state
    return sender


@pytest.mark.parametrize(("state", "message"), out_of_place(SENDER_HEARS))
def test_a_sender_refuses_what_may_not_come_now(state: str, message: Message) -> None:
    sender = sender_in(state)
    with pytest.raises(ProtocolViolation, match=type(message).__name__):
        sender.handle(message)
    assert sender.state == "closed"


@pytest.mark.parametrize(
    "message", [Accept(NO_ID, NO_ID, 1, 1), Ack(NO_ID, NO_ID), Credit(NO_ID, NO_ID, 1)]
)
def test_an_answer_to_another_request_is_refused(message: Message) -> None:
    sender = sender_in("offered" if isinstance(message, Accept) else "ended")
    with pytest.raises(ProtocolViolation):
        sender.handle(message)


def test_segments_without_a_request_are_refused() -> None:
    receiver, _ = receiver_in("ready")
    with pytest.raises(ProtocolViolation):
        receiver.handle(Segments(MANIFESTS[0], memoryview(b"")))


def test_nothing_new_follows_the_end() -> None:
    receiver, sender = receiver_in("ended")
    for event in (
        msgspec.structs.replace(MANIFESTS[1], request=sender.request, ticket=sender.ticket),
        End(sender.request, sender.ticket, 3, sum(NBYTES)),
    ):
        with pytest.raises((ProtocolViolation, TicketRefused)):
            receiver.handle(event)


def test_a_sender_says_things_in_order() -> None:
    _, sender = pair()
    with pytest.raises(ProtocolViolation):
        sender.offer(offer_of(REQUEST))
    with pytest.raises(ProtocolViolation, match="is due"):
        sender.manifest(MANIFESTS[1])
    sender.end()
    with pytest.raises(ProtocolViolation):
        sender.end()
    with pytest.raises(ProtocolViolation):
        sender.manifest(MANIFESTS[0])


def test_pings_are_answered_once_both_know_each_other() -> None:
    receiver, sender = pair()
    assert messages(receiver.handle(Ping())) == messages(sender.handle(Ping())) == [Pong()]
    assert receiver.handle(Pong()) == sender.handle(Pong()) == []


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (Damaged("x"), Damaged),
        (LimitExceeded("x"), LimitExceeded),
        (ProtocolViolation("x"), ProtocolViolation),
        (KVPrismError("x"), WireError),
        (ValueError("x" * 5000), WireError),
    ],
)
def test_the_peer_learns_why_a_request_is_given_up(
    error: Exception, expected: type[WireError]
) -> None:
    receiver, sender = pair()
    assert "x" in told(receiver, sender.farewell(error), expected)
    receiver, sender = pair()
    assert "x" in told(sender, receiver.farewell(error), expected)


@pytest.mark.parametrize("error", [PeerLost("x"), PeerSilent("x")])
def test_a_peer_that_is_gone_is_told_nothing(error: Exception) -> None:
    receiver, sender = pair()
    assert receiver.farewell(error) == sender.farewell(error) == []


def test_an_abort_kills_the_ticket() -> None:
    receiver, sender = pair()
    ticket = sender.ticket
    with pytest.raises(WireError):
        receiver.handle(Abort(sender.request, ticket, "failed", "why"))
    with pytest.raises(TicketRefused):
        receiver.tickets.check(receiver, REQUEST, ticket)
