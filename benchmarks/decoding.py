"""
JPEG bytes to the trunk's pixels in one call, for the contestants, with the decoder that the service uses.

Scaled ("draft") decoding lets libjpeg shrink the picture by 2, 4 or 8 while it decodes, to no less than twice the
input's size.
"""

from collections.abc import Callable
from typing import Final, TypeAlias

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from model_export.bundle import InputSpec

Decode: TypeAlias = Callable[[bytes], NDArray[np.uint8]]
FILTERS: Final = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def decoder(spec: InputSpec, *, draft: bool) -> Decode:
    """A function from a JPEG to (H, W, 3), resized with antialiasing as the bundle says."""
    wanted = (spec.width, spec.height)
    smallest = {"min_width": 2 * spec.width, "min_height": 2 * spec.height} if draft else {}

    def decode(data: bytes) -> NDArray[np.uint8]:
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, **smallest)
        return pixels if pixels.shape[1::-1] == wanted else _fitted(Image.fromarray(pixels), spec)

    return decode


def _fitted(image: Image.Image, spec: InputSpec) -> NDArray[np.uint8]:
    box = (0.0, 0.0, float(image.width), float(image.height))
    if spec.fit == "crop":
        scale = min(image.width / spec.width, image.height / spec.height)
        width, height = min(image.width, spec.width * scale), min(image.height, spec.height * scale)
        left, top = (image.width - width) / 2, (image.height - height) / 2
        box = (left, top, left + width, top + height)
    return np.asarray(image.resize((spec.width, spec.height), FILTERS[spec.interpolation], box=box))
