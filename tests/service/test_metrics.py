"""The metrics are an interface: their names, labels and movements."""

import asyncio
import math
import os
import resource
import time
from contextlib import ExitStack, suppress
from random import Random

import pytest
from prometheus_client import CollectorRegistry, Histogram, ProcessCollector
from prometheus_client.parser import text_string_to_metric_families

from model_export.bundle import read_bundle
from service import processes
from service.cascade import EXIT_REASONS, BatchReport, Outcome
from service.counters import BEAT, PID, READY, WAITING
from service.metrics import SCORE_BUCKETS, Metrics, image_macs, shared_counters
from service.operating_point import Operation
from tests.service.conftest import encode, start, until
from tests.tiny import CLASSES, FAILING_COLOUR, MACS, NAN_COLOUR, TinyModel, noise, plain

pytestmark = pytest.mark.anyio
IMAGES = noise(20, seed=21)
FILES = [encode(image) for image in IMAGES]
EXPECTED = [TinyModel().answer(image, (0.5, 0.5)) for image in IMAGES]
STAGES = {"trunk", "expert_0", "expert_1", "expert_2"}

# Name, kind, and every label value that is there before the first request (None: the metric has no label).
TABLE = [
    ("ride_requests", "counter", "code", {"200", "413", "415", "422", "429", "499", "500", "503", "504"}),
    ("ride_request_seconds", "histogram", None, None),
    ("ride_images", "counter", "experts", {"1", "2", "3"}),
    ("ride_exits", "counter", "reason", {"confident", "last", "budget"}),
    ("ride_router_score", "histogram", "router", {"0", "1"}),
    ("ride_stage_seconds", "histogram", "stage", {"decode", *STAGES}),
    ("ride_batch_images", "histogram", "stage", STAGES),
    ("ride_queue_seconds", "histogram", None, None),
    ("ride_queue_images", "gauge", None, None),
    ("ride_queue_limit_images", "gauge", None, None),
    (
        "ride_refused", "counter", "reason",
        {"image_unsupported", "image_unreadable", "image_too_large", "request_too_large", "too_many_images", "no_image",
         "parameter_invalid", "overloaded", "not_ready", "shutting_down", "timeout", "internal"},
    ),
    ("ride_predictions", "counter", "split", {"many", "medium", "few"}),
    ("ride_macs", "counter", None, None),
    ("ride_macs_saved", "counter", None, None),
    ("ride_calibrated_mean_experts", "gauge", None, None),
    ("ride_calibrated_experts_share", "gauge", "experts", {"1", "2", "3"}),
    ("ride_model_info", "gauge", "version", {"7"}),
    ("ride_build_info", "gauge", "onnxruntime", None),
    ("ride_ready", "gauge", None, None),
    ("ride_workers", "gauge", None, None),
    ("ride_workers_configured", "gauge", None, None),
    ("ride_worker_restarts", "counter", None, None),
    ("ride_open_files_share", "gauge", None, None),
]  # fmt: skip


async def scrape(service):
    """What Prometheus would read: samples by name and labels."""
    response = await service.client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    return {family.name: family for family in text_string_to_metric_families(response.text)}


async def moved(service, action):
    """The counters that an action moves, and by how much."""

    async def figures():
        return {
            (sample.name, *sample.labels.values()): sample.value
            for family in (await scrape(service)).values()
            for sample in family.samples
            if family.name.startswith("ride_") and sample.name.endswith(("_total", "_count"))
        }

    before = await figures()
    await action
    return {key: value - before.get(key, 0) for key, value in (await figures()).items() if value != before.get(key, 0)}


@pytest.mark.parametrize(("name", "kind", "label", "values"), TABLE)
async def test_every_metric_is_there_from_the_start(service, name, kind, label, values):
    """With each label value that can be known, at 0, so that a panel shows 0 and not "no data"."""
    family = (await scrape(service))[name]

    assert family.type == kind
    assert family.documentation.endswith(".")
    counted = [sample for sample in family.samples if sample.name.endswith(("_total", "_count"))]
    assert bool(counted) == (kind != "gauge")
    if values is not None:
        assert {sample.labels[label] for sample in counted or family.samples} == values
    assert all(sample.value == 0 for sample in counted)


