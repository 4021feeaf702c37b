"""What reaches the application of a connection that sends more, or more slowly, than a request's head should."""

import asyncio
from contextlib import suppress
from functools import partial

import pytest

from service import protocol
from service.errors import STATUS
from service.protocol import MAX_HEAD_BYTES, GuardedProtocol
from service.schemas import ErrorAnswer
from tests.service.conftest import connected, started, until

pytestmark = pytest.mark.anyio
PIECE = b"a" * 16_384
ANSWER = b"HTTP/1.1 200 OK"


async def count_body(scope, receive, send):
    """Answer with the size of the body."""
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        size, more = size + len(message["body"]), message["more_body"]
    body = b"%d" % size
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


async def answer_at_once(scope, receive, send):
    """Do not wait for the body."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


@pytest.fixture
async def connect():
    """Open connections to a server that speaks the guarded protocol, and runs `count_body` or what it is given."""
    application = count_body

    async def app(scope, receive, send):
        await application(scope, receive, send)

    guarded = partial(GuardedProtocol, fast_url_path=b"/short", fast_path=lambda *_: False)
    server = await started(app, http=guarded, timeout_keep_alive=60)

    def connect(runs=count_body):
        nonlocal application
        application = runs
        return connected(server)

    connect.connections = server.server_state.connections
    yield connect
    await server.shutdown()


def refused(answer, status, code, words):
    """The bytes are an answer with this error, in the shape of all our errors."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status)
    found = ErrorAnswer.model_validate_json(body, extra="forbid")
    assert (found.error.code, STATUS[code]) == (code, status)
    assert words in found.error.message
    headers = head.decode().split("\r\n")[1:]
    assert f"x-request-id: {found.request_id}" in headers
    assert {"connection: close", f"content-length: {len(body)}", "content-type: application/json"} <= {*headers}
    return found


@pytest.fixture
def _hurried(monkeypatch):
    monkeypatch.setattr(protocol, "HEAD_S", 0.05)


async def send_until_closed(reader, writer, beginning, piece):
    """Send for ever; return what the server said before it closed the connection, and how much it took."""
    writer.write(beginning)
    sent = 0
    try:
        while not reader.at_eof():
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
            sent += len(piece)
    except ConnectionError:
        pass
    try:
        return await reader.read(), sent
    except ConnectionError:
        return b"", sent


@pytest.mark.parametrize(
    ("beginning", "piece"),
    [
        (b"GET /", PIECE),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: ", PIECE),
        (b"GET / HTTP/1.1\r\nHost: a\r\n", b"X: y\r\n" * 2048),
        (b"GET / HTTP/1.1\r\nHost: a\r\n\r\nGET / HTTP/1.1\r\nX: ", PIECE),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\nX: ", PIECE),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1;", PIECE),
        (b"", b"\r\n" * 8192),
    ],
    ids=["path", "header", "headers", "second request's header", "trailer", "chunk extension", "empty lines"],
)
async def test_what_is_not_body_has_a_limit(connect, beginning, piece):
    """An endless anything ends with the connection, long before it fills the memory."""
    async with connect() as (reader, writer):
        _, sent = await send_until_closed(reader, writer, beginning, piece)
    assert sent < 64 * 1024**2  # what lies in the sockets' buffers included


@pytest.mark.parametrize("body", [0, 200_000])
async def test_a_head_above_the_limit_is_told_so(connect, body):
    """431, before the connection is closed; the body of the request before it is no credit."""
    sent = 0
    async with connect() as (reader, writer):
        writer.write(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % body + bytes(body))
        await reader.readuntil(b"\r\n\r\n%d" % body)
        received = asyncio.create_task(reader.read())
        writer.write(b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * (MAX_HEAD_BYTES - 1000))
        while not received.done():  # little by little: what lies unread when the server closes would destroy its answer
            writer.write(b"a" * 4000)
            sent += 4000
            await asyncio.wait((received,), timeout=0.01)
        answer = received.result()
    assert sent < 2 * MAX_HEAD_BYTES
    refused(answer, 431, "head_too_large", "more than 65,536 bytes")


