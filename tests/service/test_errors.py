"""Every error code, reached from outside: its status, its shape, and a message that names the thing and the limit."""

import asyncio
import gc
import sys
import threading
import weakref
from contextlib import asynccontextmanager

import httpx
import numpy as np
import pytest

from service import uploads
from service.classifier import Choice
from service.engine import open_engine
from service.errors import STATUS, ServiceError
from service.images import SMALL_BYTES
from service.schemas import ErrorAnswer
from service.uploads import Upload, UploadMemory
from tests.service.conftest import WatchedEngine, encode, start, until
from tests.tiny import FAILING_COLOUR, NAN_COLOUR, noise, plain

pytestmark = pytest.mark.anyio
IMAGE = encode(noise(1)[0])
MULTIPART = {"content-type": "multipart/form-data; boundary=b"}
PART = b'--b\r\nContent-Disposition: form-data; name="f"; filename="a.png"\r\n\r\n'


def refused(response, code, *words):
    """The answer is this error, documented, and every word of the message is there."""
    assert response.status_code == STATUS[code], response.text
    answer = ErrorAnswer.model_validate_json(response.content, extra="forbid")
    assert answer.error.code == code
    assert answer.request_id == response.headers["x-request-id"]
    for word in words:
        assert word in answer.error.message
    return response


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("top_k=0", ["top_k is '0'", "from 1 to 7"]),
        ("top_k=8", ["top_k is '8'", "from 1 to 7, the model's classes"]),
        ("top_k=1.5", ["top_k is '1.5'"]),
        ("top_k=", ["top_k is ''"]),
        ("top_k=-1", ["top_k is '-1'"]),
        ("top_k=%D9%A3", ["top_k is '٣'"]),
        ("top_k=" + 5000 * "9", ["top_k is '" + 40 * "9" + "'"]),
        ("max_experts=0", ["max_experts is '0'", "from 1 to 3, the model's experts"]),
        ("max_experts=4", ["max_experts is '4'", "from 1 to 3"]),
        ("max_experts=all", ["max_experts is 'all'"]),
        ("threshold=-0.1", ["threshold is '-0.1'", "from 0 to 1"]),
        ("threshold=1.01", ["threshold is '1.01'"]),
        ("threshold=nan", ["threshold is 'nan'"]),
        ("threshold=inf", ["threshold is 'inf'"]),
        ("threshold=half", ["threshold is 'half'"]),
        ("threshold=%D9%A0.%D9%A5", ["threshold is '٠.٥'"]),
        ("threshold=0_1", ["threshold is '0_1'"]),
        ("threshold=-0", ["threshold is '-0'"]),
        ("min_confidence=+0.5", ["min_confidence is ' 0.5'", "from 0 to 1"]),
        ("treshold=0.5", ["'treshold' is no parameter", "top_k, max_experts, threshold"]),
        ("top_k=1&top_k=1", ["top_k is given twice"]),
        ("mode=quick", ["mode is 'quick'; must be one of fast, balanced, full"]),
        ("mode=fast&threshold=0.5", ["threshold and mode both choose the thresholds; give one of them"]),
        ("%FF=1", ["query is no list of"]),
        ("&".join(f"a{number}=1" for number in range(17)), ["query is no list of"]),
    ],
)
async def test_a_parameter_that_cannot_be_is_refused(service, query, words):
    """422 with its name, what it was and what may be; never ignored, never replaced by a default."""
    refused(await service.client.post(f"/classify?{query}", content=IMAGE), "parameter_invalid", *words)
    assert service.engine.runs == []


async def test_a_form_field_that_is_no_file_is_refused(service):
    """Its writer meant a parameter; dropped silently, it would be missed."""
    response = await service.client.post("/classify", files={"f": ("a.png", IMAGE)}, data={"top_k": "3"})

    refused(response, "parameter_invalid", "form field 'top_k' is no file", "?top_k=3")
    response = await service.client.post("/classify", files={"f": ("a.png", IMAGE)}, data={"x" * 300: "3"})
    refused(response, "parameter_invalid", f"form field '{255 * 'x'}' is no file")