async def test_the_table_names_all_metrics(service):
    """Whoever adds one adds it to the table, and to the README's."""
    names = {name for name in await scrape(service) if name.startswith("ride_")}

    assert names == {name for name, *_ in TABLE}


async def test_infos_and_limits_say_what_is_served(service):
    """Model, build, queue limit, readiness."""
    families = await scrape(service)

    assert families["ride_model_info"].samples[0].labels == {
        "name": "tiny", "version": "7", "variant": "fp32", "provider": "cpu"
    }  # fmt: skip
    assert families["ride_build_info"].samples[0].labels.keys() == {"version", "python", "onnxruntime"}
    assert service.metric("queue_limit_images") == 256
    assert service.metric("ready") == 1
    assert service.metric("workers") == 1
    assert families["process_open_fds"].samples[0].value > 0


async def test_the_process_is_measured_under_the_usual_names(service):
    """The same that prometheus_client's own collector tells of this process, which is all of the service here."""
    theirs = CollectorRegistry()
    ProcessCollector(registry=theirs)
    usual = {family.name: family.samples[0].value for family in theirs.collect()}
    ours = {
        name: family.samples[0].value for name, family in (await scrape(service)).items() if name.startswith("process_")
    }

    assert ours.keys() == usual.keys()
    assert ours["process_max_fds"] == usual["process_max_fds"]
    assert usual["process_start_time_seconds"] <= ours["process_start_time_seconds"] <= time.time()  # when it is loaded
    for name in ("process_resident_memory_bytes", "process_virtual_memory_bytes", "process_open_fds"):
        assert ours[name] == pytest.approx(usual[name], rel=0.2)
    assert -0.02 < ours["process_cpu_seconds"] - usual["process_cpu_seconds"] < 5  # counted in hundredths


