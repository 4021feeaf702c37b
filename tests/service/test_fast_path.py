"""Small images that come in one piece, which the protocol answers without a task: nobody can tell, but for the time."""

import asyncio
import json
import logging
import re
import socket
from contextlib import asynccontextmanager, suppress
from functools import partial

import pytest

from service import protocol, routes
from service.protocol import GuardedProtocol
from tests.service.conftest import connected, encode, start, started, until
from tests.service.test_batching import FILES
from tests.tiny import NAN_COLOUR, noise, plain

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def listening(running, *, send_buffer=None, **options):
    """A socket in front of a service that runs here; connect to it. What is not read yet fits into `send_buffer`."""
    guarded = partial(GuardedProtocol, fast_url_path=b"/classify", fast_path=running.app.classify.fast_path)
    server = await started(running.app, http=guarded, server_header=False, **options)
    if send_buffer is not None:
        server.servers[0].sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)

    yield partial(connected, server)
    await server.shutdown()


@pytest.fixture
def taken(monkeypatch):
    """What took the fast path, of all requests that were offered to it."""
    offered = []
    fast_path = routes.ClassifyRoute.fast_path

    def note(*arguments):
        offered.append(fast_path(*arguments))
        return offered[-1]

    monkeypatch.setattr(routes.ClassifyRoute, "fast_path", note)
    return offered


@pytest.fixture
async def served(service, taken):
    """The usual service, and a function that connects to it."""
    async with listening(service) as connect:
        yield service, connect


def request(body, *headers, query=b"", version=b"1.1"):
    """POST /classify as it goes over the wire."""
    lines = [b"POST /classify%s HTTP/%s" % (query, version), b"Host: x", b"Content-Length: %d" % len(body), *headers]
    return b"\r\n".join([*lines, b"", b""]) + body


async def read_answer(reader):
    """Status, headers and body of the next answer."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
    body = await reader.readexactly(int(headers["content-length"]))
    return int(head[0].split()[1]), headers, json.loads(body)


def without_chance(answer):
    """An answer without what differs from request to request."""
    text = re.sub(r'"latency_ms": {.*?}', '"latency_ms": 0', json.dumps(answer))
    return re.sub(r'"request_id": "\w+"', '"request_id": 0', text)


async def ask(connect, *pieces):
    """Send a request in so many pieces, each a read of its own; its answer."""
    async with connect() as (reader, writer):
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.02)
        return await read_answer(reader)


@pytest.mark.parametrize("query", [b"", b"?top_k=2&threshold=0", b"?max_experts=1&mode=full"])
async def test_both_ways_give_the_same_answer(monkeypatch, service, query, taken):
    """Status, headers and body, but for ids and times; in one piece it takes the fast path, in two the normal one."""
    async with listening(service) as connect:
        whole = request(FILES[0], b"Content-Type: image/png", query=query)
        short = await ask(connect, whole)
        long = await ask(connect, whole[:-9], whole[-9:])
    assert taken == [True]
    assert short[0] == long[0] == 200
    assert without_chance(short[2]) == without_chance(long[2])
    same = [{name: value for name, value in headers.items() if name not in CHANCE} for headers in (short[1], long[1])]
    assert same[0] == same[1]
    assert short[1]["x-request-id"] == short[2]["request_id"]


CHANCE = ("x-request-id", "content-length", "date")


def form(*files):
    """The body of a form with these (name, bytes), and its header; the boundary is b."""
    parts = [
        b'--b\r\nContent-Disposition: form-data; name="f"; filename="%s"\r\n\r\n%s\r\n' % (name, data)
        for name, data in files
    ]
    return b"".join(parts) + b"--b--\r\n", b"Content-Type: multipart/form-data; boundary=b"


async def test_a_form_of_one_file_takes_the_fast_path(monkeypatch, service, taken):
    """With the answer of the normal one, its file's name included; the bytes that it holds are given back."""
    async with listening(service) as connect:
        whole = request(*form((b"cat.png", FILES[0])))
        short, long = await ask(connect, whole), await ask(connect, whole[:-9], whole[-9:])
    assert taken == [True]
    assert (short[0], short[2]["results"][0]["filename"]) == (200, "cat.png")
    assert without_chance(short[2]) == without_chance(long[2])
    assert service.classifier.upload_memory.held == 0