@pytest.mark.parametrize(
    ("content", "headers", "words"),
    [
        (b"", {}, ["0 bytes"]),
        (b"", {"content-type": "image/png"}, ["0 bytes"]),
        (b"--b--\r\n", MULTIPART, ["7 bytes holds no file"]),
        (PART + IMAGE, {"content-type": "multipart/form-data"}, ["without a boundary"]),
        (PART + IMAGE, {"content-type": "multipart/form-data; boundary=" + 300 * "b"}, ["Boundary length 300"]),
        (b'--b\r\nContent-Disposition: form-data; name="f"; filename=""\r\n\r\n\r\n--b--\r\n', MULTIPART, ["no file"]),
    ],
)
async def test_a_body_without_an_image_is_refused(service, content, headers, words):
    """422, with what to send."""
    refused(await service.client.post("/classify", content=content, headers=headers), "no_image", *words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"garbage", ["is its boundary right?"]),
        (PART + IMAGE, ["ends before its closing boundary, after 0 complete files", "cut short?"]),
        (PART + IMAGE + b"\r\n" + PART + IMAGE[:9], ["after 1 complete files"]),
        (PART.replace(b"--b", b"--c") + IMAGE + b"\r\n--c--\r\n", ["is its boundary right?"]),
        (b"--b\r\n" + b"x-a: b\r\n" * 17 + b"\r\n" + IMAGE + b"\r\n--b--\r\n", ["in file 1"]),
        (b"--b\r\nx-a: " + b"b" * 5000 + b"\r\n\r\n" + IMAGE + b"\r\n--b--\r\n", ["in file 1"]),
        (b"--b\r\nno header\r\n\r\n" + IMAGE + b"\r\n--b--\r\n", ["in file 1"]),
        (b"", ["ends before its closing boundary"]),
    ],
)
async def test_a_multipart_body_that_breaks_the_rules_is_refused(service, content, words):
    """422, with how far it went."""
    refused(await service.client.post("/classify", content=content, headers=MULTIPART), "image_unreadable", *words)


async def test_a_body_above_the_limit_is_refused_by_its_declared_length(tiny_bundle):
    """413 before a byte of it is kept; exactly at the limit it is taken."""
    async with start(tiny_bundle, max_bytes=len(IMAGE)) as service:
        assert (await service.client.post("/classify", content=IMAGE)).status_code == 200
        response = await service.client.post("/classify", content=IMAGE + b"\0")

        refused(response, "request_too_large", f"{len(IMAGE) + 1:,} bytes", f"limit is {len(IMAGE):,} (RIDE_MAX_BYTES)")
        assert service.classifier.upload_memory.held == 0


async def test_a_body_above_the_limit_is_refused_while_it_arrives(tiny_bundle):
    """Without a declared length, or with one that lies; no more than the limit is ever held."""
    held = []
    async with start(tiny_bundle, max_bytes=1000) as service:

        async def endless():
            while True:
                held.append(service.classifier.upload_memory.held)
                yield b"\0" * 300

        for headers in ({}, {"content-length": "500"}):
            response = await service.client.post("/classify", content=endless(), headers=headers)
            refused(response, "request_too_large", "1,200 bytes or more, the limit is 1,000")
            assert response.headers["connection"] == "close"
    assert max(held) <= 1000


async def test_too_many_images_are_refused_as_they_arrive(tiny_bundle):
    """413 with the limit; exactly at the limit they are taken."""
    async with start(tiny_bundle, max_images=3) as service:
        assert (await service.post(*[IMAGE] * 3)).status_code == 200
        refused(await service.post(*[IMAGE] * 4), "too_many_images", "more than 3 images", "RIDE_MAX_IMAGES")


