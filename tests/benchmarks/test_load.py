"""The load generator, against servers whose behaviour is known."""

import asyncio
import email
import threading
from contextlib import contextmanager

import pytest

from benchmarks import load
from benchmarks.load import closed_loop, fetch, open_loop, trace
from benchmarks.messages import Target, ask, multipart_requests, raw_requests

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
BUSY = b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 4\r\n\r\nbusy"
LAST = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok"


class ScriptedServer:
    """Answers the n-th request (from 0) with what `script(n)` gives: seconds to wait, and the pieces to write."""

    def __init__(self, script):
        self._script = script
        self.bodies = []
        self.listening = threading.Event()

    def serve(self):
        """In a thread of its own."""
        asyncio.run(self._serve())

    async def _serve(self):
        self._stop, self._loop = asyncio.Event(), asyncio.get_running_loop()
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.target = Target("127.0.0.1", server.sockets[0].getsockname()[1], "/")
        self.listening.set()
        await self._stop.wait()
        server.close()

    async def _connected(self, reader, writer):
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                self.bodies.append(await reader.readexactly(length))
                seconds, pieces = self._script(len(self.bodies) - 1)
                await asyncio.sleep(seconds)
                for piece in pieces:
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0)
                if not pieces or pieces[-1] == LAST:
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            writer.close()

    def stop(self):
        """End the thread's loop."""
        self._loop.call_soon_threadsafe(self._stop.set)


@contextmanager
def serving(script):
    """A ScriptedServer that listens."""
    server = ScriptedServer(script)
    thread = threading.Thread(target=server.serve)
    thread.start()
    server.listening.wait()
    try:
        yield server
    finally:
        server.stop()
        thread.join()


def run_closed(server, connections=4, seconds=0.3):
    """A closed loop of two requests in turn."""
    requests = raw_requests(server.target, [b"first", b"second"])
    return closed_loop(server.target, requests, connections=connections, seconds=seconds, warm_up_s=0.0)


def test_every_request_of_a_closed_loop_is_counted_once():
    """What the server saw is what the result says; images take turns, whole answers come in any pieces."""
    pieces = [OK[:5], OK[5:30], OK[30:-1], OK[-1:]]
    with serving(lambda n: (0, [OK] if n % 2 else pieces)) as server:
        result = run_closed(server)

    assert result.outcomes == {"200": len(server.bodies)}
    assert result.errors == 0
    assert result.rate == pytest.approx(len(server.bodies) / 0.3, rel=0.1)
    assert {body: server.bodies.count(body) for body in (b"first", b"second")}.keys() == set(server.bodies)
    assert abs(server.bodies.count(b"first") - server.bodies.count(b"second")) <= 1
    assert 0 < result.p50_ms <= result.p90_ms <= result.p99_ms <= result.max_ms
    assert result.generator_cpu_s > 0


