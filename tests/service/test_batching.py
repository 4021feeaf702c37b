"""How images travel together, and that none of them notices."""

import asyncio
import itertools
import threading
import weakref
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.batcher import Batcher
from service.cascade import best_classes
from service.classifier import DECODING_S, Choice
from service.engine import DeviceEngine, open_engine
from service.places import BatcherStoppedError, QueueFullError
from service.schedule import Schedule
from service.uploads import Upload
from tests.service.conftest import PATIENCE_S, encode, start, until
from tests.tiny import TinyModel, noise

IMAGES = noise(24, seed=11)
FILES = [encode(image) for image in IMAGES]
MODEL = TinyModel()
SCORES = sorted({score for image in IMAGES for score in MODEL.answer(image, (0.0, 0.0)).router_scores})
TOLERANCE = 1e-5


def rows(service, stage):
    """The batch sizes in which a stage ran."""
    return [count for name, count in service.engine.runs if name == stage]


async def post_in_order(service, *requests):
    """Send requests one after another while the engine is held: each waits before the next one is sent."""
    tasks, decoded = [], service.decoded()
    for request in requests:
        tasks.append(asyncio.create_task(request))
        decoded += 1
        await until(lambda: service.decoded() == decoded)  # noqa: B023
    return tasks


async def held_request(service):
    """A request whose batch is at the gate."""
    task = asyncio.create_task(service.post(FILES[0]))
    await until(lambda: service.engine.held)
    return task


@pytest.mark.anyio
async def test_whatever_waits_when_the_engine_falls_idle_is_the_next_batch(service):
    """Five single images that came while a batch ran go together."""
    with service.engine.hold():
        first = await held_request(service)
        others = await post_in_order(service, *[service.post(file) for file in FILES[:5]])
    for task in (first, *others):
        assert (await task).status_code == 200

    assert rows(service, "trunk") == [1, 5]


@pytest.mark.anyio
async def test_a_batch_is_never_larger_than_the_limit(tiny_bundle):
    """The rest goes next, in the order in which it came."""
    async with start(tiny_bundle, max_batch=4) as service:
        with service.engine.hold():
            first = await held_request(service)
            others = await post_in_order(service, *[service.post(file) for file in FILES[:10]])
        for task in (first, *others):
            assert (await task).status_code == 200

        assert rows(service, "trunk") == [1, 4, 4, 2]


@pytest.mark.anyio
async def test_a_lone_request_does_not_wait_for_company(service):
    """Its batch begins with nobody else there, and requests one by one are batches of one."""
    with service.engine.hold():
        lone = await held_request(service)
        assert service.metric("queue_images") == 0
    await lone
    for file in FILES[:4]:
        await service.post(file)

    assert rows(service, "trunk") == [1] * 5


@pytest.mark.anyio
async def test_finished_images_leave_the_batch_before_the_next_expert(service):
    """Each expert and router sees exactly the images that the reference sends there."""
    await service.answer(*IMAGES)

    used = [MODEL.answer(image, (0.5, 0.5)).experts_used for image in IMAGES]
    reach_second, reach_third = sum(count >= 2 for count in used), sum(count >= 3 for count in used)
    assert len(used) > reach_second > reach_third > 0
    totals = {stage: sum(rows(service, stage)) for stage, _ in service.engine.runs}
    assert totals == {
        "trunk": 24, "expert_0": 24, "router_0": 24, "expert_1": reach_second, "router_1": reach_second,
        "expert_2": reach_third,
    }  # fmt: skip


@pytest.mark.anyio
async def test_experts_that_nobody_needs_do_not_run(service):
    """Not even with an empty batch; and where everyone goes on, everyone does."""
    await service.answer(*IMAGES, threshold=1)
    assert {stage for stage, _ in service.engine.runs} == {"trunk", "expert_0", "router_0"}

    service.engine.runs.clear()
    with service.engine.hold():
        first = await held_request(service)
        others = await post_in_order(service, *[service.post(file, threshold=0) for file in FILES[:6]])
    await asyncio.gather(first, *others)
    assert (rows(service, "trunk")[1], rows(service, "expert_2")[-1]) == (6, 6)