async def test_an_image_of_too_many_pixels_is_refused(tiny_bundle):
    """413 for a small file that unpacks to a huge picture; its neighbours are answered."""
    bomb = encode(noise(1)[0].repeat(100, axis=0).repeat(100, axis=1))
    async with start(tiny_bundle, max_pixels=600_000) as service:
        refused(await service.post(bomb), "image_too_large", "PNG of 800x800 has 640,000 pixels", "RIDE_MAX_PIXELS")
        both = (await service.post(bomb, IMAGE)).json()["results"]
    assert both[0]["error"]["code"] == "image_too_large"
    assert both[1]["experts_used"] >= 1


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"no image", "image_unsupported"),
        (IMAGE[:50], "image_unreadable"),
        (encode(noise(1)[0], "JPEG")[:-300], "image_unreadable"),
    ],
)
async def test_a_file_that_cannot_be_decoded_is_refused(service, content, code):
    """415 for another kind of file, 422 for a damaged one, as a raw body and as a file."""
    refused(await service.client.post("/classify", content=content), code)
    refused(await service.post(content), code)


async def test_parts_without_content_are_limited_too(tiny_bundle):
    """Each costs time of the event loop; as many as a form has inputs that were left empty are let pass."""
    empty = b"--b\r\nContent-Type: image/png\r\n\r\n\r\n"
    async with start(tiny_bundle, max_images=3) as service:
        for count, code, words in (
            (19, "no_image", "holds no file"),
            (20, "too_many_images", "more than 19 files in one request, empty ones included; the limit is 3 images"),
        ):
            response = await service.client.post("/classify", content=count * empty + b"--b--\r\n", headers=MULTIPART)
            refused(response, code, words)


@pytest.mark.parametrize(
    ("content", "headers"),
    [
        (PART + IMAGE + b"\r\n--b--\r\n", MULTIPART),
        (PART + IMAGE, MULTIPART),
        (PART + bytes(5000), MULTIPART),
        (IMAGE, {}),
        (bytes(5000), {}),
    ],
    ids=["form", "form cut short", "form too large", "image", "image too large"],
)
async def test_a_body_is_let_go_with_its_answer(tiny_bundle, monkeypatch, content, headers):
    """Not only when the garbage collector comes by: until then it would be held beyond the limit."""
    readers = []
    for reader in (uploads._Multipart, uploads._Raw):

        def note(self, *arguments, _begin=reader.__init__):
            readers.append(weakref.ref(self))
            _begin(self, *arguments)

        monkeypatch.setattr(reader, "__init__", note)

    async def pieces():
        yield content

    async with start(tiny_bundle, max_bytes=4000) as service:
        gc.disable()
        try:
            await service.client.post("/classify", content=pieces(), headers=headers)
            assert [reader() for reader in readers] == [None]
        finally:
            gc.enable()


async def test_an_image_whose_time_is_over_is_let_go_with_the_answer(tiny_bundle):
    """The same of one that was queued; only the engine keeps its batch until it is through."""
    async with start(tiny_bundle, timeout_s=0.05) as service:
        gc.collect()
        gc.disable()
        try:
            with service.engine.hold():
                refused(await service.client.post("/classify", content=IMAGE), "timeout")
                await until(lambda: not [found for found in gc.get_objects() if isinstance(found, Upload)])
        finally:
            gc.enable()


async def test_an_image_given_up_while_it_waits_for_a_decoding_thread_is_let_go(service, monkeypatch):
    """The executor keeps what waits in its queue until a thread has time to see that it was cancelled."""
    classifier, leave, begun = service.classifier, threading.Event(), threading.Event()

    def slowly(data):
        begun.set()
        leave.wait()
        return np.zeros((8, 8, 3), np.uint8), 0.0

    monkeypatch.setattr(classifier, "_decode", slowly)
    choice = Choice(classifier.operation.thresholds, 1, 0.0, 1)
    large, waiting = bytes(SMALL_BYTES + 1), bytes(SMALL_BYTES + 2)
    references = sys.getrefcount(waiting)
    first, second = (
        asyncio.create_task(classifier.classify([Upload(None, data)], choice)) for data in (large, waiting)
    )
    await until(begun.is_set)
    assert sys.getrefcount(waiting) > references
    second.cancel()
    await asyncio.wait([second])
    del second
    try:
        assert sys.getrefcount(waiting) == references
    finally:
        leave.set()
    await first


