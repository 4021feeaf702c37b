"""
JPEG bytes to the trunk's pixels in one call, for the contestants, with the decoder that the service uses.

Scaled ("draft") decoding lets libjpeg shrink the picture by 2, 4 or 8 while it decodes, to no less than twice the
input's size.
"""

import io
from collections.abc import Callable
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from model_export.bundle import InputSpec

Decode: TypeAlias = Callable[[bytes], NDArray[np.uint8]]
FILTERS: Final = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
DECODERS: Final = ("pillow", "simplejpeg")


def decoder(name: str, spec: InputSpec, *, draft: bool) -> Decode:
    """
    A function from a JPEG to (H, W, 3), resized with antialiasing as the bundle says.

    Args:
        name: one of DECODERS.
    """
    wanted = (spec.width, spec.height)
    at_least = (2 * spec.width, 2 * spec.height)

    def pillow(data: bytes) -> NDArray[np.uint8]:
        image = Image.open(io.BytesIO(data))
        if draft:
            image.draft("RGB", at_least)
        return fitted(image.convert("RGB"))

    def fitted(image: Image.Image) -> NDArray[np.uint8]:
        if image.size == wanted:
            return np.asarray(image)
        box = (0.0, 0.0, float(image.width), float(image.height))
        if spec.fit == "crop":
            scale = min(image.width / spec.width, image.height / spec.height)
            width, height = min(image.width, spec.width * scale), min(image.height, spec.height * scale)
            left, top = (image.width - width) / 2, (image.height - height) / 2
            box = (left, top, left + width, top + height)
        return np.asarray(image.resize(wanted, FILTERS[spec.interpolation], box=box))

    if name == "pillow":
        return pillow

    import simplejpeg

    def simple(data: bytes) -> NDArray[np.uint8]:
        smallest = {"min_width": at_least[0], "min_height": at_least[1]} if draft else {}
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, **smallest)
        return pixels if pixels.shape[1::-1] == wanted else fitted(Image.fromarray(pixels))

    return simple
