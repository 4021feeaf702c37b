"""POST /classify: what goes in, what comes out."""

import numpy as np
import pytest

from model_export.bundle import Calibration
from service.schemas import Answer, ErrorAnswer, ModelAnswer
from service.settings import SettingsError
from tests.service.conftest import encode, start
from tests.tiny import CLASSES, COUNTS, MACS, TinyModel, noise, operating_points, remove_routers

pytestmark = pytest.mark.anyio
SPLITS = dict(zip(CLASSES, ("many", "many", "many", "medium", "medium", "few", "few"), strict=True))


def check(result, expected, *, thresholds=(0.5, 0.5), top_k=5):
    """A result has the numbers of the reference, and says of itself what is true."""
    order = np.argsort(-expected.probabilities, kind="stable")[:top_k]
    used = expected.experts_used
    assert [found["index"] for found in result["predictions"]] == order.tolist()
    assert [found["probability"] for found in result["predictions"]] == pytest.approx(
        expected.probabilities[order].tolist(), abs=1e-5
    )
    for found in result["predictions"]:
        assert found["label"] == CLASSES[found["index"]]
        assert found["split"] == SPLITS[found["label"]]
    assert (result["experts_used"], result["experts_total"]) == (used, 3)
    assert result["exit_reason"] == expected.exit_reason
    assert result["router_scores"] == pytest.approx(expected.router_scores, abs=1e-5)
    assert result["thresholds"] == list(thresholds)
    assert result["macs"] == MACS["trunk"] + used * MACS["expert"] + min(used, 2) * MACS["router"]
    assert len(result["latency_ms"]["experts"]) == used
    parts = [value for name, value in result["latency_ms"].items() if name not in ("experts", "total")]
    assert 0 < sum(parts) + sum(result["latency_ms"]["experts"]) <= result["latency_ms"]["total"] + 0.01


async def test_many_files_are_answered_each_as_the_reference_does(service, tiny_model):
    """In the order of the request, with probabilities, experts used, scores and costs of that image alone."""
    images = noise(64, seed=5)
    response = await service.post(*map(encode, images))

    answer = Answer.model_validate_json(response.content, extra="forbid")
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"] == answer.request_id
    assert (answer.model.name, answer.model.version) == ("tiny", "7")
    results = response.json()["results"]
    assert [result["filename"] for result in results] == [f"{number}.png" for number in range(64)]
    for image, result in zip(images, results, strict=True):
        check(result, tiny_model.answer(image, (0.5, 0.5)))
    assert {result["experts_used"] for result in results} == {1, 2, 3}


async def test_an_answer_has_exactly_the_documented_keys(service):
    """No more and no less than the schema of /docs lists."""
    response = await service.post(encode(noise(1)[0]))
    (result,) = response.json()["results"]

    assert response.json().keys() == {"request_id", "model", "results"}
    assert result.keys() == {
        "filename", "predictions", "experts_used", "experts_total", "exit_reason", "router_scores", "thresholds",
        "macs", "latency_ms",
    }  # fmt: skip
    assert result["latency_ms"].keys() == {"decode", "queue", "trunk", "experts", "total"}
    assert result["predictions"][0].keys() == {"label", "index", "probability", "split"}


@pytest.mark.parametrize("content_type", ["image/png", "application/octet-stream", "text/plain", None])
async def test_a_raw_body_is_one_image_whatever_its_type_says(service, tiny_model, content_type):
    """The bytes decide. The result has no file name."""
    image = noise(1)[0]
    headers = {"content-type": content_type} if content_type else {}
    response = await service.client.post("/classify", content=encode(image), headers=headers)

    (result,) = response.json()["results"]
    check(result, tiny_model.answer(image, (0.5, 0.5)))
    assert result["filename"] is None


async def test_files_may_be_in_any_field(service):
    """Different names, repeated names, names of parameters, and none of note."""
    names = ["file", "file", "image[]", "top_k", "Bild", ""]
    images = noise(len(names))
    response = await service.client.post(
        "/classify", files=[(name, (f"{row}.png", encode(images[row]))) for row, name in enumerate(names)]
    )

    assert [result["filename"] for result in response.json()["results"]] == [f"{row}.png" for row in range(len(names))]


