"""The JPEGs that everybody gets, and their decoding."""

import io

import numpy as np
import pytest
from PIL import Image

from benchmarks.decoding import decoder
from benchmarks.images import SIZES, make_images
from model_export.bundle import InputSpec

SPEC = InputSpec(32, 32, "crop", "bilinear", (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))


@pytest.mark.parametrize("size", SIZES)
def test_images_are_distinct_and_the_same_for_a_seed(size):
    """JPEG files of the size that was asked for."""
    first = make_images(size, count=20, seed=3, synthetic=True).jpegs
    make_images.cache_clear()
    again, other = (make_images(size, count=20, seed=seed, synthetic=True).jpegs for seed in (3, 4))

    assert first == again != other
    assert len(set(first)) == 20
    assert {Image.open(io.BytesIO(jpeg)).size for jpeg in first} == {SIZES[size]}


def test_scaled_decoding_changes_large_images_a_little_and_small_ones_not_at_all():
    """By some shades of 255 at most on average, and to the same shape."""
    whole, scaled = (decoder(SPEC, draft=draft) for draft in (False, True))
    for size, bound in (("32x32", 0.0), ("640x480", 3.0)):
        for jpeg in make_images(size, count=5, synthetic=True).jpegs:
            assert scaled(jpeg).shape == whole(jpeg).shape == (32, 32, 3)
            assert np.abs(scaled(jpeg).astype(float) - whole(jpeg)).mean() <= bound
