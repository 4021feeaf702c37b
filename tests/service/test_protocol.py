"""What reaches the application of a connection that sends more, or more slowly, than a request's head should."""

import asyncio
from contextlib import asynccontextmanager

import pytest
import uvicorn

from service import protocol
from service.protocol import MAX_HEAD_BYTES, GuardedProtocol

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


@pytest.fixture
async def connect():
    """Open connections to a server that speaks the guarded protocol."""
    config = uvicorn.Config(
        count_body, port=0, http=GuardedProtocol, ws="none", lifespan="off", log_config=None, timeout_keep_alive=60
    )
    config.load()
    server = uvicorn.Server(config)
    server.lifespan = config.lifespan_class(config)
    await server.startup()

    @asynccontextmanager
    async def connect():
        reader, writer = await asyncio.open_connection(*server.servers[0].sockets[0].getsockname()[:2])
        async with asyncio.timeout(30):
            try:
                yield reader, writer
            finally:
                writer.transport.abort()

    yield connect
    await server.shutdown()


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


async def test_a_head_above_the_limit_is_told_so(connect):
    """431, before the connection is closed."""
    async with connect() as (reader, writer):
        received = asyncio.create_task(reader.read())
        writer.write(b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * (MAX_HEAD_BYTES - 1000))
        while not received.done():  # little by little: what lies unread when the server closes would destroy its answer
            writer.write(b"a" * 4000)
            await asyncio.wait((received,), timeout=0.01)
        answer = received.result()
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert answer.endswith(b"request head exceeds 65,536 bytes; send shorter headers")


async def test_a_head_within_the_limit_may_come_in_pieces(connect):
    """Browsers send long cookies."""
    async with connect() as (reader, writer):
        for piece in (b"GET / HTTP/1.1\r\nHost: a\r\nX: ", b"a" * 30_000, b"a" * 30_000, b"\r\n\r\n"):
            writer.write(piece)
            await asyncio.sleep(0.01)
        assert (await reader.readline()).startswith(ANSWER)


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
