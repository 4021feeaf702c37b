"""Facts about real images and the model that ships. Skipped where RIDE_DATA does not name a directory with the sets."""

import io
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from benchmarks.images import LARGE, make_images
from model_export.bundle import MAX_VARIANT_LOSS, InputSpec, read_bundle
from model_export.calibrate import accuracy_of
from model_export.parity import run_variant
from service.images import decode
from service.settings import DEFAULT_BUNDLE
from training.data.images import read_image
from training.data.sets import load_data
from training.evaluate import Costs, Predictions, mean_logits, route, summarise
from training.recipes import RECIPES

ROOT = Path(os.environ.get("RIDE_DATA", "/nonexistent"))


def needs(name: str) -> pytest.MarkDecorator:
    """Skip where the set `name` is not there."""
    return pytest.mark.skipif(not (ROOT / name).is_dir(), reason=f"RIDE_DATA holds no {name}")


@pytest.fixture(scope="module")
def cifar100():
    """CIFAR-100-LT as the RIDE recipe draws it."""
    return load_data(RECIPES["ride-cifar100"])


@needs("cifar100")
def test_cifar100_lt_has_its_published_sizes(cifar100):
    """10,847 images, 500 to 5 a class; the held-out ones are what is left, and class 0 has none."""
    held_out = np.bincount(cifar100.heldout.labels, minlength=100)

    assert (len(cifar100.train), cifar100.counts[0], cifar100.counts[-1]) == (10_847, 500, 5)
    assert len(cifar100.test) == 10_000
    assert cifar100.classes[:2] == ("apple", "aquarium_fish")
    assert held_out.tolist() == [min(500 - count, 100) for count in cifar100.counts]
    assert "none for apple" in cifar100.heldout_note


@needs("cifar100")
def test_no_held_out_image_was_trained_on(cifar100):
    """By their pixels: the set holds a few images twice, but not across this draw by mistake."""
    trained = {pixels.numpy().tobytes() for pixels in cifar100.train.pixels}
    shared = sum(pixels.numpy().tobytes() in trained for pixels in cifar100.heldout.pixels)
    assert shared < 10


@needs("cifar100")
def test_the_shipped_model_is_as_good_as_it_says(cifar100):
    """Every figure in the manifest's provenance, measured anew on the 10,000 test images with its own graphs."""
    manifest = read_bundle(DEFAULT_BUNDLE).manifest
    images = cifar100.test.pixels.numpy()
    found = run_variant(DEFAULT_BUNDLE, manifest.variants["fp32"], images, len(manifest.classes))
    predictions = Predictions(found.expert_logits, found.router_scores, cifar100.test.labels.numpy())
    macs = Costs(manifest.macs.trunk, manifest.macs.experts, manifest.macs.routers)

    measured = summarise(predictions, manifest.class_counts, macs, manifest.thresholds)
    recorded = manifest.provenance["test"]

    for rows in zip(
        [*measured["experts"], measured["routed"]], [*recorded["experts"], recorded["routed"]], strict=True
    ):
        for name in ("all", "many", "medium", "few"):
            assert rows[0][name] == pytest.approx(rows[1][name], abs=0.1)
    assert measured["routed"]["mean_experts"]["all"] == pytest.approx(
        recorded["routed"]["mean_experts"]["all"], abs=0.002
    )


@needs("cifar100")
def test_the_shipped_int8_variant_is_faithful_on_images_that_calibrated_nothing(cifar100):
    """
    Measured on held-out images when it was made, it keeps its accuracy on the test images as well, in every split.

    A split of 3,000 images may lose 0.2 points more by chance, or by the rounding of another processor.
    """
    manifest = read_bundle(DEFAULT_BUNDLE).manifest
    images = cifar100.test.pixels.numpy()
    int8 = run_variant(DEFAULT_BUNDLE, manifest.variants["int8"], images, len(manifest.classes))
    used = route(int8.router_scores, manifest.thresholds)
    predictions = Predictions(int8.expert_logits, int8.router_scores, cifar100.test.labels.numpy())
    measured = accuracy_of(predictions, used, manifest.class_counts)

    recorded = manifest.provenance["test"]["routed"]
    assert manifest.variants["int8"].faithful
    assert recorded["all"] - measured.all <= MAX_VARIANT_LOSS
    for split in ("many", "medium", "few"):
        assert recorded[split] - getattr(measured, split) <= MAX_VARIANT_LOSS + 0.2, split
    assert used.mean() == pytest.approx(recorded["mean_experts"]["all"], abs=0.02)


@needs("cifar100")
def test_scaled_decoding_keeps_the_accuracy_on_enlarged_images():
    """Within 0.1 points, on 1,000 test images as JPEGs of 640x480; few change their class."""
    manifest, count = read_bundle(DEFAULT_BUNDLE).manifest, 1000
    column = pyarrow.parquet.read_table(ROOT / "cifar100" / "test.parquet", columns=["label"])["label"]
    labels = column.to_numpy()[np.random.default_rng(0).permutation(len(column))[:count]]
    jpegs = make_images(LARGE, count=count).jpegs

    whole, scaled = (
        np.stack([decode(jpeg, manifest.input, 10**6, scaled=how) for jpeg in jpegs]) for how in (False, True)
    )
    assert (whole != scaled).any(axis=(1, 2, 3)).all()
    found = []
    for pixels in (whole, scaled):
        graphs = run_variant(DEFAULT_BUNDLE, manifest.variants["fp32"], pixels, len(manifest.classes))
        found.append(mean_logits(graphs.expert_logits, np.full(count, manifest.n_experts)).argmax(axis=1))

    before, after = ((classes == labels).mean() for classes in found)
    assert before > 0.3
    assert before - after <= 0.001
    assert (found[0] != found[1]).mean() < 0.04


@needs("photos")
def test_photographs_are_decoded_alike_in_training_and_service():
    """303 JPEGs of all sizes, colour and grey, to the same pixels."""
    table = pyarrow.parquet.read_table(ROOT / "photos" / "photos.parquet")
    spec = InputSpec(32, 32, "crop", "bilinear", (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    for encoded in table["image"].to_pylist():
        assert np.array_equal(read_image(encoded, 32), decode(encoded, spec, 10**8))
        assert Image.open(io.BytesIO(encoded)).format == "JPEG"