@pytest.mark.parametrize("name", ["Äpfel, rot.jpg", "苹果.png", 'a"b.png', "../../etc/passwd", "x" * 300])
async def test_file_names_are_repeated_as_they_came(service, name):
    """They are labels of results, and nothing else; after 255 characters one is cut."""
    body = (
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="'
        + name.replace('"', '\\"').encode()
        + b'"\r\nContent-Type: image/png\r\n\r\n' + encode(noise(1)[0]) + b"\r\n--b--\r\n"
    )  # fmt: skip
    response = await service.client.post(
        "/classify", content=body, headers={"content-type": "multipart/form-data; boundary=b"}
    )

    assert response.json()["results"][0]["filename"] == name[:255]


@pytest.mark.parametrize("content_type", [b"image/png", b"application/octet-stream"])
async def test_an_image_part_without_a_file_name_is_an_image(service, content_type):
    """Some clients send the type only."""
    part = b"--b\r\nContent-Type: " + content_type + b"\r\n\r\n" + encode(noise(1)[0]) + b"\r\n--b--\r\n"
    headers = {"content-type": "multipart/form-data; boundary=b"}
    response = await service.client.post("/classify", content=part, headers=headers)

    assert response.status_code == 200
    assert response.json()["results"][0]["filename"] is None


async def test_an_empty_file_input_beside_a_filled_one_is_no_image(service):
    """A browser sends a nameless, empty file for each input that was left empty."""
    empty = b'--b\r\nContent-Disposition: form-data; name="second"; filename=""\r\n\r\n\r\n'
    filled = b'--b\r\nContent-Disposition: form-data; name="f"; filename="a.png"\r\n\r\n' + encode(noise(1)[0])
    headers = {"content-type": "multipart/form-data; boundary=b"}
    response = await service.client.post("/classify", content=empty + filled + b"\r\n--b--\r\n", headers=headers)

    assert [result["filename"] for result in response.json()["results"]] == ["a.png"]


@pytest.mark.parametrize("size", [1, 7, 100])
async def test_a_body_may_come_in_pieces_of_any_size(service, size):
    """Boundaries, headers and images may be torn anywhere."""
    images = list(map(encode, noise(3)))
    parts = [
        b'--b\r\nContent-Disposition: form-data; name="f"; filename="%d.png"\r\n\r\n' % row + image + b"\r\n"
        for row, image in enumerate(images)
    ]
    body = b"".join(parts) + b"--b--\r\n"

    async def pieces():
        for begin in range(0, len(body), size):
            yield body[begin : begin + size]

    headers = {"content-type": "multipart/form-data; boundary=b"}
    torn = await service.client.post("/classify", content=pieces(), headers=headers)
    whole = await service.post(*images)

    assert [result["predictions"] for result in torn.json()["results"]] == [
        result["predictions"] for result in whole.json()["results"]
    ]


@pytest.mark.parametrize("top_k", [1, 3, 7])
async def test_top_k_says_how_many_classes(service, tiny_model, top_k):
    """Most probable first; all of them add up to 1."""
    image = noise(1)[0]
    (result,) = await service.answer(image, top_k=top_k)

    check(result, tiny_model.answer(image, (0.5, 0.5)), top_k=top_k)
    if top_k == len(CLASSES):
        assert sum(found["probability"] for found in result["predictions"]) == pytest.approx(1)


async def test_a_model_of_few_classes_answers_with_all_of_them(tiny_bundle, tiny_model):
    """Where the default, which is for models of any size, asks for more than there are."""
    image = noise(1)[0]
    async with start(tiny_bundle, top_k=9) as service:
        (result,) = await service.answer(image)

    check(result, tiny_model.answer(image, (0.5, 0.5)), top_k=len(CLASSES))
    assert len(result["predictions"]) == len(CLASSES)


async def test_times_are_those_of_the_metrics_in_milliseconds(service):
    """Of a request alone: each of its steps is the whole of what was measured."""

    def seconds():
        stages = {stage: service.metric("stage_seconds_sum", stage=stage) for stage in ("decode", "trunk", "expert_0")}
        return stages | {"queue": service.metric("queue_seconds_sum")}

    before = seconds()
    (result,) = await service.answer(noise(1)[0], max_experts=1)
    found = result["latency_ms"] | {"expert_0": result["latency_ms"]["experts"][0]}

    for name, after in seconds().items():
        assert found[name] == pytest.approx(1000 * (after - before[name]), abs=1e-3)


