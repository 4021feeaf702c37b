"""Several fronts and one engine: the same answers, batches of all fronts together, and no death takes others along."""

import asyncio
import json
import os
import resource
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import uvloop

from model_export.bundle import InputSpec
from service.cascade import Job, NotFiniteError, Outcome
from service.engine import EngineError
from service.engine_process import EngineProcess
from service.errors import ServiceError
from service.places import BatcherStoppedError, QueueFullError
from service.remote import RemoteError, open_link
from service.wire import Connection, Packer, pack
from tests.service.conftest import encode, until
from tests.service.server import (
    IMAGE,
    SLOW,
    PersistentClient,
    alive,
    ask,
    hammer,
    request_for,
    servers,
    wait,
)
from tests.tiny import FAILING_COLOUR, NAN_COLOUR, TinyModel, noise, plain

INPUT = InputSpec(2, 2, "crop", "bilinear", (0.5,) * 3, (0.5,) * 3)


@dataclass(frozen=True)
class Data:
    """Something to send."""

    number: int
    name: str
    scores: list[float]
    left_out: object = None


def test_a_dataclass_arrives_as_it_was():
    """Every number to its last bit; what travels in another way is given at the other end."""
    packer = Packer(Data, without=("left_out",))
    data = Data(3, "ä", [0.1, 1 / 3, 5e-324, 0.0], object())

    assert packer.data(packer.values(data), left_out=data.left_out) == data


class Collecting(Connection):
    """Keeps what it receives."""

    def __init__(self):
        super().__init__()
        self.messages = []

    def received(self, message):
        self.messages.append(message)


@pytest.mark.parametrize("size", [1, 3, 7, 64, 10_000])
def test_messages_arrive_whole_however_the_stream_is_cut(size):
    """Several in one piece, or one in many."""
    messages = [[], [1, "two", [3.0]], ["x" * 300], [[index] for index in range(50)]]
    stream = b"".join(map(pack, messages))
    connection = Collecting()

    for start in range(0, len(stream), size):
        connection.data_received(stream[start : start + size])

    assert connection.messages == messages


def test_what_is_sent_where_nobody_is_there_any_more_is_dropped():
    """The connection may end before the turn of the loop in which it is written."""
    failures, ended = [], asyncio.Event()

    class Late(Collecting):
        def connection_lost(self, error):
            self.send("too late")
            asyncio.get_running_loop().call_soon(ended.set)  # when that has been written, or would have been

    async def send():
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: failures.append(context))
        ours, theirs = socket.socketpair()
        with theirs:
            transport, _ = await loop.create_connection(Late, sock=ours)
            transport.abort()
            await ended.wait()

    uvloop.run(send())
    assert not failures


class Engine:
    """In place of the classifier in the engine's process: the test answers its jobs."""

    provider, variant = "cuda", "fp16"

    def __init__(self):
        self.state = "starting"
        self.metrics = self
        self.beats = 0
        self.jobs = []

    def publish(self):
        self.beats += 1

    async def start(self):
        self.state = "ready"

    async def stop(self):
        self.state = "stopped"

    def submit(self, job):
        future = asyncio.get_running_loop().create_future()
        self.jobs.append((job, job.image.copy(), future))
        return future


def job(value=0, queued_at=1.5):
    """An image that has this value all over."""
    return Job(np.full((2, 2, 3), value, np.uint8), (0.5, 0.25), 3, 0.1, 2, queued_at)


def outcome(number):
    """An answer to tell apart."""
    return Outcome([number, 1], [0.75, 0.1], 2, "confident", [0.1, 1 / 3], 0.001, 0.002, [0.003, 0.004])


