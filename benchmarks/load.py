"""
A load generator that takes little of the server's time: one process, keep-alive connections, requests made beforehand.

    python -m benchmarks.load http://127.0.0.1:8000/classify --connections 64 --seconds 10
    python -m benchmarks.load http://127.0.0.1:8000/classify --rate 500 --seconds 10 --multipart

Closed loop: each connection sends its next request when the last one is answered. Open loop (--rate): requests are due
at seeded Poisson times, whether or not the server keeps up. Latency counts from the moment a request was due, so a
request that waited for a free connection has that wait in its latency (no coordinated omission).
"""

import argparse
import asyncio
import ctypes
import gc
import json
import os
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import numpy as np
import uvloop

from benchmarks.images import SIZES, SMALL, make_images
from benchmarks.messages import Target, multipart_requests, raw_requests

CONCURRENCIES: Final = (1, 8, 64)  # clients of the closed loops that are compared
GRACE_S: Final = 10.0  # after the last request was due: how long its answer may take
EARLY_S: Final = 0.002  # by which a timer of the event loop may ring too early
UNANSWERED: Final = "unanswered"  # not within the grace
DISCONNECTED: Final = "disconnected"  # the server hung up in place of an answer
REFUSED: Final = "connection refused"


@dataclass(frozen=True)
class LoadResult:
    """
    What a load brought. Latencies are of requests answered with 200, and of those never answered, as far as they got.

    Attributes:
        rate: answers with 200 per second of the window.
        outcomes: requests that were due in the window, by status or by what happened in place of an answer.
        late_p99_ms, late_max_ms: how long requests were due before they were sent, for want of a free connection or of
            time of this process. Part of the latencies.
        generator_cpu_s: processor time of this process in the window.
    """

    connections: int
    asked_rate: float | None
    seconds: float
    rate: float
    p50_ms: float | None
    p90_ms: float | None
    p99_ms: float | None
    max_ms: float | None
    late_p99_ms: float
    late_max_ms: float
    outcomes: dict[str, int]
    generator_cpu_s: float

    @property
    def errors(self) -> int:
        """Requests that were not answered with 200."""
        return sum(count for outcome, count in self.outcomes.items() if outcome != "200")


@dataclass(frozen=True, slots=True)
class Sample:
    """One request: which, when it was due, sent and over (by time.perf_counter()), and how it ended."""

    index: int
    due: float
    sent: float
    over: float
    outcome: str


class Connection(asyncio.Protocol):
    """One connection, at most one request on its way."""

    def __init__(self, load: "Load") -> None:
        self._load = load
        self._received = bytearray()
        self._body_starts = 0  # 0 until the whole head is here
        self._length = 0
        self._status = ""
        self._due = self._sent = 0.0
        self.index = -1  # of the request on its way; -1: none
        self.closing = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The connection stands."""
        self.transport = transport

    def send(self, index: int, due: float) -> None:
        """Send the request of this index; it was due at `due`."""
        self.index, self._due, self._sent = index, due, time.perf_counter()
        self.transport.write(self._load.requests[index])

    def data_received(self, data: bytes) -> None:
        """Read the status line and the body's length; pass over the rest."""
        self._received += data
        if not self._body_starts:
            head_ends = self._received.find(b"\r\n\r\n")
            if head_ends < 0:
                return
            self._body_starts = head_ends + 4
            head = bytes(self._received[:head_ends]).lower()
            self._status = head[9:12].decode()
            length_at = head.find(b"\r\ncontent-length:")
            if length_at < 0:
                raise ValueError(f"answer has no Content-Length: {head!r}")
            self._length = int(head[length_at + 17 :].split(b"\r\n", 1)[0])
            self.closing = b"\r\nconnection: close" in head
        if len(self._received) < self._body_starts + self._length:
            return
        body = bytes(self._received[self._body_starts :]) if self._load.bodies is not None else b""
        self._received.clear()
        self._body_starts = 0
        self._finish(self._status, body)
        if self.closing:
            self.transport.close()
        else:
            self._load.free(self)

    def connection_lost(self, error: Exception | None) -> None:
        """The server, or `close`, ended it: count what was on its way and connect anew."""
        if self.index >= 0:
            self._finish(DISCONNECTED, b"")
        self._load.lost(self)

    def abandon(self, now: float) -> None:
        """Count the request on its way as never answered."""
        if self.index >= 0:
            self._load.samples.append(Sample(self.index, self._due, self._sent, now, UNANSWERED))
            self.index = -1

    def _finish(self, outcome: str, body: bytes) -> None:
        self._load.samples.append(Sample(self.index, self._due, self._sent, time.perf_counter(), outcome))
        if self._load.bodies is not None and outcome == "200":
            self._load.bodies.append((self.index, body))
        self.index = -1