async def test_an_empty_file_says_so(service):
    """As one file of a form."""
    refused(await service.post(b""), "image_unreadable", "file is empty (0 bytes)")


async def test_a_full_queue_refuses_at_once_with_429(tiny_bundle):
    """With Retry-After in whole seconds; the queued are answered, and then there is room again."""
    async with start(tiny_bundle, max_queue=4, max_images=4, max_batch=2) as service:
        with service.engine.hold():
            running = asyncio.create_task(service.post(IMAGE))
            await until(lambda: service.engine.held)
            waiting = asyncio.create_task(service.post(*[IMAGE] * 4))
            await until(lambda: service.metric("queue_images") == 4)

            response = await service.post(IMAGE)
            refused(response, "overloaded", "4 images are waiting", "the limit is 4 (RIDE_MAX_QUEUE); retry in 1 s")
            assert 1 <= int(response.headers["retry-after"]) <= 30
        assert [(await task).status_code for task in (running, waiting)] == [200, 200]
        assert (await service.post(*[IMAGE] * 4)).status_code == 200


@asynccontextmanager
async def refused_large_request(service):
    """In the block a request for 4 images has just been refused, as one runs and so many wait that 3 could come."""
    with service.engine.hold():
        running = asyncio.create_task(service.post(IMAGE))
        await until(lambda: service.engine.held)
        taken = service.classifier.settings.max_queue - 3
        waiting = [asyncio.create_task(service.post(IMAGE)) for _ in range(taken)]
        await until(lambda: service.metric("queue_images") == taken)
        refused(await service.post(*[IMAGE] * 4), "overloaded", "this request has 4")
        yield
    assert {(await task).status_code for task in (running, *waiting)} == {200}


async def test_a_large_request_is_not_starved_by_small_ones(tiny_bundle):
    """Once refused for want of places, those that come free are kept for it; it gets them when it comes again."""
    async with start(tiny_bundle, max_queue=8, max_images=4, max_batch=1) as service:
        async with refused_large_request(service):
            refused(await service.post(IMAGE), "overloaded", "4 places are kept for an earlier request", "has 1")
        assert (await service.post(*[IMAGE] * 4)).status_code == 200
        assert (await service.post(IMAGE)).status_code == 200


async def test_small_requests_are_not_shut_out_by_a_large_one(tiny_bundle):
    """However large it is, half of the places are never kept for it."""
    async with start(tiny_bundle, max_queue=4, max_images=4, max_batch=1) as service:
        async with refused_large_request(service):
            small = asyncio.create_task(service.post(IMAGE))
            await until(lambda: service.metric("queue_images") == 2)
            refused(await service.post(IMAGE), "overloaded", "2 places are kept for an earlier request", "has 1")
        assert (await small).status_code == 200


async def test_places_are_not_kept_while_nobody_waits(tiny_bundle):
    """Small requests are answered until the large one comes again; it finds room then, too."""
    async with start(tiny_bundle, max_queue=4, max_images=4, max_batch=4) as service:
        async with refused_large_request(service):
            pass
        assert [(await service.post(IMAGE)).status_code for _ in range(3)] == [200] * 3
        assert (await service.post(*[IMAGE] * 4)).status_code == 200


async def test_a_request_cancelled_at_once_gives_all_its_places_back(service):
    """Before any of its images has begun, and a turn of the loop later."""
    uploads, classifier = [Upload(None, IMAGE)] * 8, service.classifier
    choice = Choice(classifier.operation.thresholds, 3, 0.0, 1)
    for turns in (1, 2, 3):
        task = asyncio.create_task(classifier.classify(uploads, choice))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: service.metric("queue_images") == 0)


