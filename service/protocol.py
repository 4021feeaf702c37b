"""
HTTP as uvicorn speaks it, with the limits it lacks: on the size of a request's head, and on the time it takes.

An offer to go on in another protocol (Java's client makes one for HTTP/2) is passed over; uvicorn would lose the body.
And with a fast path: a small request that came whole is first offered to a handler that needs no task for it.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Final, Literal, TypeAlias

import httptools
import orjson
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from service.errors import ServiceError
from service.headers import Headers, common_headers, request_id_of
from service.logs import log

MAX_HEAD_BYTES: Final = 64 * 1024
OFFERS: Final = (b"upgrade", b"http2-settings")  # headers, and what they are called in "connection"
HEAD_S: Final = 10.0  # from a connection's, or a request's, first byte to the end of its headers
SEND_S: Final = 30.0  # for which a client that does not read its answers is waited for
LINGER_S: Final = 3.0  # for which a refused client may go on sending
MAX_IGNORED_BYTES: Final = 16 * 1024**2  # of what it sends then
FRAMING_PER_BODY_BYTE: Final = 8  # chunks of one byte each cost five more
FAST_BYTES: Final = 64 * 1024  # of body; larger ones hardly ever come in one piece
TOO_LARGE: Final = ServiceError(
    "head_too_large",
    f"request line, headers and trailers of more than {MAX_HEAD_BYTES:,} bytes, the limit; send shorter ones",
)


class Exchange:
    """
    One request that is answered without a task. To uvicorn it looks like the cycle that runs an application.

    Attributes:
        hung_up: called where the client is gone before the answer.
        keep_alive: whether the connection stays open behind the answer.
    """

    def __init__(self, protocol: "GuardedProtocol", *, keep_alive: bool) -> None:
        self._protocol = protocol
        self.keep_alive = keep_alive
        self.response_complete = False
        self.hung_up: Callable[[], None] | None = None

    @property
    def gone(self) -> bool:
        """Whether the client hung up, though `hung_up` has not been called yet."""
        return bool(self._protocol.transport.is_closing())

    def answer(self, status: int, headers: Headers, content: bytes) -> None:
        """
        Send the answer, head and body. Once, and not after `hung_up`; to nobody where the connection is just closing.

        Args:
            headers: without `content-length` and `connection`.
        """
        protocol, self.hung_up = self._protocol, None
        if not self.gone:
            headers = [*protocol.server_state.default_headers, *headers]
            protocol.transport.write(_response(status, headers, content, keep_alive=self.keep_alive))
        self.response_complete = True
        if not self.keep_alive:
            protocol.transport.close()
        protocol.on_response_complete()


def _response(status: int, headers: Headers, content: bytes, *, keep_alive: bool) -> bytes:
    """Head and body."""
    head = [STATUS_LINE[status]]
    for name, value in headers:
        head += (name, b": ", value, b"\r\n")
    head.append(b"content-length: %d\r\n" % len(content))
    head.append(b"\r\n" if keep_alive else b"connection: close\r\n\r\n")
    return b"".join((*head, content))


# Takes a request's query, headers and body; whether it will answer. If not, the application does.
Handler: TypeAlias = Callable[[bytes, Headers, bytes, Exchange], bool]


class GuardedProtocol(HttpToolsProtocol):
    """
    Closes a connection whose request head is endless or never comes.

    Without it, a head of any size is collected, in a time that grows with the square of it, while everybody waits.
    Trailers and chunk extensions count as well: whatever is not body.
    """

    cycle: Any  # uvicorn's, or an Exchange: of the request that came last

    def __init__(
        self, *arguments: Any, fast_url_path: bytes = b"", fast_path: Handler | None = None, **named: Any
    ) -> None:
        """
        Args:
            fast_url_path: whose POST requests are offered to `fast_path`.
        """
        super().__init__(*arguments, **named)
        self._fast_url_path = fast_url_path
        self._fast_path = fast_path
        self._held_back: list[bytes] | None = None  # the body of a request of which uvicorn knows nothing yet
        self._running: Any = None  # as `cycle`: of the request that is being answered, or was last
        self._passed_over = False  # whether the present head offers another protocol, so that it comes again without
        self._messages = 0  # requests begun on this connection
        self._phase: Literal["between", "head", "body"] = "between"
        self._framing_bytes = 0  # of the present request, what is not body
        self._body_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._idle_since = 0.0
        self._idle_timer: asyncio.TimerHandle | None = None
        self._send_timer: asyncio.TimerHandle | None = None
        self._linger_timer: asyncio.TimerHandle | None = None  # where a request was refused, and no other is looked at
        self._ignored_bytes = 0

    @property
    def expecting(self) -> bool:
        """Whether a request is on its way: the first one of this connection, or one whose head is not complete."""
        return self._linger_timer is None and (not self._messages or self._phase == "head")

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(HEAD_S, self._head_timed_out)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self._cancel_head_timer()
        for timer in (self._idle_timer, self._send_timer, self._linger_timer):
            if timer is not None:
                timer.cancel()
        running = self._running
        if isinstance(self.cycle, Exchange):
            self.cycle = None
        super().connection_lost(exc)  # which tells the last request's cycle
        if isinstance(running, Exchange):
            if running.hung_up is not None:
                running.hung_up()
        elif running is not None:
            running.disconnected = True
            running.message_event.set()

    def pause_writing(self) -> None:
        """The client reads too slowly: what we had to say is piling up here."""
        super().pause_writing()
        self._limit_sending()

    def resume_writing(self) -> None:
        """It has read on."""
        super().resume_writing()
        if self._send_timer is not None and not self.transport.is_closing():
            self._send_timer.cancel()
            self._send_timer = None

    def _limit_sending(self) -> None:
        if self._send_timer is None:
            self._send_timer = self.loop.call_later(SEND_S, self.transport.abort)

    def _limit_closing(self) -> None:
        """A closed connection waits until the client has read all."""
        if self.transport.get_write_buffer_size():
            self._limit_sending()

    def data_received(self, data: bytes) -> None:
        """Parse, then see how much of it was not body; one read is small enough to be let through."""
        if self._linger_timer is not None:
            self._ignored_bytes += len(data)
            if self._ignored_bytes > MAX_IGNORED_BYTES:
                self.transport.abort()
            return
        messages, phase, body_bytes = self._messages, self._phase, self._body_bytes
        self._parse(data)
        if self._is_over():
            return
        if self._messages == messages and not (phase == "head" and self._phase != "head"):
            self._framing_bytes += len(data) - (self._body_bytes - body_bytes)
            if self._framing_bytes > MAX_HEAD_BYTES + FRAMING_PER_BODY_BYTE * self._body_bytes:
                self._refuse_size()
                return
        if self._head_timer is None and self._phase == "head":
            self._head_timer = self.loop.call_later(HEAD_S, self._head_timed_out)

    def _parse(self, data: bytes) -> None:
        try:
            while True:
                try:
                    self.parser.feed_data(data)
                    break
                except httptools.HttpParserUpgrade as offer:
                    data = self._head_without_offer() + data[offer.args[0] :]
                    self.parser = httptools.HttpRequestParser(self)
                    self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's own
            if self._held_back is not None:  # the rest is still to come
                self._hand_on()
        except httptools.HttpParserError as error:
            if self._is_over():
                return
            # The parser says only that a callback failed; why, a URL say, is in the error behind.
            reason = error.__context__ if isinstance(error.__context__, httptools.HttpParserError) else error
            refusal = ServiceError(
                "request_invalid",
                f"cannot be read as HTTP/1.1: {str(reason)[:200]}; send plain HTTP/1.1, without TLS, to this port",
            )
            if not self._answering():
                self._refuse(refusal)
            elif self._phase != "body":  # whatever follows a good request: that one is answered, and nothing behind it
                self.cycle.keep_alive = False
            elif self._running is self.cycle and not self.cycle.response_started:
                self._refuse(refusal)
            else:  # the broken one is not the one that is being answered, or it has been refused already
                self.transport.abort()

    def _head_without_offer(self) -> bytes:
        """The head that the parser has just read, without its offer; the parser takes it for the last of HTTP."""
        self._passed_over = False
        if self.parser.get_method() == b"CONNECT":
            raise httptools.HttpParserError("this is no proxy")
        lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())]
        for name, value in self.headers:
            if name == b"connection":
                tokens = [token.strip() for token in value.split(b",")]
                lines.append(b"connection: " + b", ".join(token for token in tokens if token.lower() not in OFFERS))
            elif name not in OFFERS:
                lines.append(name + b": " + value)
        return b"\r\n".join((*lines, b"", b""))

    def on_message_begin(self) -> None:
        """A request's first byte."""
        self._messages += 1
        self._phase = "head"
        self._framing_bytes = self._body_bytes = 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """A line of the head; trailers, which come behind a body in chunks, are no headers (RFC 9110, 6.5.1)."""
        if self._phase == "head":
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is over; one that came in large pieces is measured only now."""
        version = self.parser.get_http_version()
        if version == "1.0":
            self.expect_100_continue = False  # such a client takes any answer for the last one
        elif version != "1.1":
            raise httptools.HttpParserError(f"it says that it is HTTP/{version}")
        elif [name for name, _ in self.headers].count(b"host") != 1:
            raise httptools.HttpParserError("it must have one Host header")
        self._phase = "body"
        self._cancel_head_timer()
        self._framing_bytes = 0
        if len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > MAX_HEAD_BYTES:
            self._refuse_size()
            raise httptools.HttpParserError("the connection is closed")
        if self.parser.should_upgrade():
            self._passed_over = True
        elif self._may_be_fast():
            self._held_back = []
        else:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A piece of body."""
        self._body_bytes += len(body)
        if self._held_back is not None:
            self._held_back.append(body)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is over; the next one may follow."""
        self._phase = "between"
        if self._passed_over:
            return
        if self._held_back is not None:
            if self._take_fast_path(self._held_back):
                self._held_back = None
                return
            self._hand_on()
        super().on_message_complete()

    def _may_be_fast(self) -> bool:
        """Whether to hold the request back from uvicorn until it is seen whether all of it is here."""
        length = 0
        if self._fast_path is None:
            return False
        if self.parser.get_method() != b"POST" or self.parser.get_http_version() != "1.1":
            return False
        if self.url.partition(b"?")[0] != self._fast_url_path or self._answering() or self.pipeline:
            return False
        if self.flow.write_paused:  # the client does not read; on the normal path it is waited for
            return False
        for name, value in self.headers:
            if name == b"content-length":
                length = int(value)  # the parser lets nothing else pass
            elif name in (b"transfer-encoding", b"expect", b"upgrade"):
                return False
        return 0 < length <= FAST_BYTES

    def _take_fast_path(self, body: list[bytes]) -> bool:
        assert self._fast_path is not None
        exchange = Exchange(self, keep_alive=self.parser.should_keep_alive())
        before = self.cycle, self._running
        self.cycle = self._running = exchange
        taken = self._fast_path(self.url.partition(b"?")[2], self.headers, b"".join(body), exchange)
        if not taken:
            self.cycle, self._running = before
        return taken

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def _hand_on(self) -> None:
        """Let uvicorn know of the request after all."""
        pieces, self._held_back = self._held_back, None
        super().on_headers_complete()
        for piece in pieces or ():
            super().on_body(piece)

    def on_response_complete(self) -> None:
        """
        As uvicorn's, but without a timer set and cancelled for each request, which would cost more than the answer.

        The connection's one timer looks from time to time how long nothing has come.
        """
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            self._limit_closing()
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
            return
        self._idle_since = self.loop.time()
        if self._idle_timer is None:
            self._idle_timer = self.loop.call_later(self.timeout_keep_alive, self._close_if_idle)

    def _close_if_idle(self) -> None:
        wait = self._idle_since + self.timeout_keep_alive - self.loop.time()
        if self._phase == "head" or self._answering():  # a body that never comes may have been answered already
            wait = self.timeout_keep_alive
        if wait > 0:
            self._idle_timer = self.loop.call_later(wait, self._close_if_idle)
        else:
            self.transport.close()
            self._limit_closing()

    def _refuse(self, error: ServiceError) -> None:
        """
        Answer what the application never gets to see, or not the rest of, and close the connection.

        Closed while the client sends it would be reset, and the answer might be lost: it has time to read.
        """
        request_id = request_id_of(self.headers if self._phase != "between" else ())
        log(logging.WARNING, "refused", request_id=request_id, code=error.code, message=error.message)
        content = orjson.dumps({"request_id": request_id, "error": error.as_json()})
        headers = [*self.server_state.default_headers, *common_headers(request_id, "")]
        headers.append((b"content-type", b"application/json"))
        self.transport.write(_response(error.status, headers, content, keep_alive=False))
        if self._answering():  # the application waits for the rest, and is told by the connection's end
            self.transport.close()
        else:
            self._cancel_head_timer()
            if self._idle_timer is not None:
                self._idle_timer.cancel()
            self.transport.write_eof()
            self._linger_timer = self.loop.call_later(LINGER_S, self.transport.abort)

    def _is_over(self) -> bool:
        return self._linger_timer is not None or self.transport.is_closing()

    def _refuse_size(self) -> None:
        """Refuse a head, or what frames a body, that is too large; hang up where the request before waits."""
        if self._answering():
            self.transport.abort()
        else:
            self._refuse(TOO_LARGE)

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