class Load:
    """Closed loop: a free connection sends its next request at once, until the time is over."""

    def __init__(self, target: Target, requests: Sequence[bytes], keep_bodies: bool = False) -> None:
        self.requests = requests
        self.samples: list[Sample] = []
        self.bodies: list[tuple[int, bytes]] | None = [] if keep_bodies else None
        self.refused = 0
        self._target = target
        self._turn = 0
        self._idle: list[Connection] = []
        self._connections: set[Connection] = set()
        self._reconnecting: set[asyncio.Future[None]] = set()
        self._ends = 0.0
        self._over = False

    async def run(self, connections: int, warm_up_s: float, seconds: float) -> tuple[float, float]:
        """
        Send for warm_up_s + seconds, then wait for what is on its way.

        Returns:
            When the measured window began, by time.perf_counter(), and the processor seconds that it cost this process.
        """
        await asyncio.gather(*(self._connect() for _ in range(connections)))
        begins = time.perf_counter() + warm_up_s
        self._ends = begins + seconds
        self._start()
        await asyncio.sleep(begins - time.perf_counter())
        cpu = time.process_time()
        await asyncio.sleep(self._ends - time.perf_counter() + EARLY_S)  # so that nothing is sent from here on
        cpu = time.process_time() - cpu
        await asyncio.gather(*self._reconnecting)
        # An event in place of this polling would have to be looked after at every answer.
        while self._unfinished() and self._connections and time.perf_counter() < self._ends + GRACE_S:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        self._over = True
        now = time.perf_counter()
        for connection in self._connections:
            connection.abandon(now)
            connection.transport.close()
        self._stop(now)
        await asyncio.sleep(0)  # lets the connections close
        return begins, cpu

    def free(self, connection: Connection) -> None:
        """This connection can take a request."""
        due = self._next_due()
        if due is None:
            self._idle.append(connection)
        else:
            connection.send(self._turn, due)
            self._turn = (self._turn + 1) % len(self.requests)

    def lost(self, connection: Connection) -> None:
        """This connection is gone: another takes its place while there is something to send."""
        self._connections.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        if not self._over and time.perf_counter() < self._ends:
            task = asyncio.ensure_future(self._reconnect())
            self._reconnecting.add(task)
            task.add_done_callback(self._reconnecting.discard)

    async def _connect(self) -> Connection:
        _, connection = await asyncio.get_running_loop().create_connection(
            lambda: Connection(self), self._target.host, self._target.port
        )
        self._connections.add(connection)
        self._idle.append(connection)
        return connection

    async def _reconnect(self) -> None:
        try:
            connection = await self._connect()
        except OSError:
            self.refused += 1  # the server is gone; this place stays empty
            return
        self._idle.remove(connection)
        self.free(connection)

    def _start(self) -> None:
        idle, self._idle = self._idle, []
        for connection in idle:
            self.free(connection)

    def _next_due(self) -> float | None:
        """When the next request was due that may be sent now; None: there is none."""
        now = time.perf_counter()
        return now if now < self._ends else None

    def _unfinished(self) -> bool:
        return any(connection.index >= 0 for connection in self._connections)

    def _stop(self, now: float) -> None:
        """Count what was due and never sent; in a closed loop there is nothing."""