@pytest.mark.parametrize("files", [(), ((b"a", FILES[0]), (b"b", FILES[1])), ((b"a", FILES[0]), (b"b", b"junk"))])
async def test_forms_of_no_or_several_files_go_the_long_way(served, taken, files):
    """An answer, or a refusal, for each."""
    service, connect = served
    status, _, answer = await ask(connect, request(*form(*files)))
    assert (taken, status) == ([False], 200 if files else 422)
    assert [result["filename"] for result in answer.get("results", ())] == [name.decode() for name, _ in files]
    assert service.classifier.upload_memory.held == service.metric("queue_images") == 0


@pytest.mark.parametrize(
    ("body", "headers", "query", "code"),
    [
        (b"no image at all", (), b"", "image_unsupported"),
        (FILES[0][:60], (), b"", "image_unreadable"),
        (FILES[0], (), b"?top_k=0", "parameter_invalid"),
        (b"", (), b"", "no_image"),
        (FILES[0], (b"Content-Type: multipart/form-data",), b"", "no_image"),
    ],
)
async def test_what_is_refused_goes_the_long_way(served, taken, body, headers, query, code):
    """With the error that it always had, counted once, and nothing stays behind."""
    service, connect = served
    status, _, answer = await ask(connect, request(body, *headers, query=query))
    assert (answer["error"]["code"], status >= 400) == (code, True)
    assert taken in ([False], [])  # an empty body is not even offered
    assert service.metric("refused_total", reason=code) == 1
    assert service.metric("requests_total", code=str(status)) == 1
    assert service.classifier.upload_memory.held == service.metric("queue_images") == 0


async def test_requests_on_one_connection_are_answered_in_order(served, taken):
    """Three at once: the first takes the fast path, those behind it wait for their turn."""
    _, connect = served
    async with connect() as (reader, writer):
        writer.write(b"".join(request(file, b"X-Request-Id: %d" % number) for number, file in enumerate(FILES[:3])))
        answers = [await read_answer(reader) for _ in range(3)]
    assert [answer["request_id"] for _, _, answer in answers] == ["0", "1", "2"]
    assert taken == [True]


@pytest.mark.parametrize("how", [
    {"headers": (b"Connection: close",)}, {"version": b"1.0"},
    {"version": b"1.0", "headers": (b"Connection: keep-alive",)},  # it would wait for that word in the answer
])  # fmt: skip
async def test_a_client_that_wants_the_connection_closed_gets_that(service, how):
    """After its answer, not after the time that a connection may rest."""
    async with listening(service, timeout_keep_alive=600) as connect, connect() as (reader, writer):
        writer.write(request(FILES[0], *how.get("headers", ()), version=how.get("version", b"1.1")))
        status, headers, _ = await read_answer(reader)
        assert (status, headers["connection"]) == (200, "close")
        assert await reader.read() == b""


async def test_a_client_that_hangs_up_is_not_worked_for(served, taken):
    """Its image leaves the queue; it is counted as 499, and nothing waits for it at the end."""
    service, connect = served
    with service.engine.hold():
        async with connect() as (_, first):
            first.write(request(FILES[0]))
            await until(lambda: service.engine.held)
            async with connect() as (_, second):
                second.write(request(FILES[1]))
                await until(lambda: service.decoded() == 2)
            await until(lambda: service.metric("requests_total", code="499") == 1)
            assert service.metric("queue_images") == 0 or not service.engine.runs
        await until(lambda: service.metric("requests_total", code="499") == 2)
    assert taken == [True, True]
    assert await service.classifier.drain(30)
    assert service.classifier.upload_memory.held == 0
    await until(lambda: service.engine.runs)
    assert [count for stage, count in service.engine.runs if stage == "trunk"] == [1]


async def test_whoever_hangs_up_while_the_answer_is_made_is_counted_as_gone(served, monkeypatch, taken):
    """Between the hang-up and the word of it the connection is closing: what is written to it reaches nobody."""
    service, connect = served
    answer = routes._FastRequest._answer

    def hang_up_then_answer(self, outcome):
        self.exchange._protocol.transport.close()
        answer(self, outcome)

    monkeypatch.setattr(routes._FastRequest, "_answer", hang_up_then_answer)
    async with connect() as (reader, writer):
        writer.write(request(FILES[0]))
        assert await reader.read() == b""
    await until(lambda: service.metric("requests_total", code="499") == 1)
    assert service.metric("requests_total", code="200") == 0
    assert taken == [True]
    assert await service.classifier.drain(30)
    assert service.classifier.upload_memory.held == 0