async def test_that_no_file_can_be_opened_any_more_can_still_be_told(service):
    """When connections have taken all descriptors, reading /proc needs one more; the alert lives on it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ExitStack() as taken:
        taken.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        most = len(os.listdir("/proc/self/fd")) + 20
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        with suppress(OSError):
            while True:
                taken.callback(os.close, os.dup(0))
        for _ in range(2):  # and again
            families = await scrape(service)
            assert families["process_cpu_seconds"].samples[0].value > 0
            assert families["ride_open_files_share"].samples[0].value > 0.9


def test_a_process_that_has_just_died_still_counts(monkeypatch):
    """Linux does not tell its files, only its time, without which the sum would fall until it is buried."""

    def forbidden(path):
        raise PermissionError(path)

    monkeypatch.setattr(os, "listdir", forbidden)
    found = processes.read_process(os.getpid())

    assert found.cpu_s > 0
    assert found.open_files == 0


def test_the_processes_are_added_up(monkeypatch):
    """With the time of those that are no more; of open files the fullest counts."""
    figures = {
        1: processes.ProcessFigures(cpu_s=1, resident_bytes=10, virtual_bytes=100, open_files=3),
        2: processes.ProcessFigures(cpu_s=2, resident_bytes=20, virtual_bytes=200, open_files=6),
    }
    monkeypatch.setattr(processes, "read_process", figures.get)
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    families = processes.process_families([1, 2, 3], dead_cpu_s=0.5)

    assert {family.name: family.samples[0].value for family in families} == {
        "process_cpu_seconds": 3.5,
        "process_resident_memory_bytes": 30,
        "process_virtual_memory_bytes": 300,
        "process_open_fds": 9,
        "process_max_fds": 2 * limit,
        "process_start_time_seconds": processes.STARTED,
        "ride_open_files_share": 6 / limit,
    }
    assert not list(processes.process_families([3], dead_cpu_s=0.5))


def report(rng):
    """What a batch of four images might have done."""
    stages = [("trunk", 4, rng.random()), ("expert_0", 4, rng.random()), ("expert_1", 2, rng.random())]
    return BatchReport(
        stages=[*stages, ("expert_2", 1, rng.random())],
        router_scores=[(0, [rng.random() for _ in range(4)]), (1, [rng.random() for _ in range(2)])],
        waits=[rng.random() for _ in range(4)],
    )


def outcome(rng):
    """What an image might have been answered with."""
    used = rng.randint(1, 3)
    return Outcome([rng.randrange(7)], [0.9], used, rng.choice(EXIT_REASONS), [0.1], 0.1, 0.1, [0.1] * used)


def build(bundle, counters=None):
    """The metrics of a process without a service around it, and their registry."""
    registry, manifest = CollectorRegistry(), read_bundle(bundle).manifest
    return Metrics(registry, manifest, Operation("router", (0.5, 0.5), 3, None, {}), lambda: 5, 10, counters), registry


def test_the_figures_of_several_processes_are_added_up(tiny_bundle):
    """
    Whichever of them is asked; what one recorded before it died stays when its successor takes its row.

    The process that runs the graphs for them is no worker, and what waits there they have counted.
    """
    counters = shared_counters(read_bundle(tiny_bundle).manifest, 3, shared_engine=True)
    engine = counters.row(counters.engine)
    engine[PID], engine[READY], engine[WAITING] = os.getpid(), 1, 7
    rng = Random(0)
    for row in (0, 2, 1, 2):  # the last one is a successor
        counters.take(row)
        metrics, registry = build(tiny_bundle, counters)
        metrics.batch_done(report(rng))
        metrics.image_answered(outcome(rng))
        metrics.image_decoded(0.2)
        metrics.request_done(200, 0.3)
        metrics.refused("no_image")
        metrics.set_ready(True)
        metrics.publish()
    counters.row(1)[PID] = 0  # it is dead

    def figure(name, **labels):
        return registry.get_sample_value(f"ride_{name}", labels)

    assert figure("requests_total", code="200") == figure("refused_total", reason="no_image") == 4
    assert figure("request_seconds_bucket", le="0.25") == 0
    assert figure("request_seconds_bucket", le="0.5") == figure("request_seconds_count") == 4
    assert figure("request_seconds_sum") == pytest.approx(1.2)
    assert figure("stage_seconds_sum", stage="decode") == pytest.approx(0.8)
    assert figure("router_score_count", router="0") == 16
    assert sum(figure("images_total", experts=str(used)) for used in (1, 2, 3)) == 4
    assert (figure("queue_images"), figure("queue_limit_images")) == (15, 30)
    assert (figure("ready"), figure("workers")) == (3, 2)
    engine[READY] = 0
    assert figure("ready") == 0


def test_whoever_gets_ready_has_just_shown_that_it_lives(tiny_bundle):
    """A worker takes its predecessor's row, whose last sign of life is as old as it took to start."""
    counters, before = shared_counters(read_bundle(tiny_bundle).manifest, 1), time.monotonic()
    counters.take(0)
    metrics, _ = build(tiny_bundle, counters)
    metrics.set_ready(True)

    assert counters.own[BEAT] >= before


def test_buckets_hold_what_does_not_exceed_their_bound(tiny_bundle):
    """As prometheus_client counts: the bound itself belongs to its bucket."""
    metrics, registry = build(tiny_bundle)
    theirs = Histogram("theirs", ".", buckets=SCORE_BUCKETS, registry=registry)
    scores = [0.0, 0.05, 0.1, 0.1 + 1e-12, 0.5, 0.95, 1.0]
    metrics.batch_done(BatchReport(router_scores=[(0, scores)]))
    for score in scores:
        theirs.observe(score)

    for bound in (*map(str, SCORE_BUCKETS), "+Inf"):
        ours = registry.get_sample_value("ride_router_score_bucket", {"router": "0", "le": bound})
        assert ours == registry.get_sample_value("theirs_bucket", {"le": bound})
    assert registry.get_sample_value("ride_router_score_sum", {"router": "0"}) == pytest.approx(sum(scores))