class Linked:
    """One front and the engine's process, in this process."""

    def __init__(self, *, max_queue=3, max_batch=2, front_of=lambda _: 0):
        self.link = open_link(1, INPUT, max_queue=max_queue, max_batch=max_batch)
        self.batcher = self.link.batcher
        self.front_of = front_of
        self.futures = []
        self.greetings = []
        self.start_engine()

    def start_engine(self):
        """The first one, or a successor."""
        self.engine = Engine()
        listening = self.link.listening.dup()
        listening.setblocking(False)
        self.process = EngineProcess(self.engine, self.link.slots, listening, self.front_of)
        self.serving = asyncio.create_task(self.process.serve())

    async def connect(self):
        """The front to the engine, and to its successors."""
        await self.batcher.connect(lambda *greeting: self.greetings.append(greeting))

    async def kill_engine(self):
        """Its connections break, and nobody accepts new ones."""
        self.serving.cancel()
        await asyncio.gather(self.serving, return_exceptions=True)
        for front in list(self.process._fronts):
            front.transport.abort()
        await until(lambda: not self.is_connected())

    def is_connected(self):
        """Whether the front takes work, or would if it had places."""
        try:
            self.batcher.check()
        except QueueFullError:
            return True
        except ServiceError:
            return False
        return True

    async def submit(self, *jobs):
        """Reserve and submit, and wait until they are with the engine."""
        before = len(self.engine.jobs)
        self.batcher.reserve(len(jobs))
        futures = [self.batcher.submit(one) for one in jobs]
        self.futures += futures
        await until(lambda: len(self.engine.jobs) == before + len(jobs))
        return futures


@pytest.fixture
async def linked():
    """Connected, with three places and two slots more."""
    linked = Linked()
    await linked.connect()
    assert linked.greetings == [("cuda", "fp16")]
    yield linked
    await linked.batcher.stop()
    outcomes = await asyncio.gather(*linked.futures, return_exceptions=True)
    assert all(isinstance(one, Outcome | Exception | asyncio.CancelledError) for one in outcomes)
    linked.process.stop()
    assert await linked.serving == 0
    linked.link.listening.close()


pytestmark = pytest.mark.filterwarnings("error")


@pytest.mark.anyio
async def test_jobs_and_outcomes_cross_unchanged(linked):
    """Pixels, parameters, the time since when it waits, and every field of the answer; in any order."""
    jobs = [job(index, queued_at=index / 3) for index in range(3)]
    futures = await linked.submit(*jobs)

    for index, (arrived, pixels, future) in enumerate(linked.engine.jobs):
        assert (pixels == index).all()
        assert arrived.image.base is not None, "the pixels were copied"
        assert [arrived.thresholds, arrived.max_experts, arrived.min_confidence, arrived.top_k, arrived.queued_at] == [
            [0.5, 0.25], 3, 0.1, 2, index / 3
        ]  # fmt: skip
        assert not arrived.abandoned
        if index == 1:
            await asyncio.sleep(0)
        future.set_result(outcome(index))
    assert await asyncio.gather(*futures) == [outcome(index) for index in range(3)]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("raised", "arrives"),
    [(NotFiniteError("NaN"), NotFiniteError), (OSError("disk"), RemoteError)],
)
async def test_a_failure_arrives_as_what_the_front_expects(linked, raised, arrives, caplog):
    """With its text; what nobody expects is a RemoteError, and logged once for all that it befell."""
    futures = await linked.submit(job(), job())
    for _, _, future in linked.engine.jobs:
        future.set_exception(raised)

    for future in futures:
        with pytest.raises(arrives) as failure:
            await future
        assert str(failure.value) == str(raised)
    assert [record.message for record in caplog.records] == ["batch_failed"] * (arrives is RemoteError)


@pytest.mark.anyio
async def test_whoever_gives_up_just_as_the_answer_comes_troubles_nobody(linked):
    """The engine's process is then told of a job that it has answered."""
    (left,) = await linked.submit(job())
    linked.engine.jobs[0][2].set_result(outcome(0))
    left.cancel()
    (other,) = await linked.submit(job(1))
    linked.engine.jobs[1][2].set_result(outcome(1))

    assert await other == outcome(1)


@pytest.mark.anyio
async def test_a_front_has_places_for_its_share_and_for_what_is_in_work(linked):
    """Three may wait, two more may be in work; then it is full, until answers come."""
    await linked.submit(job(), job())
    assert linked.batcher.waiting == 0  # both may be in work
    await linked.submit(job(), job(), job())
    assert linked.batcher.waiting == 3
    with pytest.raises(QueueFullError):
        linked.batcher.reserve(1)
    with pytest.raises(QueueFullError):
        linked.batcher.check()

    linked.engine.jobs[4][2].set_result(outcome(0))
    await until(lambda: linked.batcher.waiting == 2)
    linked.batcher.reserve(1)
    linked.batcher.release(1)


