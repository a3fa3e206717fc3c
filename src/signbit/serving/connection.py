"""What reaches a socket before it is a request, or instead of one.

uvicorn waits for ever for a head that comes a byte at a time, takes connections until there are no files left to open,
answers what is not HTTP in plain text, and fails with a traceback where that is sent after an answer. So its protocol
is extended here: a head has a deadline, connections a limit, and errors the form of all others. It is h11's and never
httptools', whichever is installed: h11 bounds the size of a head.
"""

from __future__ import annotations

import asyncio
import resource
from http import HTTPStatus

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from signbit.serving.errors import ApiError
from signbit.serving.limits import answer

# Connections that the event loop accepts at a time. It takes some rounds to close one that is too many.
BACKLOG = 64
# Files that are not for connections: such rounds, the model, and whatever else is opened.
_OTHER_FILES = 5 * BACKLOG
_FEWEST = 16


class Connection(H11Protocol):
    """One client's. head_seconds: in which a request's line and headers must arrive: from the first byte on, or
    before the first request from when the connection is made."""

    head_seconds = 30.0
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        super().connection_made(transport)
        if len(self.connections) > most_connections():
            self._refuse(503, "too many connections: close some, or try again in a while")
        else:
            self._set_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        self._drop_deadline()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._drop_deadline()
        elif self._deadline is None:
            self._set_deadline()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "this is not an HTTP request, or its headers are too long")

    def _set_deadline(self) -> None:
        message = f"the request's headers did not arrive within {self.head_seconds:.0f} seconds"
        self._deadline = self.loop.call_later(self.head_seconds, self._refuse, 408, message)

    def _drop_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _refuse(self, status: int, message: str) -> None:
        """Say so, unless an answer is under way or sent, and close the connection."""
        if self.transport.is_closing():
            return
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            said = answer(ApiError(status, message))
            headers = [*said.raw_headers, (b"connection", b"close")]
            head = h11.Response(status_code=status, headers=headers, reason=HTTPStatus(status).phrase)
            events = (head, h11.Data(bytes(said.body)), h11.EndOfMessage())
            self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
        self.transport.close()


def most_connections() -> int:
    """As many as files may be open, less what the process needs for itself."""
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 65_536 if most == resource.RLIM_INFINITY else max(most - _OTHER_FILES, _FEWEST)