@pytest.mark.anyio
@pytest.mark.parametrize(("thresholds", "reach"), [(None, [1, 0.3, 0.3]), ("0.3", [1, 1, 1])])
async def test_as_many_images_are_expected_at_an_expert_as_calibration_found(
    tiny_bundle, monkeypatch, thresholds, reach
):
    """By which batches wait for each other or not; all of them, at thresholds that it did not measure."""
    expected = []

    class Noting(Schedule):
        def __init__(self, *arguments, **options):
            expected.append(options["reach"])
            super().__init__(*arguments, **options)

    monkeypatch.setattr("service.classifier.Schedule", Noting)
    async with start(tiny_bundle, thresholds=thresholds):
        assert expected == [pytest.approx(reach)]


@pytest.mark.anyio
async def test_answers_stay_with_their_requests(service):
    """Requests of different sizes and wishes, all at once: everyone gets the classes of their own images."""
    requests = [(row, row % 5 + 1, row % 3 + 1, row % 4 / 4, row % 7 + 1) for row in range(16)]
    answers = await asyncio.gather(
        *[service.answer(*IMAGES[first : first + count], max_experts=limit, threshold=threshold, top_k=top_k)
          for first, count, limit, threshold, top_k in requests]
    )  # fmt: skip

    for (first, count, limit, threshold, top_k), results in zip(requests, answers, strict=True):
        assert {len(result["predictions"]) for result in results} == {top_k}
        expected = [MODEL.answer(image, (threshold,) * 2, limit) for image in IMAGES[first : first + count]]
        assert [result["predictions"][0]["index"] for result in results] == [
            int(one.probabilities.argmax()) for one in expected
        ]
        assert [result["experts_used"] for result in results] == [one.experts_used for one in expected]


def open_device_engine(bundle, variant, *, provider, threads):
    """What runs on a GPU, on the CPU."""
    return DeviceEngine(bundle, "fp32", provider="cpu", threads=threads)


REQUESTS = st.tuples(
    st.lists(st.integers(0, len(IMAGES) - 1), min_size=1, max_size=5),
    st.one_of(st.none(), st.floats(0, 1), st.sampled_from([0.0, 1.0, *SCORES])),
    st.one_of(st.none(), st.integers(1, 3)),
)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    opened=st.sampled_from([open_engine, open_device_engine]),
    thread=st.sampled_from(["on", "off"]),
    merge=st.sampled_from(["on", "off"]),
    max_batch=st.integers(1, 9),
    waves=st.lists(st.tuples(st.booleans(), st.lists(REQUESTS, min_size=1, max_size=6)), min_size=1, max_size=3),
)
def test_an_answer_does_not_depend_on_its_company(tiny_bundle, opened, thread, merge, max_batch, waves):
    """
    Any interleaving, batch split, thresholds and limits, with steps in a thread or not, with features in numpy arrays
    or, as on a GPU, bound to a device and filled up: that of the image alone.

    Probabilities to 1e-5; the number of experts exactly, unless a router's score is within 1e-5 of its threshold.
    """

    async def serve():
        answers = []
        options = {"max_batch": max_batch, "engine_thread": thread, "merge": merge}
        async with start(tiny_bundle, opened=opened, **options) as service:
            for held, requests in waves:
                hold = held and thread == "on"  # the event loop cannot be held: nobody would let it go
                wishes = [
                    {"top_k": 7}
                    | ({} if threshold is None else {"threshold": threshold})
                    | ({} if limit is None else {"max_experts": limit})
                    for _, threshold, limit in requests
                ]
                with service.engine.hold() if hold else nullcontext():
                    tasks = [
                        asyncio.create_task(service.answer(*IMAGES[indices], **wish))
                        for (indices, _, _), wish in zip(requests, wishes, strict=True)
                    ]
                    if hold:
                        await until(lambda: service.engine.held)
                answers += await asyncio.gather(*tasks)
        return answers

    asked = [request for _, requests in waves for request in requests]
    for (indices, threshold, limit), results in zip(asked, asyncio.run(serve()), strict=True):
        for index, result in zip(indices, results, strict=True):
            assert any(
                agrees(result, IMAGES[index], near, limit) for near in nearby(0.5 if threshold is None else threshold)
            )