def test_every_front_has_slots_of_its_own():
    """For its queue and its share of what the engine works on, rounded up; no two images share memory."""
    link = open_link(3, INPUT, max_queue=2, max_batch=4)
    link.listening.close()
    slots = link.slots
    assert slots.pixels.shape == (3, 4, INPUT.height, INPUT.width, 3)
    slots.pixels[:] = np.arange(12, dtype=np.uint8).reshape(3, 4, 1, 1, 1)
    assert slots.pixels[:, :, 0, 0, 0].tolist() == np.arange(12).reshape(3, 4).tolist()


@pytest.mark.anyio
async def test_a_full_front_says_how_long_images_take_now(linked, monkeypatch):
    """A tenth of each image's time from submission to answer enters: 40 s once are 4."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("service.remote.time", SimpleNamespace(monotonic=lambda: clock.now))
    (future,) = await linked.submit(job())
    clock.now = 40.0
    linked.engine.jobs[0][2].set_result(outcome(0))
    await future
    with pytest.raises(QueueFullError) as refusal:
        linked.batcher.reserve(4)
    assert refusal.value.retry_after == 4
    assert linked.batcher.wait_s == 0  # nobody waits
    linked.batcher.reserve(1)
    assert linked.batcher.wait_s == pytest.approx(4)


@pytest.mark.anyio
async def test_what_is_not_answered_when_a_front_stops_is_told_so(linked):
    """As by a batcher of its own."""
    (future,) = await linked.submit(job())
    await linked.batcher.stop()
    with pytest.raises(BatcherStoppedError):
        await future


@pytest.mark.anyio
async def test_a_cancelled_job_is_passed_on_and_its_slot_used_again_after_the_answer(linked):
    """The engine's future is cancelled and the job marked; no other image ever gets into a slot that is in use."""
    futures = await linked.submit(job(1), job(2))
    futures[0].cancel()
    await until(lambda: linked.engine.jobs[0][0].abandoned)
    assert linked.engine.jobs[0][2].cancelled()
    assert not linked.engine.jobs[1][0].abandoned
    await until(lambda: len(linked.batcher._pending) == 1)

    await linked.submit(job(3), job(4), job(5))
    assert [(one.image == value).all() for (one, _, _), value in zip(linked.engine.jobs[1:], (2, 3, 4, 5), strict=True)]
    linked.engine.jobs[1][2].set_result(outcome(2))
    assert await futures[1] == outcome(2)


@pytest.mark.anyio
async def test_a_job_that_is_cancelled_while_its_answer_arrives_takes_no_other_along(linked):
    """Its slot may be another's by the time that it could be passed on."""
    (future,) = await linked.submit(job(1))
    (slot,) = linked.batcher._pending
    future.cancel()
    linked.batcher._answer([[slot, "NotFiniteError", ""]])  # which is there before anybody looks at the future
    (other,) = await linked.submit(job(2))
    assert list(linked.batcher._pending) == [slot]
    await asyncio.sleep(0.1)
    assert not linked.engine.jobs[1][0].abandoned

    linked.engine.jobs[1][2].set_result(outcome(2))
    assert await other == outcome(2)


@pytest.mark.anyio
async def test_when_the_engine_dies_its_jobs_get_503_and_the_next_one_takes_over(linked):
    """not_ready, with a hint to retry; meanwhile new work is refused in the same way; no slot is lost."""
    futures = await linked.submit(job(), job()) + await linked.submit(job(), job())
    linked.batcher.reserve(1)
    await linked.kill_engine()
    for future in futures:
        with pytest.raises(ServiceError, match="the process that runs the graphs has died") as refusal:
            await future
        assert (refusal.value.status, refusal.value.retry_after) == (503, 1)
    for refused in (linked.batcher.check, lambda: linked.batcher.reserve(1)):
        with pytest.raises(ServiceError, match="retry in 1 s"):
            refused()
    with pytest.raises(ServiceError):
        await linked.batcher.submit(job())

    linked.start_engine()
    linked.engine.provider, linked.engine.variant = "cpu", "int8"  # all that it found
    await until(linked.is_connected)
    assert linked.greetings == [("cuda", "fp16"), ("cpu", "int8")]
    futures = await linked.submit(job(6), job(7))
    linked.engine.jobs[1][2].set_result(outcome(7))
    assert await futures[1] == outcome(7)
    await linked.submit(job(), job(), job())  # as many as before