async def test_uploads_that_fill_the_memory_are_refused(tiny_bundle):
    """429 once the bodies of all requests together reach their limit; what was held is given back."""
    async with start(tiny_bundle, max_bytes=1000, max_inflight_bytes=1500) as service:
        arrived, go_on = asyncio.Event(), asyncio.Event()

        async def slow():
            yield b"\0" * 1000
            arrived.set()
            await go_on.wait()

        first = asyncio.create_task(service.client.post("/classify", content=slow()))
        await arrived.wait()
        response = await service.client.post("/classify", content=b"\0" * 501)
        refused(response, "overloaded", "1,000 bytes are held, the limit is 1,500 (RIDE_MAX_INFLIGHT_BYTES)")
        assert response.headers["retry-after"] == "1"
        go_on.set()
        assert (await first).status_code == 415
        assert service.classifier.upload_memory.held == 0


def test_upload_memory_is_taken_to_its_last_byte_and_given_back_once():
    """However often a lease is released."""
    memory = UploadMemory(10)
    first, second = memory.lease(), memory.lease()
    first.grow(4)
    second.grow(6)
    with pytest.raises(ServiceError, match="10 bytes are held, the limit is 10"):
        first.grow(1)
    for _ in range(2):
        first.release()
    assert memory.held == 6


async def test_what_is_served_is_not_said_before_it_is_known(tiny_bundle):
    """The engine chooses the precision when it opens."""
    go_on = threading.Event()

    def open_late(*arguments, **options):
        go_on.wait()
        return open_engine(*arguments, **options)

    async with start(tiny_bundle, ready=False, opened=open_late) as service:
        refused(await service.client.get("/model"), "not_ready")
        go_on.set()
        await until(lambda: service.classifier.state == "ready")
        assert (await service.client.get("/model")).json()["provider"] == "cpu"


async def test_before_the_warm_up_ends_work_is_refused_with_503(tiny_bundle):
    """/readyz says so too; /healthz, /model and /metrics answer already."""
    gates = []

    def open_held(*arguments, **options):
        engine = WatchedEngine(open_engine(*arguments, **options))
        gates.append(engine.hold())
        gates[-1].__enter__()
        return engine

    async with start(tiny_bundle, ready=False, opened=open_held) as service:
        await until(lambda: gates)
        response = refused(await service.post(IMAGE), "not_ready", "retry in 1 s")
        assert response.headers["retry-after"] == "1"
        refused(await service.client.get("/readyz"), "not_ready")
        assert service.metric("ready") == 0
        for path in ("/healthz", "/model", "/metrics"):
            assert (await service.client.get(path)).status_code == 200

        gates[0].__exit__(None, None, None)
        await until(lambda: service.classifier.state == "ready")
        assert (await service.client.get("/readyz")).json() == {"status": "ready"}
        assert (await service.post(IMAGE)).status_code == 200
        assert service.metric("ready") == 1


async def test_while_it_drains_accepted_work_is_answered_and_new_work_refused(tiny_bundle):
    """503 with Retry-After and Connection: close; drain() ends when the last accepted request is answered."""
    async with start(tiny_bundle) as service:
        with service.engine.hold():
            accepted = asyncio.create_task(service.post(IMAGE))
            await until(lambda: service.engine.held)
            drain = asyncio.create_task(service.classifier.drain(60))
            await until(lambda: service.classifier.state == "draining")

            response = refused(await service.post(IMAGE), "shutting_down", "another instance")
            assert (response.headers["retry-after"], response.headers["connection"]) == ("1", "close")
            assert refused(await service.client.get("/readyz"), "shutting_down").headers["retry-after"] == "1"
            assert (await service.client.get("/healthz")).status_code == 200
            assert service.metric("ready") == 0
            assert not drain.done()
        assert (await accepted).status_code == 200
        assert (await accepted).headers["connection"] == "close"
        assert await drain


async def test_work_that_does_not_end_in_time_is_given_up_when_draining(tiny_bundle):
    """drain() then says that something was lost."""
    async with start(tiny_bundle) as service:
        with service.engine.hold():
            accepted = asyncio.create_task(service.post(IMAGE))
            await until(lambda: service.engine.held)
            assert not await service.classifier.drain(0.01)
        await accepted