class OpenLoad(Load):
    """Open loop: requests are due at Poisson times; those that find no free connection wait in a queue here."""

    def __init__(
        self, target: Target, requests: Sequence[bytes], rate: float, seed: int, keep_bodies: bool = False
    ) -> None:
        super().__init__(target, requests, keep_bodies)
        self._gaps = _exponential(np.random.default_rng(seed), 1 / rate)
        self._waiting: deque[float] = deque()

    def _start(self) -> None:
        self._alarm = Alarm()
        self._next_arrival = time.perf_counter() + next(self._gaps)
        asyncio.get_running_loop().add_reader(self._alarm.descriptor, self._arrive)
        self._alarm.set(self._next_arrival)

    def _arrive(self) -> None:
        """Queue what is due by now, send what finds a free connection, and set the alarm for the next."""
        self._alarm.clear()
        now = time.perf_counter()
        while self._next_arrival <= now and self._next_arrival < self._ends:
            self._waiting.append(self._next_arrival)
            self._next_arrival += next(self._gaps)
        while self._waiting and self._idle:
            self.free(self._idle.pop())
        if self._next_arrival < self._ends:
            self._alarm.set(self._next_arrival)

    def _next_due(self) -> float | None:
        return self._waiting.popleft() if self._waiting else None

    def _unfinished(self) -> bool:
        return bool(self._waiting) or super()._unfinished()

    def _stop(self, now: float) -> None:
        asyncio.get_running_loop().remove_reader(self._alarm.descriptor)
        self._alarm.close()
        self.samples += [Sample(-1, due, now, now, UNANSWERED) for due in self._waiting]


