"""HTTP as uvicorn speaks it, with the limits it lacks: on the size of a request's head, and on the time it takes."""

import asyncio
from typing import Final, Literal

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES: Final = 64 * 1024
HEAD_S: Final = 10.0  # from a connection's, or a request's, first byte to the end of its headers
FRAMING_PER_BODY_BYTE: Final = 8  # chunks of one byte each cost five more
TOO_LARGE: Final = b"request head exceeds 65,536 bytes; send shorter headers"


class GuardedProtocol(HttpToolsProtocol):
    """
    Closes a connection whose request head is endless or never comes.

    Without it, a head of any size is collected, in a time that grows with the square of it, while everybody waits.
    Trailers and chunk extensions count as well: whatever is not body.
    """

    _messages = 0  # requests begun on this connection
    _phase: Literal["between", "head", "body"] = "between"
    _framing_bytes = 0  # of the present request, what is not body
    _body_bytes = 0
    _head_timer: asyncio.TimerHandle | None = None

    @property
    def expecting(self) -> bool:
        """Whether a request is on its way: the first one of this connection, or one whose head is not complete."""
        return not self._messages or self._phase == "head"

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(HEAD_S, self._head_timed_out)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self._cancel_head_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse, then see how much of it was not body; one read is small enough to be let through."""
        messages, phase, body_bytes = self._messages, self._phase, self._body_bytes
        super().data_received(data)
        if self.transport.is_closing():
            return
        stray = phase == self._phase == "between" and self._messages == messages  # it belongs to no request
        if self._messages == messages:
            self._framing_bytes += len(data) - (self._body_bytes - body_bytes)
            if self._framing_bytes > MAX_HEAD_BYTES + FRAMING_PER_BODY_BYTE * self._body_bytes:
                self._refuse_head()
                return
        if self._head_timer is None and (self._phase == "head" or stray):
            self._head_timer = self.loop.call_later(HEAD_S, self._head_timed_out)

    def on_message_begin(self) -> None:
        """A request's first byte."""
        self._messages += 1
        self._phase = "head"
        self._framing_bytes = self._body_bytes = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """The head is over."""
        self._phase = "body"
        self._cancel_head_timer()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A piece of body."""
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is over; the next one may follow."""
        self._phase = "between"
        super().on_message_complete()

    def _refuse_head(self) -> None:
        if self._answering():
            self.transport.abort()
            return
        self.transport.write(
            b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: text/plain; charset=utf-8\r\n"
            b"content-length: %d\r\nconnection: close\r\n\r\n%s" % (len(TOO_LARGE), TOO_LARGE)
        )
        self.transport.close()

    def _head_timed_out(self) -> None:
        self._head_timer = None
        if self._answering():  # the one before is not answered yet; this one may go on waiting behind it
            self._head_timer = self.loop.call_later(HEAD_S, self._head_timed_out)
        else:
            self.transport.close()

    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _cancel_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