@pytest.mark.parametrize("max_experts", [1, 2, 3])
async def test_max_experts_ends_an_image_early_and_says_so(service, tiny_model, max_experts):
    """With the mean of the experts that ran; a router that was confident anyway is the reason where it was."""
    images = noise(32)
    results = await service.answer(*images, max_experts=max_experts)

    for image, result in zip(images, results, strict=True):
        check(result, tiny_model.answer(image, (0.5, 0.5), max_experts))
    assert {result["exit_reason"] for result in results} == {"confident", "last" if max_experts == 3 else "budget"}


@pytest.mark.parametrize("threshold", [0.0, 0.25, 0.9, 1.0])
async def test_a_request_may_choose_its_own_threshold(service, tiny_model, threshold):
    """0 runs every expert, 1 stops after the first unless a router is entirely sure of the need."""
    images = noise(32)
    results = await service.answer(*images, threshold=threshold)

    for image, result in zip(images, results, strict=True):
        check(result, tiny_model.answer(image, (threshold, threshold)), thresholds=(threshold, threshold))
    if threshold in (0.0, 1.0):
        assert {result["experts_used"] for result in results} == {3 if threshold == 0 else 1}


async def test_a_threshold_counts_to_its_last_digit(service, tiny_model):
    """An expert runs where the score reaches it, and not where it is a hair's breadth above: as the answer shows."""
    images = noise(8)
    usual = await service.answer(*images, max_experts=2)
    image, score = next((image, one["router_scores"][0]) for image, one in zip(images, usual, strict=True)
                        if 0.01 < one["router_scores"][0] < 0.99)  # fmt: skip
    for threshold, used in ((score, 2), (score + 1e-12, 1)):
        (found,) = await service.answer(image, threshold=repr(threshold), max_experts=2)
        assert (found["router_scores"][0], found["thresholds"][0], found["experts_used"]) == (score, threshold, used)


@pytest.mark.parametrize(("mode", "threshold"), [("fast", 0.5), ("balanced", 0.2), ("full", 0.0)])
async def test_a_mode_is_a_word_for_thresholds(tiny_bundle, tiny_model, mode, threshold):
    """fast: the cheapest within 2 points of all experts; balanced: the operator's choice; full: all."""
    images = noise(8)
    async with start(tiny_bundle, thresholds="0.2") as service:
        results = await service.answer(*images, mode=mode)
        modes = (await service.client.get("/model")).json()["modes"]

    assert modes[mode] == [threshold, threshold]
    for image, result in zip(images, results, strict=True):
        check(result, tiny_model.answer(image, (threshold, threshold)), thresholds=(threshold, threshold))


async def test_min_confidence_asks_for_more_experts_than_the_routers(service, tiny_model):
    """Who stops is that probable; who is not goes on to the last. A limit on experts comes first."""
    images = noise(40)
    usual = await service.answer(*images)
    results = await service.answer(*images, min_confidence=0.6)

    for image, result in zip(images, results, strict=True):
        by_depth = [tiny_model.answer(image, (0.0, 0.0), used) for used in (1, 2, 3)]
        sure = [
            one.experts_used for one in by_depth[:2] if one.router_scores[-1] < 0.5 and one.probabilities.max() >= 0.6
        ]
        used = min(sure, default=3)
        assert (result["experts_used"], result["exit_reason"]) == (used, "confident" if sure else "last")
        best = result["predictions"][0]
        assert best["probability"] == pytest.approx(by_depth[used - 1].probabilities.max(), abs=1e-5)
    assert [one["experts_used"] for one in results] != [one["experts_used"] for one in usual]
    (limited,) = await service.answer(images[0], min_confidence=1, max_experts=1)
    assert (limited["experts_used"], limited["exit_reason"]) == (1, "budget")


@pytest.mark.parametrize("rule", ["confidence", "margin", "agreement", "depth"])
async def test_another_rule_asks_no_router(make_bundle, rule):
    """Nor does an answer pay for one; its scores are the rule's."""
    points = (*operating_points(3), *operating_points(3, rule))
    table = Calibration("noise, for tests", 100, tuple(sorted(points, key=lambda point: point.mean_experts)), None)
    async with start(make_bundle(calibration=table), rule=rule, thresholds="0.6") as service:
        results = await service.answer(*noise(12))
        assert not [stage for stage, _ in service.engine.runs if stage.startswith("router")]
        assert (await service.client.get("/model")).json()["rule"] == rule

    for result in results:
        used = result["experts_used"]
        assert result["macs"] == MACS["trunk"] + used * MACS["expert"]
        first, *_ = result["router_scores"]
        if rule == "confidence" and used == 1:
            assert first == pytest.approx(1 - result["predictions"][0]["probability"], abs=1e-6)
        if rule == "depth":
            assert (used, first) == (1, 0.5)


