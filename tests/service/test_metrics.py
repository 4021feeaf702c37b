"""The metrics are an interface: their names, labels and movements."""

import asyncio
import math

import pytest
from prometheus_client.parser import text_string_to_metric_families

from model_export.bundle import read_bundle
from service.metrics import image_macs
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
    assert families["process_open_fds"].samples[0].value > 0


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
    assert [image_macs(manifest, used) for used in (1, 2, 3)] == [
        768 + 355 + 12, 768 + 2 * 355 + 2 * 12, 768 + 3 * 355 + 2 * 12
    ]  # fmt: skip