def test_no_cell_is_written_by_two_threads(tiny_bundle):
    """The batches' thread and the event loop's never meet: that is why nothing is locked."""
    counters, rng = shared_counters(read_bundle(tiny_bundle).manifest, 1), Random(0)
    counters.take(0)
    metrics, _ = build(tiny_bundle, counters)

    def cells_moved_by(*calls):
        before = counters.own.tolist()
        for call in calls:
            call()
        return {cell for cell, (old, new) in enumerate(zip(before, counters.own.tolist(), strict=True)) if old != new}

    by_batches = cells_moved_by(*[lambda: metrics.batch_done(report(rng))] * 100)
    by_loop = cells_moved_by(
        *[lambda: metrics.image_decoded(rng.random())] * 100,
        *[lambda: metrics.image_answered(outcome(rng))] * 100,
        *[lambda: metrics.request_done(rng.choice((200, 429)), rng.random())] * 100,
        lambda: metrics.refused("overloaded"),
        lambda: metrics.set_ready(True),
        metrics.publish,
    )

    assert len(by_batches) > 40
    assert len(by_loop) > 20
    assert not by_batches & by_loop


async def test_a_request_moves_exactly_its_counters(service):
    """20 images: by experts, reason, split, MACs; each batch by stage; each score that was asked for."""
    used = [expected.experts_used for expected in EXPECTED]
    splits = [
        "many" if top < 3 else "medium" if top < 5 else "few" for top in (e.probabilities.argmax() for e in EXPECTED)
    ]
    # Decoding threads may finish while a batch runs: how many batches there were, the engine knows.
    changes = await moved(service, service.post(*FILES))
    runs = [stage for stage, _ in service.engine.runs]

    images = {("ride_images_total", str(n)): used.count(n) for n in (1, 2, 3)}
    exits = {
        ("ride_exits_total", reason): sum(e.exit_reason == reason for e in EXPECTED) for reason in ("confident", "last")
    }
    predictions = {("ride_predictions_total", split): splits.count(split) for split in set(splits)}
    spent = sum(MACS["trunk"] + n * MACS["expert"] + min(n, 2) * MACS["router"] for n in used)
    full = len(used) * (MACS["trunk"] + 3 * MACS["expert"] + 2 * MACS["router"])
    batches = {
        (f"ride_{metric}_count", stage): runs.count(stage)
        for stage in STAGES
        for metric in ("stage_seconds", "batch_images")
    }
    scores = {("ride_router_score_count", str(router)): sum(n > router for n in used) for router in (0, 1)}
    assert changes == images | exits | predictions | batches | scores | {
        ("ride_macs_total",): spent,
        ("ride_macs_saved_total",): full - spent,
        ("ride_requests_total", "200"): 1,
        ("ride_request_seconds_count",): 1,
        ("ride_queue_seconds_count",): 20,
        ("ride_stage_seconds_count", "decode"): 20,
    }
    assert all(service.metric("batch_images_sum", stage=stage) == sum(n for s, n in service.engine.runs if s == stage)
               for stage in STAGES)  # fmt: skip
    assert service.metric("router_score_sum", router="0") == pytest.approx(sum(e.router_scores[0] for e in EXPECTED))


async def test_an_image_stopped_by_a_limit_is_counted_as_budget(service):
    """And saves the work of the experts it did not get."""
    changes = await moved(service, service.post(FILES[0], threshold=0, max_experts=1))

    assert changes["ride_exits_total", "budget"] == 1
    assert changes["ride_macs_saved_total",] == 2 * MACS["expert"] + MACS["router"]