async def test_the_operator_s_limits_hold_whatever_a_request_asks(tiny_bundle, tiny_model):
    """max_experts of a request lowers the operator's limit, never raises it; his top_k and thresholds are defaults."""
    image = noise(1)[0]
    async with start(tiny_bundle, max_experts=2, top_k=2, thresholds="0,0.1") as service:
        (usual,) = await service.answer(image)
        (more,) = await service.answer(image, max_experts=3)
        (less,) = await service.answer(image, max_experts=1, top_k=7)

    check(usual, tiny_model.answer(image, (0.0, 0.1), 2), thresholds=(0.0, 0.1), top_k=2)
    assert more["experts_used"] == 2
    check(less, tiny_model.answer(image, (0.0, 0.1), 1), thresholds=(0.0, 0.1), top_k=7)


async def test_a_model_of_one_expert_has_no_routers(make_bundle):
    """Nothing to decide: reason "last", no scores, no thresholds; parameters are taken all the same."""
    async with start(make_bundle(n_experts=1)) as service:
        (result,) = await service.answer(noise(1)[0], threshold=0.3, max_experts=1, top_k=1)

    assert (result["experts_used"], result["experts_total"], result["exit_reason"]) == (1, 1, "last")
    assert (result["router_scores"], result["thresholds"]) == ([], [])


@pytest.mark.parametrize("rule", ["confidence", "margin", "agreement", "depth"])
async def test_a_model_without_routers_is_served_by_another_rule(make_bundle, rule, tmp_path):
    """With the answers of the same model under that rule with its routers in place."""
    images = noise(20)
    async with start(
        make_bundle(rule=rule, calibration=Calibration("", 100, operating_points(3, rule), None))
    ) as whole:
        expected = await whole.answer(*images, threshold=0.6)
    async with start(remove_routers(tmp_path / "bundle", rule)) as service:
        results = await service.answer(*images, threshold=0.6)

    keys = ("predictions", "experts_used", "exit_reason", "router_scores", "macs")
    assert [[found[key] for key in keys] for found in results] == [[found[key] for key in keys] for found in expected]


async def test_a_model_without_routers_refuses_their_rule(make_bundle, tmp_path):
    """When it starts, with the rules that it was calibrated for."""
    make_bundle()
    with pytest.raises(SettingsError, match=r"RIDE_RULE is router, tiny was calibrated for \['margin'\]"):
        async with start(remove_routers(tmp_path / "bundle", "margin"), rule="router"):
            pass


async def test_a_model_of_six_experts_is_served_alike(make_bundle):
    """Any number of experts."""
    async with start(make_bundle(n_experts=6)) as service:
        results = await service.answer(*noise(40))
        all_experts = await service.answer(noise(1)[0], threshold=0)

    model = TinyModel(n_experts=6)
    assert [result["experts_used"] for result in results] == [
        model.answer(image, (0.5,) * 5).experts_used for image in noise(40)
    ]
    assert {result["experts_total"] for result in results} == {6}
    assert (all_experts[0]["experts_used"], all_experts[0]["exit_reason"]) == (6, "last")
    assert all(len(result["router_scores"]) == min(result["experts_used"], 5) for result in results)


async def test_one_broken_image_does_not_spoil_the_others(service, tiny_model):
    """Status 200, an error in its place, answers in theirs."""
    images = noise(2)
    broken = encode(noise(1)[0])[:60]
    response = await service.post(
        ("good.png", encode(images[0])),
        ("notes.txt", b"no image"),
        ("cut.png", broken),
        ("fine.png", encode(images[1])),
    )

    assert response.status_code == 200
    Answer.model_validate_json(response.content, extra="forbid")
    results = response.json()["results"]
    assert [result["filename"] for result in results] == ["good.png", "notes.txt", "cut.png", "fine.png"]
    assert [result.get("error", {}).get("code") for result in results] == [
        None, "image_unsupported", "image_unreadable", None
    ]  # fmt: skip
    check(results[0], tiny_model.answer(images[0], (0.5, 0.5)))
    check(results[3], tiny_model.answer(images[1], (0.5, 0.5)))


