"""uvicorn's h11 protocol (HTTP/1.1 on a socket) with timeouts added, and with this server's errors for malformed requests.

Without it uvicorn waits forever for a first request, for the rest of the headers and, after an early answer, for the rest
of a body.
"""

from __future__ import annotations

import asyncio
import sys
from http import HTTPStatus
from typing import Any, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from scalabl_server.problems import ProblemError
from scalabl_server.web import errors
from scalabl_server.web.observation import SECURITY_HEADERS

LINGER_SECONDS = 2.0


class _LingeringTransport:
    """A transport whose `close` ends the writing side first, and the connection after the client could read the answer.

    Closing a socket with unread data resets the connection, and then the client may lose an answer that was already sent.
    """

    def __init__(self, transport: asyncio.Transport, protocol: TimedProtocol) -> None:
        self._transport, self._protocol = transport, protocol

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def close(self) -> None:
        if not self._protocol.begin_lingering():
            self._transport.close()


class TimedProtocol(H11Protocol):
    """One connection. `protocol_class` creates a subclass with another `header_timeout` (seconds)."""

    header_timeout = 10.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn declares it
        self._socket = transport
        self._header_timer: asyncio.TimerHandle | None = None
        self._last_timer: asyncio.TimerHandle | None = None  # closes the connection when it fires
        self._lingering = False
        super().connection_made(cast(asyncio.Transport, _LingeringTransport(transport, self)))
        self._arm_header_timer()

    def data_received(self, data: bytes) -> None:
        if self._lingering:
            return
        super().data_received(data)
        if self.conn.their_state is h11.IDLE and not self._lingering:
            self._arm_header_timer()
        else:
            self._disarm_header_timer()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.our_state is h11.DONE and self.conn.their_state is h11.SEND_BODY and self._last_timer is None:
            self._last_timer = self.loop.call_later(LINGER_SECONDS, self._socket.close)

    def handle_events(self) -> None:
        super().handle_events()
        if self._last_timer is not None and self.conn.their_state is not h11.SEND_BODY and not self._lingering:
            self._last_timer.cancel()  # the rest of the body arrived after the early answer; keep the connection
            self._last_timer = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm_header_timer()
        if self._last_timer is not None:
            self._last_timer.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn while it handles an error of h11, which suggests a status."""
        error = sys.exception()
        status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        if status == 431:
            self._answer(
                ProblemError("headers-too-large", "the headers exceed this server's size limit; send fewer headers")
            )
        else:
            self._answer(ProblemError("bad-request", "the data that arrived is not a well-formed HTTP request"))

    def begin_lingering(self) -> bool:
        """Keep the connection half open for a while if the client may still be sending. Returns whether it lingers."""
        if self._lingering:
            return True
        unread = self.conn.their_state in (h11.SEND_BODY, h11.ERROR)
        if not unread or self._socket.is_closing():
            return False
        self._lingering = True
        if self._last_timer is not None:
            self._last_timer.cancel()
        self._last_timer = self.loop.call_later(LINGER_SECONDS, self._socket.close)
        self.flow.resume_reading()
        if self._socket.can_write_eof():
            self._socket.write_eof()
        return True

    def _arm_header_timer(self) -> None:
        if self._header_timer is None:
            self._header_timer = self.loop.call_later(self.header_timeout, self._headers_late)

    def _disarm_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _headers_late(self) -> None:
        self._header_timer = None
        if self.transport.is_closing() or self.conn.their_state is not h11.IDLE or self.conn.our_state is not h11.IDLE:
            return
        if self.conn.trailing_data[0]:
            self._answer(
                ProblemError("receive-timeout", f"the request's headers did not arrive within {self.header_timeout:g} s")
            )
        else:
            self._socket.close()

    def _answer(self, problem: ProblemError) -> None:
        """Send an error without a complete request, then close the connection."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self._socket.close()
            return
        if self.cycle is not None and not self.cycle.response_complete:  # a chunk of its body was malformed
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        response = errors.answer(problem)
        headers = response.raw_headers + [(name.encode(), value.encode()) for name, value in SECURITY_HEADERS.items()]
        reason = HTTPStatus(response.status_code).phrase.encode()
        headers = self.server_state.default_headers + headers
        for event in (
            h11.Response(status_code=response.status_code, headers=headers, reason=reason),
            h11.Data(data=bytes(response.body)),
            h11.EndOfMessage(),
        ):
            self._socket.write(self.conn.send(event) or b"")
        self.transport.close()


def protocol_class(header_timeout: float) -> type[TimedProtocol]:
    """The protocol with this timeout for the headers of a request, in seconds."""
    return type("TimedProtocol", (TimedProtocol,), {"header_timeout": header_timeout})