async def test_an_engine_that_does_not_answer_in_time_gives_504(tiny_bundle):
    """With the setting's name; the image that has not begun never begins."""
    async with start(tiny_bundle, timeout_s=0.05) as service:
        with service.engine.hold():
            running = asyncio.create_task(service.post(IMAGE))
            await until(lambda: service.engine.held)
            refused(await service.post(IMAGE), "timeout", "not answered within 0.05 s (RIDE_TIMEOUT_S)")
            refused(await running, "timeout")
        await until(lambda: not service.engine.held and service.engine.runs)
        await until(lambda: service.metric("queue_images") == 0)
    assert [run for run in service.engine.runs if run[0] == "trunk"] == [("trunk", 1)]


async def test_an_upload_that_does_not_end_in_time_gives_504(tiny_bundle):
    """The upload counts, and what was held of it is given back."""
    async with start(tiny_bundle, timeout_s=0.05) as service:

        async def stuck():
            yield IMAGE[:10]
            await asyncio.Event().wait()

        refused(await service.client.post("/classify", content=stuck()), "timeout", "not received within 0.05 s")
        assert service.classifier.upload_memory.held == 0


async def test_a_batch_that_fails_is_a_500_and_the_next_one_runs(service, caplog):
    """The client gets a request id, not a stack trace; the log has both."""
    response = refused(await service.post(encode(plain(FAILING_COLOUR))), "internal")

    assert f"request id {response.headers['x-request-id']}" in response.json()["error"]["message"]
    assert "Traceback" not in response.text
    (record,) = [record for record in caplog.records if record.message == "failed"]
    assert record.fields["request_id"] == response.headers["x-request-id"]
    assert record.exc_info is not None
    assert (await service.post(IMAGE)).status_code == 200


async def test_a_failing_batch_is_the_fate_of_those_in_it_and_of_nobody_else(tiny_bundle):
    """Two requests share a failing batch; one before and one after are answered."""
    async with start(tiny_bundle, max_batch=2) as service:
        with service.engine.hold():
            tasks = []
            for images in (IMAGE, IMAGE, encode(plain(FAILING_COLOUR)), IMAGE):
                tasks.append(asyncio.create_task(service.post(images)))
                await until(lambda: service.engine.held and service.decoded() == len(tasks))
        statuses = [(await task).status_code for task in tasks]
    # The first ran alone; then two by two.
    assert statuses == [200, 500, 500, 200] or statuses == [200, 200, 500, 500]


async def test_nan_is_a_500_for_its_image_and_for_no_other(service):
    """Also within one batch: the neighbours' numbers are as good as ever."""
    with service.engine.hold():
        first = asyncio.create_task(service.post(IMAGE))
        await until(lambda: service.engine.held)
        bad = asyncio.create_task(service.post(encode(plain(NAN_COLOUR))))
        good = asyncio.create_task(service.post(IMAGE))
        await until(lambda: service.decoded() == 3)

    refused(await bad, "internal")
    assert (await good).json()["results"][0]["predictions"] == (await first).json()["results"][0]["predictions"]
    assert ("trunk", 2) in service.engine.runs


async def test_nan_spoils_no_other_image_of_its_request(service, caplog):
    """It gets an error of its own beside the others' answers, and a line in the log that is no mere refusal's."""
    files = [("file", ("good.png", IMAGE)), ("file", ("bad.png", encode(plain(NAN_COLOUR))))]
    answer = await service.client.post("/classify", files=files)

    good, bad = answer.json()["results"]
    assert answer.status_code == 200
    assert good["predictions"]
    assert bad["error"]["code"] == "internal"
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert (record.message, record.fields["request_id"]) == ("not_answered", answer.json()["request_id"])