@pytest.mark.parametrize(
    ("files", "query", "code", "reasons"),
    [
        ([b"text"], {}, "415", {"image_unsupported": 1}),
        ([FILES[0][:40], b"text"], {}, "422", {"image_unreadable": 1, "image_unsupported": 1}),
        ([FILES[0]], {"top_k": 99}, "422", {"parameter_invalid": 1}),
        ([FILES[0]] * 65, {}, "413", {"too_many_images": 1}),
        ([encode(plain(FAILING_COLOUR))], {}, "500", {"internal": 1}),
    ],
)
async def test_refusals_are_counted_by_their_reason(service, files, query, code, reasons):
    """One for each image that failed, or one for the request; nothing is counted as answered."""
    changes = await moved(service, service.post(*files, **query))

    assert changes["ride_requests_total", code] == changes["ride_request_seconds_count",] == 1
    assert {key[1]: value for key, value in changes.items() if key[0] == "ride_refused_total"} == reasons
    assert not [key for key in changes if key[0] in ("ride_images_total", "ride_macs_total", "ride_predictions_total")]


async def test_in_a_mixed_request_answers_and_refusals_are_both_counted(service):
    """Two answered, one refused: 200."""
    changes = await moved(service, service.post(FILES[0], b"text", FILES[1]))

    assert sum(value for key, value in changes.items() if key[0] == "ride_images_total") == 2
    assert changes["ride_refused_total", "image_unsupported"] == changes["ride_requests_total", "200"] == 1


async def test_the_queue_gauge_counts_what_waits(service):
    """Not what runs; back to 0 afterwards."""
    with service.engine.hold():
        running = asyncio.create_task(service.post(FILES[0]))
        await until(lambda: service.engine.held)
        assert service.metric("queue_images") == 0
        waiting = asyncio.create_task(service.post(*FILES[:7]))
        await until(lambda: service.metric("queue_images") == 7)
    await asyncio.gather(running, waiting)
    assert service.metric("queue_images") == 0


async def test_a_nan_does_not_spoil_the_histograms(service):
    """A sum that is NaN once would be NaN for ever."""
    response = await service.post(encode(plain(NAN_COLOUR)))
    assert response.status_code == 500

    assert service.metric("router_score_sum", router="0") == 0
    assert service.metric("router_score_count", router="0") == 0
    await service.post(FILES[0])
    assert math.isfinite(service.metric("router_score_sum", router="0"))


async def test_calibration_is_shown_for_thresholds_that_it_measured(tiny_bundle):
    """And NaN for others, or under a limit on experts, which it did not measure."""
    for settings, mean in (
        ({}, 1.6),
        ({"thresholds": "0.2"}, 1.9),
        ({"thresholds": "0.3"}, None),
        ({"max_experts": 2}, None),
    ):
        async with start(tiny_bundle, **settings) as service:
            shown = service.metric("calibrated_mean_experts")
            shares = [service.metric("calibrated_experts_share", experts=str(used)) for used in (1, 2, 3)]
        if mean is None:
            assert all(map(math.isnan, (shown, *shares)))
        else:
            assert (shown, shares[0] + 3 * shares[2]) == pytest.approx((mean, mean))


async def test_metrics_can_be_had_as_openmetrics(service):
    """Where the scraper asks for it."""
    response = await service.client.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})

    assert response.headers["content-type"].startswith("application/openmetrics-text")
    assert response.text.endswith("# EOF\n")


def test_macs_of_an_image_are_those_of_what_ran(tiny_bundle):
    """Trunk, experts, and the routers that were asked: after the last expert none is."""
    manifest = read_bundle(tiny_bundle).manifest
    assert len(manifest.classes) == len(CLASSES)
    assert [image_macs(manifest, used, "router") for used in (1, 2, 3)] == [
        768 + 355 + 12, 768 + 2 * 355 + 2 * 12, 768 + 3 * 355 + 2 * 12
    ]  # fmt: skip
    assert image_macs(manifest, 2, "margin") == 768 + 2 * 355


@pytest.mark.parametrize("accept", ["text/plain;version=x", "application/openmetrics-text; version=1.0.0-rc1", ";;q="])
async def test_whoever_asks_for_a_version_that_is_none_gets_the_usual_one(service, accept):
    """As whoever asks for none."""
    response = await service.client.get("/metrics", headers={"accept": accept})

    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain")
