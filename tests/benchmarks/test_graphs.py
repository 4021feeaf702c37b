"""The bare loop and the merged graph give the bundle's own answers."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import service.images
from benchmarks.contestants.merge import merge
from benchmarks.floor import BATCH, BareModel, Loop, measure_floor
from benchmarks.images import SMALL, make_images
from model_export.bundle import read_bundle
from service.settings import DEFAULT_BUNDLE
from tests.tiny import MACS, noise


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    """Three experts."""
    return read_bundle(tiny_bundle)


def test_the_merged_graph_says_what_all_experts_say(bundle, tiny_model, tmp_path):
    """For a batch of any size, from a file that stands for itself."""
    variant = bundle.manifest.default_variant
    onnx.save(merge(bundle, variant), tmp_path / "merged.onnx")
    session = ort.InferenceSession(tmp_path / "merged.onnx", providers=["CPUExecutionProvider"])
    for count in (1, 5):
        images = noise(count)
        (probabilities,) = session.run(None, {"images": images})
        expected = [tiny_model.answer(image, (0.0, 0.0)).probabilities for image in images]
        np.testing.assert_allclose(probabilities, expected, atol=1e-5)
    assert set(session.get_modelmeta().custom_metadata_map) == {"classes", "input"}


def test_the_shipped_bundle_can_be_merged(tmp_path):
    """Its graphs share names of nodes and tensors; the merged one still says what they say one after another."""
    bundle = read_bundle(DEFAULT_BUNDLE)
    onnx.save(merge(bundle, "fp32"), tmp_path / "merged.onnx")
    session = ort.InferenceSession(tmp_path / "merged.onnx", providers=["CPUExecutionProvider"])
    spec = bundle.manifest.input
    images = np.random.default_rng(0).integers(0, 256, (4, spec.height, spec.width, 3), dtype=np.uint8)

    (probabilities,) = session.run(None, {"images": images})

    expected, _ = BareModel(bundle, "fp32", "cpu", threads=1).run(images, routed=False)
    np.testing.assert_allclose(probabilities, expected, atol=1e-5)


def test_the_bare_loop_routes_as_the_bundle_says(bundle, tiny_model):
    """Each image alone or in a batch: the same experts, the same probabilities."""
    model = BareModel(bundle, bundle.manifest.default_variant, "cpu", threads=1)
    images = noise(40)
    expected = [tiny_model.answer(image, bundle.manifest.thresholds) for image in images]

    for batch in (images, images[:1]):
        probabilities, used = model.run(batch, routed=True)
        assert used.tolist() == [answer.experts_used for answer in expected[: len(batch)]]
        np.testing.assert_allclose(
            probabilities, [answer.probabilities for answer in expected[: len(batch)]], atol=1e-5
        )
    assert len({answer.experts_used for answer in expected}) > 1


def test_without_routing_the_bare_loop_runs_all_experts(bundle, tiny_model):
    """Whatever the routers would have said."""
    model = BareModel(bundle, bundle.manifest.default_variant, "cpu", threads=1)
    images = noise(10)

    probabilities, used = model.run(images, routed=False)

    assert set(used.tolist()) == {3}
    expected = [tiny_model.answer(image, (0.0, 0.0)).probabilities for image in images]
    np.testing.assert_allclose(probabilities, expected, atol=1e-5)


def test_the_floor_is_of_the_images_in_its_loop(bundle, tiny_bundle, tiny_model, monkeypatch):
    """Mean experts and cost: of every whole batch of what the service would decode, image by image."""
    monkeypatch.setattr("benchmarks.floor.available_cores", lambda: 1)
    jpegs = make_images(SMALL).jpegs
    whole = jpegs[: len(jpegs) // BATCH * BATCH]
    pixels = [service.images.decode(jpeg, bundle.manifest.input, max_pixels=10**7) for jpeg in whole]
    used = np.array([tiny_model.answer(image, bundle.manifest.thresholds).experts_used for image in pixels])

    floor = measure_floor(Loop(tiny_bundle, "fp32", "cpu", draft=False, size=SMALL, routed=True, seconds=0.1))

    assert floor.mean_experts == pytest.approx(used.mean(), abs=1e-4)
    spent = MACS["trunk"] + MACS["expert"] * used + MACS["router"] * np.minimum(used, 2)
    assert floor.mean_macs == pytest.approx(spent.mean(), abs=0.5)
    assert floor.rate == max(floor.one_process, floor.process_per_core) > 0