async def test_an_answer_that_takes_too_long_is_given_up(tiny_bundle, taken):
    """504 within the time, the connection lives on, and the image that was given up is answered to nobody."""
    async with start(tiny_bundle, timeout_s=0.2) as service, listening(service) as connect:
        async with connect() as (reader, writer):
            with service.engine.hold():
                writer.write(request(FILES[0]))
                status, _, answer = await read_answer(reader)
            assert (status, answer["error"]["code"]) == (504, "timeout")
            writer.write(request(FILES[1]))
            status, _, _ = await read_answer(reader)
        assert (status, taken) == (200, [True, True])
        await asyncio.sleep(0.4)  # an answered one is watched no more: nobody gives it up
        assert service.metric("requests_total", code="504") == service.metric("requests_total", code="200") == 1


async def test_a_failing_batch_is_an_error_with_an_id(served, monkeypatch, caplog, taken):
    """500, told apart from the client's mistakes, logged with the id; the next one is answered."""
    service, connect = served

    def fail(_):
        raise RuntimeError("the graph broke")

    async with connect() as (reader, writer):
        with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
            patch.setattr(service.engine, "trunk", fail)
            writer.write(request(FILES[0], b"X-Request-Id: broken-1"))
            status, _, answer = await read_answer(reader)
        assert (status, answer["error"]["code"]) == (500, "internal")
        assert "broken-1" in answer["error"]["message"]
        assert "broken-1" in [
            record.fields["request_id"] for record in caplog.records if record.getMessage() == "failed"
        ]
        writer.write(request(FILES[0]))
        assert (await read_answer(reader))[0] == 200
    assert taken == [True, True]


async def test_a_full_queue_and_a_draining_service_refuse(tiny_bundle, taken):
    """429 and 503 as ever; while it drains, what was accepted is answered, and its connection closed."""
    async with (
        start(tiny_bundle, max_queue=1, max_batch=1, max_images=1) as service,
        listening(service) as connect,
        connect() as (reader, writer),
        connect() as (_, waiting),
    ):
        with service.engine.hold():
            writer.write(request(FILES[0]))
            await until(lambda: service.engine.held)
            waiting.write(request(FILES[1]))
            await until(lambda: service.decoded() == 2)
            assert (await ask(connect, request(FILES[2])))[2]["error"]["code"] == "overloaded"
            draining = asyncio.create_task(service.classifier.drain(30))
            await until(lambda: service.classifier.state == "draining")
            assert (await ask(connect, request(FILES[3])))[2]["error"]["code"] == "shutting_down"
            assert not draining.done()
        status, headers, _ = await read_answer(reader)
        assert (status, headers["connection"]) == (200, "close")
        assert await draining
    assert taken == [True, True, False, False]


async def test_a_connection_that_rests_is_closed_after_its_time_and_not_before(service, taken):
    """Every request begins the time anew."""
    async with listening(service, timeout_keep_alive=1) as connect, connect() as (reader, writer):
        for _ in range(3):
            writer.write(request(FILES[0]))
            assert (await read_answer(reader))[0] == 200
            await asyncio.sleep(0.6)
        began = asyncio.get_running_loop().time()
        assert await reader.read() == b""
        assert 0 < asyncio.get_running_loop().time() - began < 5
    assert taken == [True] * 3


async def test_a_large_image_goes_the_long_way(served, taken):
    """More pixels than are decoded in passing: threads do that."""
    _, connect = served
    status, _, _ = await ask(connect, request(encode(noise(1, seed=3)[0].repeat(64, 0).repeat(64, 1))))
    assert (status, taken) == (200, [False])


async def test_a_body_above_the_limit_is_refused_on_either_way(tiny_bundle, taken):
    """However small an image is that comes in one piece; at the limit it is taken."""
    async with start(tiny_bundle, max_bytes=len(FILES[0])) as service, listening(service) as connect:
        assert (await ask(connect, request(FILES[0])))[0] == 200
        status, _, answer = await ask(connect, request(FILES[0] + b"\0"))
    assert (status, answer["error"]["code"]) == (413, "request_too_large")
    assert taken == [True, False]