@pytest.mark.anyio
async def test_a_front_that_cannot_connect_for_a_while_tries_again(linked, caplog):
    """Out of file descriptors, say, just when the engine died; else it would answer 503 until it is restarted."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        await linked.kill_engine()
        await until(lambda: "engine_unreachable" in caplog.text)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    linked.start_engine()
    await until(linked.is_connected)


@pytest.mark.anyio
async def test_where_the_engine_is_gone_for_good_the_start_fails():
    """Nobody listens any more: the front ends, too, instead of waiting for ever."""
    link = open_link(1, INPUT, max_queue=1, max_batch=1)
    link.listening.close()

    with pytest.raises(EngineError, match=r"the engine's process has ended \(Connection refused\)"):
        await link.batcher.connect(print)
    await link.batcher.stop()


@pytest.mark.anyio
async def test_a_stranger_is_not_let_in():
    """Whoever is no worker, though it runs on the same machine, gets nothing, not even a greeting."""
    linked = Linked(front_of=lambda _: None)
    reader, writer = await asyncio.open_unix_connection(linked.link.listening.getsockname())
    assert await reader.read() == b""
    writer.close()
    linked.process.stop()
    assert await linked.serving == 0
    linked.link.listening.close()


@pytest.mark.anyio
async def test_the_engine_stays_until_the_last_front_has_left():
    """However early it is told to stop: fronts need it to drain."""
    linked = Linked()
    linked.process.stop()
    await linked.connect()
    (future,) = await linked.submit(job())
    await asyncio.sleep(0.3)
    assert not linked.serving.done()
    linked.engine.jobs[0][2].set_result(outcome(0))
    assert await future == outcome(0)
    await linked.batcher.stop()
    assert await linked.serving == 0
    assert linked.engine.state == "stopped"
    assert linked.engine.beats >= 1
    linked.link.listening.close()


@pytest.fixture
def serve(slow_bundle, tmp_path):
    """Start ride-serve with three fronts and an engine, and wait until all of them are ready."""
    with servers(slow_bundle, tmp_path) as start:
        yield lambda *options: start("--shared-engine", "on", "--workers", "3", *options)


def test_answers_are_those_of_the_model_through_whichever_front(serve):
    """40 images, each on a connection of its own."""
    server, model = serve(), TinyModel()
    assert sorted(str(line["worker"]) for line in server.log() if line["event"] == "worker_ready") == [
        "0", "1", "2", "engine"
    ]  # fmt: skip
    for image in noise(40, seed=5):
        (result,) = server.post(encode(image)).json()["results"]
        expected = model.answer(image, (0.5, 0.5))
        found = {prediction["index"]: prediction["probability"] for prediction in result["predictions"]}
        assert result["experts_used"] == expected.experts_used
        assert found == pytest.approx({index: expected.probabilities[index] for index in found}, abs=1e-5)
    assert server.metric('ride_batch_images_sum{stage="trunk"}') == 40
    assert server.metric("ride_workers") == 3
    assert server.end() == 0


def test_images_of_all_fronts_run_together(serve):
    """24 images on 24 connections wait for a slow one; then they are one batch, or two."""
    server = serve("--timeout-s", "60", "--max-batch", "64")

    async def ask_all():
        slow = asyncio.create_task(ask(server.port, request_for(SLOW)))
        decoded = 'ride_stage_seconds_count{stage="decode"}'
        await asyncio.to_thread(wait, lambda: server.metric(decoded) == 1)
        return await asyncio.gather(slow, *[ask(server.port) for _ in range(24)])

    assert asyncio.run(ask_all()) == [200] * 25
    assert server.metric('ride_batch_images_count{stage="trunk"}') <= 3
    assert server.end() == 0


def test_an_image_that_fails_fails_alone_and_the_engine_tells_why(serve):
    """500 for NaN and for what the engine raises; the stack trace is in the log of the engine's process."""
    server = serve()
    assert server.post(encode(plain(NAN_COLOUR))).status_code == 500
    assert server.post(encode(plain(FAILING_COLOUR))).status_code == 500
    assert server.post().status_code == 200
    assert server.end() == 0
    lines = server.log_path.read_text().splitlines()
    server.log_path.write_text("")  # the stack traces belong there
    events = [json.loads(line) for line in lines if line.startswith("{")]  # not onnxruntime's own
    (failed,) = [line for line in events if line["event"] == "batch_failed"]
    assert failed["worker"] == "engine"
    assert "out of data bounds" in failed["exception"]


