"""One connection, its session, and the stream reader between the two: both ends drive this."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Generic, TypeVar

from kvprism.errors import PeerLost, Rejected, TransportError
from kvprism.transport.connection import Connection
from kvprism.wire.frames import Buffer
from kvprism.wire.messages import Abort, Reject
from kvprism.wire.session import ReceiverSession, SenderSession
from kvprism.wire.stream import Event, StreamReader

SILENCE_S = 4.0

SessionT = TypeVar("SessionT", SenderSession, ReceiverSession)


class Link(Generic[SessionT]):
    """Reads what has come, lets the session answer, and sends what it says."""

    def __init__(self, connection: Connection, session: SessionT) -> None:
        self.connection = connection
        self.session: SessionT = session
        self.closed = False
        self._reader = StreamReader()

    def close(self) -> None:
        self.closed = True
        self.connection.close()

    def get(self) -> list[Event]:
        """Read what has come, at least a byte, and answer it; the events that it completed."""
        events = self._advance()
        for event in events:
            self.put(self.session.handle(event))
        return events

    def put(self, buffers: Sequence[Buffer]) -> None:
        """Send; a peer that closed in the meantime may have said why, and that is raised then."""
        try:
            self.connection.send(buffers)
        except PeerLost:
            self._hear_out()
            raise

    @contextmanager
    def guard(self) -> Iterator[None]:
        """On an error tell the peer why and close, so that it need not wait for a deadline.

        A refused offer alone leaves both ends ready for the next one.
        """
        try:
            yield
        except BaseException as error:
            with suppress(TransportError):
                self.connection.send(self.session.farewell(error))
            if not (isinstance(error, Rejected) and self.session.state == "ready"):
                self.close()
            raise

    def _advance(self) -> list[Event]:
        return self._reader.advance(self.connection.recv_into(self._reader.next_buffer()))

    def _hear_out(self) -> None:
        with suppress(TransportError):
            while True:
                for event in self._advance():
                    if isinstance(event, Abort | Reject):
                        self.session.handle(event)
