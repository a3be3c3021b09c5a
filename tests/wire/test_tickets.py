"""Proofs of the token, and tickets."""

import hashlib
import hmac

import pytest

from kvprism.errors import BadInput, TicketRefused
from kvprism.wire.tickets import TicketBook, proof

from .examples import REQUEST, TOKEN


def test_a_proof_is_hmac_over_tagged_and_length_prefixed_fields() -> None:
    fields = (b"kvprism/1 proof of token", b"sender", b"a" * 16, b"b" * 16, bytes(32))
    text = b"".join(len(field).to_bytes(4, "little") + field for field in fields)
    assert proof(TOKEN, *fields[1:]) == hmac.digest(TOKEN, text, hashlib.sha256)


def test_a_proof_depends_on_every_field_and_on_where_one_ends() -> None:
    fields = (b"sender", b"a" * 16, b"b" * 16, bytes(32))
    others = [
        (b"receiver", *fields[1:]),
        (fields[0], b"c" * 16, *fields[2:]),
        (*fields[:2], b"c" * 16, fields[3]),
        (*fields[:3], b"\x01" * 32),
        (b"sendera", b"a" * 15, *fields[2:]),
    ]
    proofs = {proof(TOKEN, *each) for each in (fields, *others)} | {proof(TOKEN[1:], *fields)}
    assert len(proofs) == 7


def test_a_short_token_is_refused() -> None:
    with pytest.raises(BadInput, match="16"):
        proof(bytes(15), b"sender", b"a" * 16, b"b" * 16, bytes(32))


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_ticket_is_for_one_connection_and_one_request() -> None:
    book, ours, theirs = TicketBook(Clock()), object(), object()
    ticket = book.issue(ours, REQUEST, 10.0)
    assert len(ticket) == 16
    book.check(ours, REQUEST, ticket)
    with pytest.raises(TicketRefused, match="another"):
        book.check(theirs, REQUEST, ticket)
    with pytest.raises(TicketRefused, match="another"):
        book.check(ours, bytes(16), ticket)
    with pytest.raises(TicketRefused, match="never issued"):
        book.check(ours, REQUEST, bytes(16))


def test_a_ticket_dies_with_its_request() -> None:
    book, owner = TicketBook(Clock()), object()
    ticket = book.issue(owner, REQUEST, 10.0)
    book.retire(ticket)
    with pytest.raises(TicketRefused, match="already used"):
        book.check(owner, REQUEST, ticket)


def test_a_ticket_dies_with_its_lease() -> None:
    clock, owner = Clock(), object()
    book = TicketBook(clock)
    ticket = book.issue(owner, REQUEST, 10.0)
    clock.now = 9.999
    book.check(owner, REQUEST, ticket)
    clock.now = 10.0
    with pytest.raises(TicketRefused, match="expired"):
        book.check(owner, REQUEST, ticket)


def test_no_two_tickets_are_alike() -> None:
    book = TicketBook(Clock())
    assert len({book.issue(object(), REQUEST, 1.0) for _ in range(1000)}) == 1000