def nearby(threshold):
    """The threshold for both routers, each as it is or moved by the tolerance."""
    return itertools.product((threshold, threshold - TOLERANCE, threshold + TOLERANCE), repeat=2)


def agrees(result, image, thresholds, limit):
    """Whether a result is what the reference says of the image."""
    expected = MODEL.answer(image, thresholds, limit)
    found = np.zeros(len(expected.probabilities))
    for prediction in result["predictions"]:
        found[prediction["index"]] = prediction["probability"]
    return (
        result["experts_used"] == expected.experts_used
        and result["exit_reason"] == expected.exit_reason
        and np.allclose(result["router_scores"], expected.router_scores, rtol=0, atol=TOLERANCE)
        and np.allclose(found, expected.probabilities, rtol=0, atol=TOLERANCE)
    )


@given(
    probabilities=st.lists(
        st.lists(st.sampled_from([0.0, 0.1, 0.2, 0.3]), min_size=20, max_size=20), min_size=1, max_size=5
    ),
    count=st.integers(1, 20),
)
def test_the_best_classes_are_those_of_a_stable_sort(probabilities, count):
    """Most probable first, the lower index first among equals, few or many of them."""
    found = best_classes(np.array(probabilities), count)

    for row, classes in zip(probabilities, found.tolist(), strict=True):
        assert classes == sorted(range(20), key=lambda index: (-row[index], index))[:count]


class Connection:
    """A client as ASGI shows it: sends what it has, then hangs up when told."""

    def __init__(self, *pieces, complete=True):
        self.hang_up = asyncio.Event()
        self.sent = []
        self._messages = [
            {"type": "http.request", "body": piece, "more_body": not complete or number < len(pieces)}
            for number, piece in enumerate(pieces, 1)
        ]

    async def receive(self):
        if self._messages:
            return self._messages.pop(0)
        await self.hang_up.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        self.sent.append(message)

    def post(self, service, query=b"", headers=()):
        """POST /classify in a task of its own."""
        scope = {
            "type": "http", "http_version": "1.1", "method": "POST", "path": "/classify", "raw_path": b"/classify",
            "query_string": query, "headers": list(headers), "root_path": "", "scheme": "http",
            "server": ("service", 80), "client": ("127.0.0.1", 1), "asgi": {"version": "3.0"},
        }  # fmt: skip
        return asyncio.create_task(service.app(scope, self.receive, self.send))


@pytest.mark.anyio
async def test_a_client_that_hangs_up_costs_no_later_batch(service):
    """Its image leaves the queue; those beside it are answered; it is counted as 499."""
    with service.engine.hold():
        first = await held_request(service)
        client = Connection(FILES[1])
        gone = client.post(service)
        await until(lambda: service.decoded() == 2)
        (other,) = await post_in_order(service, service.post(FILES[2]))
        client.hang_up.set()
        await gone
    assert [(await task).status_code for task in (first, other)] == [200, 200]

    assert rows(service, "trunk") == [1, 1]
    assert client.sent == []
    assert service.metric("requests_total", code="499") == 1
    assert sum(service.metric("images_total", experts=str(used)) for used in (1, 2, 3)) == 2
    assert service.metric("queue_images") == 0


@pytest.mark.anyio
async def test_a_client_that_hangs_up_during_its_upload_leaves_nothing_behind(service):
    """Neither memory nor a place in the queue."""
    client = Connection(FILES[0][:20], complete=False)
    task = client.post(service)
    await until(lambda: service.classifier.upload_memory.held == 20)
    client.hang_up.set()
    await task

    assert (client.sent, service.engine.runs) == ([], [])
    assert service.classifier.upload_memory.held == service.metric("queue_images") == 0
    assert service.metric("requests_total", code="499") == 1