@pytest.mark.parametrize(
    ("method", "path", "code", "words"),
    [
        ("GET", "/nothing", "not_found", "there is no /nothing; see /docs"),
        ("GET", f"/{300 * 'x'}", "not_found", f"there is no /{199 * 'x'}; see /docs"),
        ("GET", "/static/nothing.js", "not_found", "there is no /static/nothing.js"),
        ("POST", "/classify/", "not_found", "there is no /classify/; see /docs"),
        ("GET", "/static/../app.py", "not_found", ""),
        ("GET", "/static/%2e%2e/app.py", "not_found", ""),
        ("GET", "/classify", "method_not_allowed", "/classify takes POST, not GET"),
        ("PUT", "/classify", "method_not_allowed", "not PUT"),
        *[
            ("DELETE", path, "method_not_allowed", f"{path} takes GET, HEAD, not DELETE")
            for path in (
                "/",
                "/docs",
                "/healthz",
                "/readyz",
                "/model",
                "/metrics",
                "/static/app.js",
                "/docs/static/any.js",
            )
        ],
    ],
)
async def test_other_paths_and_methods_get_errors_of_the_same_shape(service, method, path, code, words):
    """404 and 405, with what there is."""
    response = refused(await service.client.request(method, path), code, words)
    if code == "method_not_allowed":
        assert response.headers["allow"] in response.json()["error"]["message"]


async def test_a_failure_of_any_route_is_told_as_others_are(service, monkeypatch, caplog):
    """JSON with the request's id, which the log has, too; nothing of the reason leaves."""

    def broken(_):
        raise RuntimeError("the disk is on fire")

    monkeypatch.setattr("service.app._describe", broken)
    transport = httpx.ASGITransport(service.app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        response = refused(await client.get("/model", headers={"x-request-id": "r7"}), "internal", "request id r7")

    assert "fire" not in response.text
    assert response.headers["x-content-type-options"] == "nosniff"
    (logged,) = (record for record in caplog.records if record.msg == "failed")
    assert logged.fields == {"request_id": "r7", "path": "/model"}
    assert "fire" in str(logged.exc_info[1])


async def test_a_page_is_there_for_people(service):
    """/ is the web page, its script and style load."""
    page = await service.client.get("/")

    assert page.headers["content-type"].startswith("text/html")
    for file in ("app.js", "style.css", "favicon.svg"):
        assert (await service.client.get(f"/static/{file}")).status_code == 200


@pytest.mark.parametrize("path", ["/", "/docs", "/openapi.json", "/model", "/metrics", "/healthz", "/static/app.js"])
async def test_whatever_can_be_fetched_can_be_asked_about(service, path):
    """HEAD answers as GET does, without the body."""
    response = await service.client.head(path)

    assert response.status_code == 200
    assert response.headers["content-type"] == (await service.client.get(path)).headers["content-type"]


@pytest.mark.parametrize("path", ["/", "/static/app.js"])
@pytest.mark.parametrize("wanted", ["bytes=0-9", "bytes=9-0", "pages=1"])
async def test_a_file_is_given_whole(service, path, wanted):
    """Whatever part is asked for, if it can be understood or not."""
    response = await service.client.get(path, headers={"range": wanted})

    assert response.status_code == 200
    assert response.content == (await service.client.get(path)).content


async def test_a_service_that_cannot_start_says_so_and_never_gets_ready(tiny_bundle, caplog):
    """The engine's reason is in the log; /readyz stays 503."""

    def broken(*_, **__):
        raise RuntimeError("the device is on fire")

    async with start(tiny_bundle, ready=False, opened=broken) as service:
        await until(lambda: service.classifier.state == "failed")
        refused(await service.client.get("/readyz"), "not_ready")
    assert [record.fields["reason"] for record in caplog.records if record.message == "start_failed"] == [
        "the device is on fire"
    ]


async def test_a_bundle_whose_graphs_give_nan_never_gets_ready(make_bundle, caplog):
    """The warm-up's images are black: a graph that fails on them would fail on all."""

    class Broken(WatchedEngine):
        def trunk(self, images):
            return super().trunk(images | plain(NAN_COLOUR))

    bundle = make_bundle()
    async with start(bundle, ready=False, opened=lambda *a, **o: Broken(open_engine(*a, **o))) as service:
        await until(lambda: service.classifier.state != "starting")
        assert service.classifier.state == "failed"
    (reason,) = [record.fields["reason"] for record in caplog.records if record.message == "start_failed"]
    assert "memory" not in reason  # which would not help