def test_a_client_that_is_gone_is_not_worked_for(serve):
    """Its image waits behind a slow one in the engine's process, and never runs."""
    server = serve("--max-batch", "1", "--timeout-s", "60")
    with ThreadPoolExecutor(1) as clients:
        running = clients.submit(server.post, SLOW)
        wait(lambda: server.metric('ride_stage_seconds_count{stage="decode"}') == 1)
        with server.connect() as impatient:
            impatient.sendall(request_for(IMAGE))
            wait(lambda: server.metric('ride_stage_seconds_count{stage="decode"}') == 2)
        wait(lambda: server.metric('ride_requests_total{code="499"}') == 1)
        assert running.result().status_code == 200
    assert server.post().status_code == 200
    assert server.metric('ride_batch_images_count{stage="trunk"}') == 2


def test_when_the_engine_dies_under_load_fronts_say_so_and_go_on(serve):
    """kill -9: 503 for a moment, no connection breaks, figures do not fall, and its successor answers."""
    server = serve()
    engine = server.children()[0]
    figures = []

    def answered():
        figures.append(server.answered())
        return figures[-1]

    def kill():
        wait(lambda: answered() > 100)
        os.kill(engine, signal.SIGKILL)
        wait(lambda: answered() and server.metric("ride_worker_restarts_total") == 1)
        enough = answered() + 100
        wait(lambda: answered() > enough)

    results = hammer(server.port, 16, kill)

    assert results.keys() <= {200, 503}
    assert results[503] >= 1
    assert figures == sorted(figures)
    assert httpx.get(f"{server.url}/readyz").status_code == 200
    assert server.metric("ride_ready") == 3
    assert server.end() == 0


def test_while_there_is_no_engine_the_service_is_not_ready(serve):
    """/readyz is 503 until its successor has warmed up, /healthz stays 200."""
    server = serve()
    os.kill(server.children()[0], signal.SIGKILL)
    wait(lambda: server.metric("ride_ready") == 0)
    assert httpx.get(f"{server.url}/healthz").status_code == 200
    wait(lambda: httpx.get(f"{server.url}/readyz").status_code == 200)


def test_when_a_front_dies_the_others_never_notice(serve):
    """Its jobs drop out of the engine's process, its slots are free again, its successor serves."""
    server = serve()
    engine, *fronts = server.children()
    server.client = PersistentClient(server.url)

    def kill():
        for front in fronts:
            enough = server.answered() + 60
            wait(lambda: server.answered() > enough)  # noqa: B023
            os.kill(front, signal.SIGKILL)
            wait(lambda: not alive(front))  # noqa: B023
        wait(lambda: server.metric("ride_worker_restarts_total") == 3 and server.metric("ride_ready") == 3)
        enough = server.answered() + 100
        wait(lambda: server.answered() > enough)

    results = hammer(server.port, 12, kill)

    assert results.keys() <= {200, "lost"}
    assert results["lost"] <= 3 * 12
    assert engine in server.children()
    assert server.end() == 0


def test_sigterm_under_load_loses_nobody(serve):
    """The engine outlives the fronts: every request that got a connection gets an answer, and the exit code is 0."""
    server = serve()
    pids, codes = server.children(), []

    def stop():
        wait(lambda: server.answered() > 200)
        codes.append(server.end())

    results = hammer(server.port, 32, stop)

    assert codes == [0]
    assert results.keys() <= {200, 503, "refused"}
    assert "before this image's turn came" not in server.log_path.read_text()  # 503 is for those who come later
    assert not any(map(alive, pids))


def test_overload_is_refused_at_the_door(serve):
    """Of many at once, as many are taken as there are places; the others get 429; later all is free again."""
    server = serve("--max-queue", "12", "--max-images", "4", "--max-batch", "1", "--timeout-s", "60")

    async def ask_all():
        slow = [asyncio.create_task(ask(server.port, request_for(SLOW))) for _ in range(3)]
        decoded = 'ride_stage_seconds_count{stage="decode"}'
        await asyncio.to_thread(wait, lambda: server.metric(decoded) == 3)
        others = await asyncio.gather(*[ask(server.port) for _ in range(60)])
        return await asyncio.gather(*slow), others

    slow, others = asyncio.run(ask_all())
    assert slow == [200] * 3
    assert set(others) == {200, 429}
    assert others.count(200) <= 12
    assert [server.post().status_code for _ in range(12)] == [200] * 12
    assert server.end() == 0