@pytest.mark.anyio
async def test_a_refused_client_that_hangs_up_while_still_sending_is_no_failure(service):
    """It is counted with its refusal."""
    client = Connection(b"half of a", complete=False)
    client.hang_up.set()
    await client.post(service, query=b"top_k=0")

    assert service.metric("requests_total", code="422") == 1
    assert service.metric("refused_total", reason="parameter_invalid") == 1


@pytest.mark.anyio
async def test_a_refused_client_that_neither_sends_on_nor_hangs_up_is_answered_and_cut_off(service, monkeypatch):
    """Answered and counted first; the connection stays open for a while, or its end might take the answer along."""
    monkeypatch.setattr("service.routes.LINGER_S", 1)
    client = Connection(b"half of a", complete=False)
    task = client.post(service, query=b"top_k=0")
    await until(lambda: len(client.sent) == 2)
    assert client.sent[0]["status"] == 422
    assert (b"connection", b"close") in client.sent[0]["headers"]
    assert service.metric("requests_total", code="422") == 1
    assert not task.done()

    async with asyncio.timeout(PATIENCE_S):
        await task
    assert [message.get("more_body") for message in client.sent[1:]] == [True, None]


@pytest.mark.anyio
async def test_a_client_that_was_given_leave_to_send_gets_to_read_its_refusal(tiny_bundle):
    """It is sending when it is refused: that much more is read, as from any other."""
    async with start(tiny_bundle, max_bytes=1000) as service:
        client = Connection(*[bytes(600)] * 5)
        await client.post(service, headers=[(b"expect", b"100-continue")])

        assert client.sent[0]["status"] == 413
        client.hang_up.set()
        assert await client.receive() == {"type": "http.disconnect"}  # nothing is left


@pytest.mark.anyio
async def test_a_refused_client_that_sends_without_end_is_not_read_without_end(tiny_bundle):
    """Twice the largest body before the answer, as much behind it, and each time the piece that exceeds that."""
    async with start(tiny_bundle, max_bytes=1000) as service:
        client = Connection(*[bytes(600)] * 11, complete=False)
        await client.post(service)

        assert client.sent[0]["status"] == 413
        client.hang_up.set()
        left = [(await client.receive())["type"] for _ in range(2)]
        assert left == ["http.request", "http.disconnect"]


@pytest.mark.anyio
@pytest.mark.parametrize("expectation", [b"100-continue", b"100-Continue"])
async def test_a_refused_client_that_waits_for_leave_to_send_is_answered_at_once(service, expectation):
    """Expect: 100-continue. Nothing is read: reading would invite the upload."""
    client = Connection(FILES[0])
    headers = [(b"expect", expectation), (b"content-length", b"99999999999")]
    await client.post(service, headers=headers)

    start_message, *_ = client.sent
    assert start_message["status"] == 413
    assert (b"connection", b"close") in start_message["headers"]
    assert await client.receive() == {"type": "http.request", "body": FILES[0], "more_body": False}


