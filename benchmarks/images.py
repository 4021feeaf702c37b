"""The same JPEGs for everybody: 32x32, and the same enlarged to 640x480; CIFAR-100 test images, or else textures."""

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image

SMALL, LARGE = "32x32", "640x480"
SIZES: Final = {SMALL: (32, 32), LARGE: (640, 480)}
QUALITY: Final = 90


@dataclass(frozen=True)
class Images:
    """JPEG files and where their pixels come from."""

    jpegs: list[bytes]
    source: str


@cache
def make_images(size: str, *, count: int = 500, seed: int = 0, synthetic: bool = False) -> Images:
    """
    Distinct JPEGs of one size, the same for the same seed.

    Args:
        size: a key of SIZES.
        synthetic: textures even where RIDE_DATA names a folder that has cifar100/test.parquet.
    """
    path = Path(os.environ.get("RIDE_DATA", "")) / "cifar100" / "test.parquet"
    real = not synthetic and path.is_file()
    pictures = _of_cifar(path, count, seed) if real else _textures(count, seed)
    source = "CIFAR-100 test images" if real else "synthetic textures"
    jpegs = []
    for picture in pictures:
        file = io.BytesIO()
        picture.resize(SIZES[size], Image.Resampling.BICUBIC).save(file, "JPEG", quality=QUALITY)
        jpegs.append(file.getvalue())
    return Images(jpegs, source)


def _of_cifar(path: Path, count: int, seed: int) -> Iterator[Image.Image]:
    import pyarrow.parquet

    files = pyarrow.parquet.read_table(path, columns=["image"])["image"]
    for row in np.random.default_rng(seed).permutation(len(files))[:count].tolist():
        yield Image.open(io.BytesIO(files[row].as_py())).convert("RGB")


def _textures(count: int, seed: int) -> Iterator[Image.Image]:
    """Coarse noise, enlarged: blotches of colour that compress about as photographs do."""
    random = np.random.default_rng(seed)
    for _ in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        blotches = np.asarray(coarse.resize((32, 32), Image.Resampling.BICUBIC), np.float32)
        yield Image.fromarray((blotches + random.normal(0, 12, blotches.shape)).clip(0, 255).astype(np.uint8))