async def test_other_methods_are_refused_with_a_body_or_without(served, taken):
    """As on the normal path."""
    _, connect = served
    status, _, answer = await ask(connect, request(FILES[0]).replace(b"POST", b"GET", 1))
    assert (status, answer["error"]["code"]) == (405, "method_not_allowed")
    assert taken == []


async def test_an_image_for_which_a_graph_gives_nan_is_told_of_alike_on_both_ways(served, taken):
    """The status, the error, and a result that has it too."""
    _, connect = served
    whole = request(encode(plain(NAN_COLOUR)), b"X-Request-Id: nan")
    short, long = await ask(connect, whole), await ask(connect, whole[:-9], whole[-9:])

    assert taken == [True]
    assert short[0] == long[0] == 500
    assert short[2] == long[2]


async def test_bodies_count_as_held_on_either_way(tiny_bundle, taken):
    """Until their answers: a second one that would exceed the memory for all of them is refused."""
    size = len(FILES[0])
    async with (
        start(tiny_bundle, max_bytes=size, max_inflight_bytes=2 * size - 1) as service,
        listening(service) as connect,
        connect() as (reader, writer),
    ):
        with service.engine.hold():
            writer.write(request(FILES[0]))
            await until(lambda: service.engine.held)
            assert (await ask(connect, request(FILES[0])))[2]["error"]["code"] == "overloaded"
        assert (await read_answer(reader))[0] == 200
        assert (await ask(connect, request(FILES[0])))[0] == 200
    assert taken == [True, False, True]


@pytest.mark.parametrize("cut", [None, -9], ids=["short", "long"])
async def test_experts_do_not_run_for_a_client_that_is_gone(served, taken, cut):
    """The step that it hung up in is its image's last one, on either way; whoever comes next is answered."""
    service, connect = served
    with service.engine.hold():
        async with connect() as (_, writer):
            whole = request(FILES[0], query=b"?threshold=0")
            writer.write(whole[:cut])
            if cut is not None:
                await asyncio.sleep(0.02)
                writer.write(whole[cut:])
            await until(lambda: service.engine.held)
        await until(lambda: service.metric("requests_total", code="499") == 1)
    assert (await ask(connect, request(FILES[1], query=b"?threshold=1")))[0] == 200

    assert taken == [True] * (2 if cut is None else 1)
    assert [stage for stage, _ in service.engine.runs] == ["trunk", "expert_0", "router_0"] * 2


@asynccontextmanager
async def narrow_socket(connect):
    """A connected socket that takes in next to nothing until it is read."""
    async with connect() as (_, writer):
        address = writer.get_extra_info("peername")[:2]
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        await asyncio.get_running_loop().sock_connect(client, address)
        yield client


async def test_a_closed_connection_whose_answer_nobody_reads_is_given_up(service, monkeypatch):
    """Also where what is left of it is too little for the application to be held."""
    monkeypatch.setattr(protocol, "SEND_S", 0.1)
    loop, received = asyncio.get_running_loop(), b""
    async with listening(service, send_buffer=4096) as connect, narrow_socket(connect) as client:
        asked = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n"
        await loop.sock_sendall(client, 4 * asked + asked.replace(b"x", b"x\r\nConnection: close"))
        await asyncio.sleep(0.5)
        with suppress(ConnectionResetError):
            while piece := await asyncio.wait_for(loop.sock_recv(client, 65_536), 10):
                received += piece
    assert received.startswith(b"HTTP/1.1 200 OK")
    assert len(received) < 5 * int(re.search(rb"content-length: (\d+)", received)[1])


async def test_a_client_that_does_not_read_its_answers_goes_the_long_way(service, taken):
    """Which waits for it, so that they do not pile up here; none is lost."""
    loop, sent, received = asyncio.get_running_loop(), 0, b""
    async with listening(service, send_buffer=4096) as connect, narrow_socket(connect) as client:
        while len(taken) == sent and sent < 2000:
            await loop.sock_sendall(client, request(FILES[0]))
            sent += 1
            for _ in range(500):  # the next one shall not take the normal path for coming before this one's answer
                if service.metric("requests_total", code="200") < sent:
                    await asyncio.sleep(0.001)
        assert len(taken) == sent - 1
        while received.count(b"HTTP/1.1 200 OK") < sent:
            received += await asyncio.wait_for(loop.sock_recv(client, 65_536), 10)