def test_errors_are_counted_by_what_happened():
    """Refusals by status, hang-ups by name; neither counts as throughput, and the connection is made anew."""
    with serving(lambda n: (0, ([OK], [BUSY], [])[n % 3])) as server:
        result = run_closed(server, connections=1)

    seen = len(server.bodies)
    assert result.outcomes == {"200": -(-seen // 3), "429": -(-(seen - 1) // 3), "disconnected": seen // 3}
    assert result.errors == seen - result.outcomes["200"]
    assert result.rate == pytest.approx(result.outcomes["200"] / 0.3, rel=0.1)


def test_a_connection_that_the_server_closes_politely_is_no_error():
    """`Connection: close` after a good answer."""
    with serving(lambda n: (0, [LAST])) as server:
        result = run_closed(server)

    assert result.outcomes == {"200": len(server.bodies)}


def test_an_open_loop_counts_the_wait_of_requests_that_could_not_be_sent():
    """
    One stall of 200 ms, one connection, 200 requests per second: 40 requests wait for it, and their latencies say so.

    A closed loop sees one slow request among many fast ones: the omission that an open loop is there to avoid.
    """
    with serving(lambda n: (0.2 if n == 20 else 0, [OK])) as server:
        requests = raw_requests(server.target, [b"image"])
        opened = open_loop(server.target, requests, rate=200, seconds=1.0, connections=1, warm_up_s=0.0)
    with serving(lambda n: (0.2 if n == 20 else 0, [OK])) as server:
        closed = run_closed(server, connections=1, seconds=1.0)

    assert opened.outcomes == {"200": sum(opened.outcomes.values())}
    assert opened.max_ms > 190
    assert opened.p99_ms > 150
    assert opened.p90_ms > 50
    assert opened.p50_ms < 50
    assert opened.late_max_ms > 150
    assert closed.max_ms > 190
    assert closed.p90_ms < 50


def test_an_open_loop_keeps_its_rate_and_repeats_with_its_seed():
    """300 requests per second are due as 300 Poisson arrivals, whatever the server does."""
    with serving(lambda n: (0, [OK])) as server:
        requests = raw_requests(server.target, [b"image"])
        first, again, other = (
            open_loop(server.target, requests, rate=300, seconds=1.0, warm_up_s=0.0, connections=8, seed=seed)
            for seed in (1, 1, 2)
        )

    assert first.asked_rate == 300
    assert sum(first.outcomes.values()) == pytest.approx(300, abs=5 * 300**0.5)
    assert sum(first.outcomes.values()) == pytest.approx(sum(again.outcomes.values()), abs=2)
    assert sum(first.outcomes.values()) != sum(other.outcomes.values())


def test_what_is_never_answered_is_an_error_and_stays_in_the_latencies(monkeypatch):
    """Requests without an answer, and those behind them, count with the time that they have waited so far."""
    monkeypatch.setattr(load, "GRACE_S", 0.2)
    with serving(lambda n: (0.0 if n < 3 else 1.0, [OK])) as server:
        requests = raw_requests(server.target, [b"image"])
        result = open_loop(server.target, requests, rate=100, seconds=0.3, connections=1, warm_up_s=0.0)

    assert result.outcomes["200"] == 3
    assert result.outcomes["unanswered"] == sum(result.outcomes.values()) - 3
    assert result.max_ms > 400


def test_the_warm_up_is_not_measured():
    """The slow first requests do not show."""
    with serving(lambda n: (0.15 if n < 4 else 0, [OK])) as server:
        requests = raw_requests(server.target, [b"image"])
        result = closed_loop(server.target, requests, connections=4, seconds=0.3, warm_up_s=0.3)

    assert result.max_ms < 150
    assert sum(result.outcomes.values()) < len(server.bodies)


def test_bodies_are_kept_where_they_are_asked_for():
    """With the index of the request that each answers."""
    with serving(lambda n: (0, [OK])) as server:
        requests = raw_requests(server.target, [b"first", b"second"])
        bodies = fetch(server.target, requests, connections=2, seconds=0.2)
        samples = trace(server.target, requests, connections=2, seconds=0.1)

    assert {body for _, body in bodies} == {b"ok"}
    assert {index for index, _ in bodies} == {0, 1}
    assert {sample.outcome for sample in samples} == {"200"}


def test_a_form_carries_the_image_as_a_file():
    """As any parser of multipart reads it."""
    image = bytes(range(256))
    with serving(lambda n: (0, [OK])) as server:
        (request,) = multipart_requests(server.target, [image])
        assert ask(server.target, request) == (200, b"ok")

    header = next(line for line in request.split(b"\r\n") if line.startswith(b"Content-Type: multipart/form-data"))
    (part,) = email.message_from_bytes(header + b"\r\n\r\n" + server.bodies[0]).get_payload()
    assert part.get_content_type() == "image/jpeg"
    assert part.get_filename() == "image.jpg"
    assert part.get_payload(decode=True) == image


def test_only_plain_http_is_asked():
    """Anything else is refused before it is tried."""
    assert Target.parse("http://127.0.0.1:8000/classify?top_k=1") == Target("127.0.0.1", 8000, "/classify?top_k=1")
    with pytest.raises(ValueError, match="https"):
        Target.parse("https://127.0.0.1/")