@pytest.mark.parametrize("first", [1000, 69_000, None], ids=["in two", "nearly whole", "whole"])
@pytest.mark.parametrize(("size", "status"), [(60_000, 200), (70_000, 431), (120_000, 431)])
async def test_a_head_has_the_same_limit_however_it_is_cut(connect, first, size, status):
    """By what it holds, before anybody learns of the request; what was sent in one piece as well."""
    lines = b"".join(b"X-%05d: %s\r\n" % (n, b"a" * 990) for n in range(size // 1000))
    head = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n" + lines + b"\r\n"
    async with connect() as (reader, writer):
        writer.write(head[:first])
        await writer.drain()
        await asyncio.sleep(0.05)
        if first is not None:
            writer.write(head[first:])
        answer = await reader.read()
    if status == 200:
        assert answer.startswith(ANSWER)
    else:
        refused(answer, 431, "head_too_large", "more than 65,536 bytes")


@pytest.mark.parametrize(
    "pieces",
    [
        [b"X: " + b"a" * 10**6],
        [b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n"],
        [b"X: " + b"a" * 60_000, b"a" * 10_000 + b"\0"],
    ],
    ids=["too long", "wrong", "both at once"],
)
async def test_a_refused_client_may_finish_sending_and_reads_why(connect, monkeypatch, pieces):
    """The connection is closed once it has, and not for any wait that began before; what it sends is not looked at."""
    monkeypatch.setattr(protocol, "LINGER_S", 60)
    monkeypatch.setattr(protocol, "HEAD_S", 0.3)
    async with connect() as (reader, writer):
        for piece in (b"POST / HTTP/1.1\r\nHost: a\r\n", *pieces):
            writer.write(piece)
            await asyncio.sleep(0.02)
        await until(lambda: any(connection._linger_timer for connection in connect.connections))
        assert not any(connection.expecting for connection in connect.connections)
        await asyncio.sleep(0.4)
        for _ in range(20):
            writer.write(PIECE + b"\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n")
            await writer.drain()
        assert (await reader.read()).count(b"HTTP/1.1 4") == 1
        writer.close()
        await until(lambda: not connect.connections)


@pytest.mark.parametrize(("linger_s", "limit"), [(0.1, 10**9), (60, 10**6)], ids=["time", "bytes"])
async def test_a_refused_client_that_never_ends_is_cut_off(connect, monkeypatch, linger_s, limit):
    """By time and by what it sends."""
    monkeypatch.setattr(protocol, "LINGER_S", linger_s)
    monkeypatch.setattr(protocol, "MAX_IGNORED_BYTES", limit)
    async with connect() as (reader, writer):
        writer.write(b"no HTTP\r\n\r\n")
        refused(await reader.read(), 400, "request_invalid", "")
        while connect.connections:
            writer.write(PIECE)
            await asyncio.sleep(0.001)


async def test_a_head_within_the_limit_may_come_in_pieces(connect):
    """Browsers send long cookies, with every request."""
    async with connect() as (reader, writer):
        for _ in range(2):
            for piece in (b"GET / HTTP/1.1\r\nHost: a\r\nX: ", b"a" * 30_000, b"a" * 30_000, b"\r\n\r\n"):
                writer.write(piece)
                await asyncio.sleep(0.01)
            assert (await reader.readuntil(b"\r\n\r\n0")).startswith(ANSWER)


async def test_a_body_of_many_tiny_chunks_is_not_mistaken_for_a_head(connect):
    """Chunks of one byte cost five more each; 100,000 of them are a lawful body."""
    async with connect() as (reader, writer):
        writer.write(b"POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n")
        writer.write(b"1\r\na\r\n" * 100_000 + b"0\r\n\r\n")
        assert (await reader.read()).endswith(b"100000")


async def test_requests_that_share_a_read_are_told_apart(connect):
    """Large bodies and the heads between them, as one stream: all are answered, in order."""
    request = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 200000\r\n\r\n" + b"b" * 200_000
    async with connect() as (reader, writer):
        writer.write(request * 20 + request.replace(b"Host", b"Connection: close\r\nHost"))
        received = await reader.read()
    assert received.count(ANSWER) == received.count(b"\r\n\r\n200000") == 21


@pytest.mark.usefixtures("_hurried")
@pytest.mark.parametrize("beginning", [b"", b"\r\n", b"GET / HT", b"GET / HTTP/1.1\r\nHost: a\r\nX: y\r\n"])
async def test_a_head_that_never_ends_is_not_waited_for(connect, beginning):
    """The connection is closed, whether nothing came or half a head."""
    async with connect() as (reader, writer):
        writer.write(beginning)
        assert await reader.read() == b""


@pytest.mark.usefixtures("_hurried")
async def test_a_connection_may_rest_between_requests(connect):
    """Only heads are hurried: an idle connection may stay, and a slow body has a limit of its own."""
    async with connect() as (reader, writer):
        for _ in range(2):
            writer.write(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nb")
            await asyncio.sleep(0.2)
            writer.write(b"b")
            assert (await reader.readuntil(b"\r\n\r\n2")).startswith(ANSWER)
            await asyncio.sleep(0.2)


OFFER = b"Connection: keep-alive, Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"


@pytest.mark.parametrize("pause", [0, 0.05])
@pytest.mark.parametrize("offer", [OFFER, b"Upgrade: websocket\r\nConnection: Upgrade\r\n"])
async def test_an_offer_to_go_on_in_another_protocol_is_passed_over(connect, offer, pause):
    """The body belongs to the request, in one piece with the head or not, and the next request follows behind it."""
    body = b"GET /another HTTP/1.1\r\nHost: a\r\n\r\n"  # it must not be taken for one
    head = b"POST / HTTP/1.1\r\nHost: a\r\n" + offer + b"Content-Length: %d\r\n\r\n" % len(body)
    async with connect() as (reader, writer):
        for _ in range(2):
            writer.write(head)
            await asyncio.sleep(pause)
            writer.write(body)
            assert (await reader.readuntil(b"\r\n\r\n%d" % len(body))).startswith(ANSWER)
        writer.write(head + body + b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        assert (await reader.read()).count(ANSWER) == 2


async def test_many_offers_in_one_read_are_passed_over(connect):
    """As many as fit, each with its answer."""
    request = b"POST / HTTP/1.1\r\nHost: a\r\n" + OFFER + b"Content-Length: 1\r\n\r\nb"
    async with connect() as (reader, writer):
        writer.write(200 * request + request.replace(b"keep-alive", b"close"))
        assert (await reader.read()).count(ANSWER) == 201


@pytest.mark.parametrize(
    ("request_head", "status"),
    [(b"CONNECT a:80", 400), (b"POST /short?" + 65_530 * b"a", 431), (b"GET /" + 65_540 * b"a", 431)],
    ids=["a tunnel", "a long query", "a long path"],
)
async def test_what_cannot_be_a_request_is_refused(connect, request_head, status):
    """Where its body is still to come, too."""
    async with connect() as (reader, writer):
        writer.write(request_head + b" HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 %d" % status)


@pytest.mark.parametrize(
    ("request_bytes", "words"),
    [
        (b"\x16\x03\x01\x02\x00\x01", "Invalid method encountered; send plain HTTP/1.1, without TLS"),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n", "Duplicate Content-Length"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nno\r\n", "Invalid character in chunk size"),
        (b"CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n", "this is no proxy"),
        (b"GET http://[::1 HTTP/1.1\r\nHost: a\r\n\r\n", "invalid url b'http://[::1'"),
        (b"GET / HTTP/1.1\r\n\r\n", "it must have one Host header"),
        (b"GET / HTTP/2.0\r\nHost: a\r\n\r\n", "it says that it is HTTP/2.0"),
        (b"POST /short HTTP/1.1\r\nHost: a\r\nHost: b\r\nContent-Length: 1\r\n\r\na", "it must have one Host header"),
    ],
    ids=["TLS", "two lengths", "chunk", "tunnel", "url", "no host", "version", "two hosts"],
)
async def test_what_is_no_http_is_told_why(connect, request_bytes, words):
    """In our shape, with a fresh request id."""
    async with connect() as (reader, writer):
        writer.write(request_bytes)
        refused(await reader.read(), 400, "request_invalid", words)


async def test_http_1_0_needs_no_host_and_is_not_told_to_go_on(connect):
    """As some load balancers' probes; 100 would be taken for the answer."""
    async with connect() as (reader, writer):
        writer.write(b"POST / HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\nab")
        assert (await reader.read()).startswith(ANSWER)


async def echo_headers(scope, receive, send):
    """Answer, once the body is here, with the names of the headers."""
    while (await receive())["more_body"]:
        pass
    body = b" ".join(name for name, _ in scope["headers"])
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


@pytest.mark.parametrize("path", [b"/", b"/short"])
async def test_trailers_are_no_headers(connect, path):
    """However the request is cut."""
    head = b"POST %s HTTP/1.1\r\nHost: a\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n" % path
    async with connect(echo_headers) as (reader, writer):
        writer.write(head + b"1\r\na\r\n0\r\nX-Request-Id: mine\r\nContent-Type: text/plain\r\n\r\n")
        assert (await reader.read()).endswith(b"\r\n\r\nhost connection transfer-encoding")


async def test_a_refusal_has_the_request_id_of_its_own_request(connect):
    """Where that came so far; not the one of the request before it."""
    async with connect() as (reader, writer):
        writer.write(b"GET / HTTP/1.1\r\nHost: a\r\nX-Request-Id: first\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n0")
        writer.write(b"no HTTP\r\n\r\n")
        assert refused(await reader.read(), 400, "request_invalid", "").request_id != "first"
    async with connect() as (reader, writer):
        writer.write(b"GET / HTTP/1.1\r\nHost: a\r\nX-Request-Id: mine\r\nTransfer-Encoding: chunked\r\n\r\nno\r\n")
        assert refused(await reader.read(), 400, "request_invalid", "").request_id == "mine"


async def test_what_follows_a_good_request_does_not_spoil_its_answer(connect):
    """Both good ones are answered, in order; then the connection is closed at once, not answered for the nonsense."""
    async with connect() as (reader, writer):
        for body in (b"a", b"bb"):
            writer.write(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        writer.write(b"no HTTP\r\n\r\n")
        answers = await reader.read()
    assert answers.count(ANSWER) == 2
    assert answers.count(b"connection: close") == 1
    assert b" 400 " not in answers
    assert answers.index(b"\r\n\r\n1HTTP") < answers.index(b"\r\n\r\n2")


def counting_after(go_on):
    """An application that answers as `count_body`, once it may."""

    async def wait(scope, receive, send):
        await go_on.wait()
        await count_body(scope, receive, send)

    return wait


async def test_a_body_that_breaks_off_into_nonsense_is_refused(connect):
    """Its request is the one that is being answered."""
    async with connect() as (reader, writer):
        writer.write(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n")
        await asyncio.sleep(0.02)
        writer.write(b"no size\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 400")


async def test_an_answer_that_has_begun_is_broken_off_by_nonsense(connect):
    """Its client would take the refusal for a part of it."""

    async def answer_half(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"999")]})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        while (await receive())["type"] != "http.disconnect":
            pass

    async with connect(answer_half) as (reader, writer):
        writer.write(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n")
        assert (await reader.readuntil(b"half")).startswith(ANSWER)
        writer.write(b"no size\r\n")
        with suppress(ConnectionResetError):
            assert await reader.read() == b""


async def test_nonsense_behind_an_unanswered_request_leaves_its_body_alone(connect):
    """The second request's chunks make no sense; nobody takes a 400 for the first one's answer."""
    go_on = asyncio.Event()
    async with connect(counting_after(go_on)) as (reader, writer):
        writer.write(b"GET /first HTTP/1.1\r\nHost: a\r\n\r\n")
        writer.write(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nno size\r\n")
        await asyncio.sleep(0.05)
        go_on.set()
        with suppress(ConnectionResetError):
            assert b" 400 " not in await reader.read()


@pytest.mark.parametrize("headers", [b"", b"Connection: close\r\n"])
async def test_a_client_that_does_not_read_is_given_up(connect, monkeypatch, headers):
    """The application is not held for ever, nor what it had to say."""
    monkeypatch.setattr(protocol, "SEND_S", 0.1)
    said, size = asyncio.Event(), 32 * 1024**2

    async def talk(scope, receive, send):
        head = [(b"content-length", b"%d" % (2 * size))]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        for more in (True, False):
            await send({"type": "http.response.body", "body": bytes(size), "more_body": more})
        said.set()

    async with connect(talk) as (reader, writer):
        reader._transport.pause_reading()
        writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n" + headers + b"\r\n")
        await said.wait()
        await asyncio.sleep(0.3)
        reader._transport.resume_reading()
        with suppress(ConnectionResetError):
            assert len(await reader.read()) < size


async def test_a_body_that_never_comes_does_not_keep_an_answered_connection(connect, monkeypatch):
    """The application answered without it; the connection is then idle like any other."""
    monkeypatch.setattr(GuardedProtocol, "timeout_keep_alive", property(lambda _: 0.2, lambda *_: None), raising=False)

    async with connect(answer_at_once) as (reader, writer):
        writer.write(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n")
        assert (await reader.read()).startswith(ANSWER)


@pytest.mark.parametrize(
    "pieces", [[b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n"], [b"GET / HT", b"TP/1.1\r\nHost: a\r\n\r\n"]]
)
async def test_only_a_connection_that_rests_is_closed(connect, monkeypatch, pieces):
    """Not one with a request that takes longer than it may rest, or that comes so slowly."""
    monkeypatch.setattr(GuardedProtocol, "timeout_keep_alive", property(lambda _: 0.5, lambda *_: None), raising=False)

    async def take_long(scope, receive, send):
        await asyncio.sleep(0.8 if scope["path"] == "/slow" else 0)
        await count_body(scope, receive, send)

    async with connect(take_long) as (reader, writer):
        writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert (await reader.readuntil(b"\r\n\r\n0")).startswith(ANSWER)
        for number, piece in enumerate(pieces):
            await asyncio.sleep(0.8 * number)
            writer.write(piece)
        assert (await reader.readuntil(b"\r\n\r\n0")).startswith(ANSWER)


async def test_a_client_that_reads_on_is_not_given_up(connect, monkeypatch):
    """Not even later, when the time is over that it would have had."""
    monkeypatch.setattr(protocol, "SEND_S", 1)
    size = 8 * 1024**2

    async def talk(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % size)]})
        await send({"type": "http.response.body", "body": bytes(size)})

    async with connect(talk) as (reader, writer):
        for pause in (0.1, 0):
            reader._transport.pause_reading()
            writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            await asyncio.sleep(pause)
            reader._transport.resume_reading()
            await reader.readuntil(b"\r\n\r\n")
            assert len(await reader.readexactly(size)) == size
            await asyncio.sleep(12 * pause)


@pytest.mark.usefixtures("_hurried")
async def test_half_a_head_does_not_cut_off_the_answer_before_it(connect):
    """It may go on waiting behind the request that is being answered."""
    go_on = asyncio.Event()
    async with connect(counting_after(go_on)) as (reader, writer):
        writer.write(b"GET /first HTTP/1.1\r\nHost: a\r\n\r\nGET /second HT")
        await asyncio.sleep(0.2)
        go_on.set()
        assert (await reader.readuntil(b"\r\n\r\n0")).startswith(ANSWER)


async def test_a_request_is_expected_of_a_new_connection_and_within_a_head(connect):
    """A service that ends waits for those, and for no connection that rests."""
    async with connect() as (reader, writer):
        await until(lambda: connect.connections)
        (connection,) = connect.connections
        assert connection.expecting
        writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n0")
        assert not connection.expecting
        writer.write(b"GET / HT")
        await until(lambda: connection.expecting)


async def test_whoever_hangs_up_is_missed_by_the_request_that_runs(connect):
    """Also where another request waits behind it on the same connection, which then never begins."""
    seen, began, ended = [], asyncio.Event(), asyncio.Event()

    async def wait(scope, receive, send):
        seen.append(scope["path"])
        began.set()
        await receive()
        seen.append((await receive())["type"])
        ended.set()

    async with connect(wait) as (_, writer):
        for path in (b"/first", b"/second"):
            writer.write(b"GET " + path + b" HTTP/1.1\r\nHost: a\r\n\r\n")
        await began.wait()
        await asyncio.sleep(0.05)
    async with asyncio.timeout(5):
        await ended.wait()
    await asyncio.sleep(0.05)
    assert seen == ["/first", "http.disconnect"]