@pytest.mark.parametrize(
    ("files", "status", "code"),
    [((b"no image", b""), 415, "image_unsupported"), ((b"", b"no image"), 422, "image_unreadable")],
)
async def test_where_all_images_fail_the_first_error_is_the_status(service, files, status, code):
    """And the body has it too, beside a result for each image."""
    response = await service.post(*files)

    assert response.status_code == status
    answer = ErrorAnswer.model_validate_json(response.content, extra="forbid")
    assert answer.error.code == code
    assert answer.results[0].error == answer.error
    assert len(answer.results) == len(files)


async def test_the_openapi_document_describes_the_route(service):
    """POST /classify is there with its parameters, bodies and answers, and every reference in it leads somewhere."""
    document = (await service.client.get("/openapi.json")).json()
    operation = document["paths"]["/classify"]["post"]

    assert [parameter["name"] for parameter in operation["parameters"]] == [
        "top_k", "max_experts", "threshold", "mode", "min_confidence",
    ]  # fmt: skip
    assert {"multipart/form-data", "image/jpeg", "image/webp"} <= operation["requestBody"]["content"].keys()
    assert operation["responses"].keys() == {"200", "413", "415", "422", "429", "500", "503", "504"}
    assert {"/healthz", "/readyz", "/model", "/metrics"} <= document["paths"].keys()

    def references(node):
        if isinstance(node, dict):
            yield from ([node["$ref"]] if "$ref" in node else [])
        for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else []:
            yield from references(child)

    assert {reference.removeprefix("#/components/schemas/") for reference in references(document)} <= document[
        "components"
    ]["schemas"].keys()


async def test_model_tells_what_is_served(service):
    """Classes with counts and splits, thresholds in force, and the table of operating points."""
    model = (await service.client.get("/model")).json()

    assert model.keys() == ModelAnswer.model_fields.keys()
    assert ModelAnswer.model_validate(model).modes["full"] == [0, 0]
    assert (model["name"], model["version"], model["variant"], model["provider"]) == ("tiny", "7", "fp32", "cpu")
    assert [entry["label"] for entry in model["classes"]] == list(CLASSES)
    assert [entry["training_images"] for entry in model["classes"]] == list(COUNTS)
    assert {entry["label"]: entry["split"] for entry in model["classes"]} == SPLITS
    assert (model["thresholds"], model["max_experts"], model["experts"]) == ([0.5, 0.5], 3, 3)
    assert model["calibration"]["points"][-1]["thresholds"] == [0, 0]


async def test_request_ids_are_the_client_s_where_they_are_sane(service):
    """In the header of every answer and the body of ours; otherwise a fresh one each time."""

    async def ask(**headers):
        response = await service.client.post("/classify", content=encode(noise(1)[0]), headers=headers)
        assert response.json()["request_id"] == response.headers["x-request-id"]
        return response.headers["x-request-id"]

    for sane in ("trace-01:a.B_9", 64 * "x"):
        assert await ask(**{"x-request-id": sane}) == sane
    fresh = [await ask(), await ask(), await ask(**{"x-request-id": "x" * 65}), await ask(**{"x-request-id": "<a> b"})]
    assert len(set(fresh)) == 4
    assert all(len(request_id) == 32 and int(request_id, 16) for request_id in fresh)
    assert (await service.client.get("/healthz", headers={"x-request-id": "h1"})).headers["x-request-id"] == "h1"


async def test_every_answer_carries_the_security_headers(service):
    """Pages, answers, refusals, metrics."""
    for path in ("/", "/healthz", "/readyz", "/model", "/metrics", "/docs", "/nothing", "/static/app.js"):
        headers = (await service.client.get(path)).headers
        assert headers["x-content-type-options"] == "nosniff"
        policy = headers["content-security-policy"].split("; ")
        assert {"default-src 'self'", "object-src 'none'", "base-uri 'none'", "frame-ancestors 'none'"} <= set(policy)
        assert ("'unsafe-inline'" in headers["content-security-policy"]) == (path == "/docs")
        assert headers["cache-control"] == "no-cache"  # else a browser shows yesterday's page after an update


async def test_the_documentation_needs_no_other_host(service):
    """/docs loads its scripts and styles from here."""
    page = (await service.client.get("/docs")).text
    sources = [part.split('"')[0] for key in ('src="', 'href="') for part in page.split(key)[1:]]

    assert sources
    for source in sources:
        assert source.startswith("/docs/static/")
        assert (await service.client.get(source)).status_code == 200