class Alarm:
    """A timer that the event loop can wait for as it waits for a socket; its own timers are a millisecond coarse."""

    CLOCK_MONOTONIC = 1  # the clock of time.perf_counter() on Linux
    TFD_TIMER_ABSTIME = 1

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self.descriptor = self._libc.timerfd_create(self.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self.descriptor < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create failed; open loops need Linux")

    def set(self, at: float) -> None:
        """Make the descriptor readable at `at`, by time.perf_counter()."""
        seconds = int(at)
        spec = (ctypes.c_long * 4)(0, 0, seconds, int((at - seconds) * 1e9))  # interval, then time
        self._libc.timerfd_settime(self.descriptor, self.TFD_TIMER_ABSTIME, spec, None)

    def clear(self) -> None:
        """Make the descriptor unreadable again."""
        os.read(self.descriptor, 8)

    def close(self) -> None:
        """Give the descriptor back."""
        os.close(self.descriptor)


def closed_loop(
    target: Target, requests: Sequence[bytes], *, connections: int, seconds: float, warm_up_s: float = 0.5
) -> LoadResult:
    """Load a server with as many requests at once as there are connections."""
    return _measure(Load(target, requests), connections, warm_up_s, seconds, None)


def open_loop(
    target: Target,
    requests: Sequence[bytes],
    *,
    rate: float,
    seconds: float,
    connections: int = 256,
    warm_up_s: float = 0.5,
    seed: int = 0,
) -> LoadResult:
    """Load a server with `rate` requests per second, at Poisson times."""
    return _measure(OpenLoad(target, requests, rate, seed), connections, warm_up_s, seconds, rate)


def fetch(target: Target, requests: Sequence[bytes], *, connections: int, seconds: float) -> list[tuple[int, bytes]]:
    """Load a server in a closed loop and return (request's index, body) of every answer with 200."""
    load = Load(target, requests, keep_bodies=True)
    _run(load, connections, 0.0, seconds)
    assert load.bodies is not None
    return load.bodies


def trace(target: Target, requests: Sequence[bytes], *, connections: int, seconds: float) -> list[Sample]:
    """Load a server in a closed loop and return every request's fate."""
    load = Load(target, requests)
    _run(load, connections, 0.0, seconds)
    return load.samples


def _run(load: Load, connections: int, warm_up_s: float, seconds: float) -> tuple[float, float]:
    gc.collect()
    gc.disable()  # a pause of ours would be the server's latency
    policy = os.sched_getscheduler(0)
    # On shared cores an answer must not wake us in the middle of the server's work, as it does three times in four.
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(load.run(connections, warm_up_s, seconds))
    finally:
        os.sched_setscheduler(0, policy, os.sched_param(0))
        gc.enable()


def _measure(load: Load, connections: int, warm_up_s: float, seconds: float, rate: float | None) -> LoadResult:
    begins, cpu = _run(load, connections, warm_up_s, seconds)
    ends = begins + seconds
    window = [sample for sample in load.samples if begins <= sample.due < ends]
    outcomes = Counter(sample.outcome for sample in window)
    if load.refused:
        outcomes[REFUSED] = load.refused
    answered = sum(sample.outcome == "200" and begins <= sample.over < ends for sample in load.samples)
    latencies = [sample.over - sample.due for sample in window if sample.outcome in ("200", UNANSWERED)]
    late = [sample.sent - sample.due for sample in window] or [0.0]
    p50, p90, p99, longest = (
        (1000 * np.quantile(latencies, (0.5, 0.9, 0.99, 1.0))).round(3).tolist() if latencies else (None,) * 4
    )
    return LoadResult(
        connections, rate, seconds, round(answered / seconds, 2), p50, p90, p99, longest,
        round(1000 * float(np.quantile(late, 0.99)), 3), round(1000 * max(late), 3), dict(outcomes), round(cpu, 3),
    )  # fmt: skip


def _exponential(random: np.random.Generator, mean: float) -> Iterator[float]:
    while True:
        yield from random.exponential(mean, 1024).tolist()


def main() -> None:
    """Load one URL and print the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="such as http://127.0.0.1:8000/classify?top_k=5")
    parser.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="send the JPEG files of this folder [default: made ones; of real images where RIDE_DATA has them]",
    )
    parser.add_argument(
        "--synthetic", action="store_true", help="made images are textures, even where RIDE_DATA has real ones"
    )
    parser.add_argument("--size", choices=SIZES, default=SMALL, help="of made images [default: %(default)s]")
    parser.add_argument("--connections", type=int, default=64, help="requests at once [default: %(default)s]")
    parser.add_argument("--seconds", type=float, default=10.0, help="that are measured [default: %(default)s]")
    parser.add_argument("--warm-up", type=float, default=0.5, help="seconds before that [default: %(default)s]")
    parser.add_argument("--rate", type=float, help="requests per second, at Poisson times: an open loop")
    parser.add_argument("--multipart", action="store_true", help="send forms, not raw bodies")
    parser.add_argument("--seed", type=int, default=0, help="of the Poisson times and the images [default: 0]")
    options = parser.parse_args()

    if options.images:
        images = [path.read_bytes() for path in sorted(options.images.glob("*.jp*g"))]
        if not images:
            parser.error(f"{options.images}: no *.jpg or *.jpeg there")
    else:
        images = make_images(options.size, seed=options.seed, synthetic=options.synthetic).jpegs
    target = Target.parse(options.url)
    requests = (multipart_requests if options.multipart else raw_requests)(target, images)
    shared = {"connections": options.connections, "seconds": options.seconds, "warm_up_s": options.warm_up}
    if options.rate:
        result = open_loop(target, requests, rate=options.rate, seed=options.seed, **shared)
    else:
        result = closed_loop(target, requests, **shared)
    print(json.dumps(asdict(result), indent=2))


if __name__ == "__main__":
    main()
