"""The JPEGs that everybody gets."""

import io

import pytest
from PIL import Image

from benchmarks.images import SIZES, make_images


@pytest.mark.parametrize("size", SIZES)
def test_images_are_distinct_and_the_same_for_a_seed(size):
    """JPEG files of the size that was asked for."""
    first = make_images(size, count=20, seed=3, synthetic=True).jpegs
    make_images.cache_clear()
    again, other = (make_images(size, count=20, seed=seed, synthetic=True).jpegs for seed in (3, 4))

    assert first == again != other
    assert len(set(first)) == 20
    assert {Image.open(io.BytesIO(jpeg)).size for jpeg in first} == {SIZES[size]}