@pytest.mark.anyio
async def test_hang_ups_at_any_moment_leave_all_places_free(tiny_bundle):
    """After a hundred clients left at different moments, a request for every place is let in."""
    async with start(tiny_bundle, max_queue=40, max_images=40, max_batch=4) as service:
        for turns in range(100):
            body = b"".join(
                b'--b\r\nContent-Disposition: form-data; name="f"; filename="x"\r\n\r\n' + file + b"\r\n"
                for file in FILES[: turns % 4 + 1]
            )
            client = Connection(body + b"--b--\r\n")
            task = client.post(service, headers=[(b"content-type", b"multipart/form-data; boundary=b")])
            for _ in range(turns // 4):
                await asyncio.sleep(0)
            client.hang_up.set()
            await task
        await until(lambda: service.metric("queue_images") == 0)

        assert (await service.post(*[FILES[0]] * 40)).status_code == 200


class Echo:
    """Work that takes one item a step, and gives it back."""

    busy = False

    def __init__(self):
        self.running, self.leave = threading.Event(), threading.Event()

    def wants(self, waiting):
        return min(waiting, 1)

    def step(self, items):
        self.running.set()
        self.leave.wait()
        return [(item, item) for item in items]


@pytest.mark.anyio
async def test_what_waits_when_the_batcher_ends_is_told_so():
    """Nothing waits for ever; who has given up need not be told."""
    work, batcher = Echo(), Batcher(max_queue=3)
    batcher.start(work, threaded=True)
    batcher.reserve(3)
    first, second = batcher.submit("first"), batcher.submit("second")
    batcher.submit("given up").cancel()
    await until(work.running.is_set)
    end = asyncio.create_task(batcher.stop())
    await asyncio.sleep(0)
    work.leave.set()
    await end
    await until(lambda: not any(thread.name.startswith("ride-engine") for thread in threading.enumerate()))

    assert await first == "first"
    with pytest.raises(BatcherStoppedError):
        await second


@pytest.mark.anyio
async def test_where_there_is_no_thread_for_the_steps_it_does_not_start(monkeypatch):
    """It would seem ready, and answer nobody."""

    def refuse(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)

    with pytest.raises(RuntimeError, match="thread"):
        Batcher(max_queue=1).start(Echo(), threaded=True)


@pytest.mark.anyio
async def test_work_that_was_begun_is_not_gone_on_with_after_the_end():
    """Its step may be due already."""

    class Endless(Echo):
        busy, steps = True, 0

        def step(self, items):
            self.steps += 1
            return []

    work, batcher = Endless(), Batcher(max_queue=1)
    batcher.start(work, threaded=False)
    batcher.reserve(1)
    batcher.submit("begun").add_done_callback(lambda future: future.exception())
    await until(lambda: work.steps)
    await batcher.stop()
    begun = work.steps
    for _ in range(3):
        await asyncio.sleep(0)

    assert work.steps == begun


@pytest.mark.anyio
@pytest.mark.parametrize("threaded", [True, False])
async def test_work_that_fails_does_not_end_the_batcher(threaded):
    """Who was in the step is told; who comes next is served."""

    class Fragile(Echo):
        def step(self, items):
            if items == ["broken"]:
                raise ArithmeticError("broken")
            return [(item, item) for item in items]

    batcher = Batcher(max_queue=2)
    batcher.start(Fragile(), threaded=threaded)
    batcher.reserve(2)
    broken, whole = batcher.submit("broken"), batcher.submit("whole")
    with pytest.raises(ArithmeticError, match="broken"):
        await broken

    assert await whole == "whole"
    await batcher.stop()


def test_places_are_taken_all_at_once_or_not_at_all():
    """And come back when they are released."""
    batcher = Batcher(max_queue=3)
    batcher.reserve(2)
    with pytest.raises(QueueFullError) as refusal:
        batcher.reserve(2)
    assert (refusal.value.waiting, refusal.value.saved) == (2, 0)
    batcher.check()
    batcher.release(2)
    batcher.reserve(3)
    assert batcher.waiting == 3
    with pytest.raises(QueueFullError):
        batcher.check()


def test_kept_places_are_for_whoever_asks_for_as_many():
    """Also while others wait, and beside those who find room without them; then they are kept no more."""
    batcher = Batcher(max_queue=10)
    batcher.reserve(8)
    with pytest.raises(QueueFullError):
        batcher.reserve(4)
    batcher.release(3)
    batcher.reserve(1)
    for _ in range(2):  # whoever is refused meanwhile does not take the large request's place
        with pytest.raises(QueueFullError) as refusal:
            batcher.reserve(1)
        assert (refusal.value.waiting, refusal.value.saved) == (6, 4)
    batcher.reserve(4)
    batcher.release(1)
    batcher.reserve(1)


def test_places_are_kept_for_a_while_only(monkeypatch):
    """Until a second after the large request was told to come again: it may stay away."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr("service.places.time", SimpleNamespace(monotonic=lambda: clock.now))
    batcher = Batcher(max_queue=8)
    batcher.reserve(6)
    with pytest.raises(QueueFullError) as refusal:
        batcher.reserve(4)
    assert refusal.value.retry_after == 1
    clock.now += 1.9
    with pytest.raises(QueueFullError):
        batcher.reserve(1)
    clock.now += 0.2
    batcher.reserve(1)


@pytest.mark.anyio
async def test_retry_after_is_the_time_that_the_waiting_will_take(monkeypatch):
    """
    Their number times the seconds of one, which approach those seen by a fifth each time; whole ones, 30 at most.

    Those of all steps count, also of one after which nothing is finished.
    """
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("service.batcher.time", SimpleNamespace(monotonic=lambda: 0.0, perf_counter=lambda: clock.now))

    class TwoInTwoSteps(Echo):
        begun = ()

        @property
        def busy(self):
            return bool(self.begun)

        def wants(self, waiting):
            return 0 if self.begun else min(waiting, 2)

        def step(self, items):
            clock.now += 5
            self.begun, finished = items, self.begun
            return [(item, item) for item in finished]

    batcher = Batcher(max_queue=40)
    batcher.start(TwoInTwoSteps(), threaded=False)
    for _ in range(2):  # 5 s each: 0, 1, 1.8
        batcher.reserve(2)
        await asyncio.gather(batcher.submit("first"), batcher.submit("second"))

    for waiting, retry_after in ((4, 8), (35, 30)):  # 7.2
        batcher.reserve(waiting)
        with pytest.raises(QueueFullError) as refusal:
            batcher.reserve(40)
        assert refusal.value.retry_after == retry_after


@pytest.mark.anyio
async def test_whoever_would_wait_for_half_of_the_time_limit_is_refused(service, monkeypatch):
    """Queued into a timeout, the image would be worked on for nobody, and in its place no other for anybody."""
    clock = SimpleNamespace(now=0.0)
    now = SimpleNamespace(perf_counter=lambda: clock.now, monotonic=lambda: clock.now)
    monkeypatch.setattr("service.batcher.time", now)
    with service.engine.hold():
        slow = await held_request(service)
        clock.now = 30.0  # of which a fifth enters
    assert (await slow).status_code == 200
    with service.engine.hold():
        first = await held_request(service)
        (second,) = await post_in_order(service, service.post(FILES[1]))
        third = await service.post(FILES[2])

    assert third.status_code == 429
    assert third.headers["retry-after"] == "1"
    assert "1 images are waiting, about 6.0 s, the limit is 5 s (half of RIDE_TIMEOUT_S)" in third.text
    assert [(await request).status_code for request in (first, second)] == [200, 200]


@pytest.mark.anyio
async def test_nothing_is_kept_of_an_item_that_was_given_up():
    """Else every client that hangs up would leave its image in memory."""
    work, batcher = Echo(), Batcher(max_queue=2)
    work.leave.set()
    batcher.start(work, threaded=False)
    batcher.reserve(2)
    item = Echo()
    left = weakref.ref(item)
    batcher.submit(item).cancel()
    del item
    await batcher.submit("last")

    assert left() is None


@pytest.mark.anyio
async def test_many_images_of_a_request_are_not_decoded_in_one_go(service, monkeypatch):
    """After a few milliseconds the event loop looks at others; but not after every image, so that batches form."""
    classifier, turn, turns = service.classifier, 0, []
    decode = classifier._decode_if_small

    def slowly(data):
        turns.append(turn)
        return decode(data)[0], 0.6 * DECODING_S

    async def count():
        nonlocal turn
        while True:
            turn += 1
            await asyncio.sleep(0)

    monkeypatch.setattr(classifier, "_decode_if_small", slowly)
    counting = asyncio.create_task(count())
    choice = Choice(classifier.operation.thresholds, 3, 0.0, 1)
    outcomes = await classifier.classify([Upload(None, FILES[0])] * 8, choice)
    counting.cancel()

    assert len(outcomes) == 8
    assert sorted(Counter(turns).values()) == [2, 2, 2, 2]
