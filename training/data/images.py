"""One image file to the pixels that the network sees. The service has the same rules; a test holds them equal."""

from __future__ import annotations

import io
import warnings
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

Fit = Literal["crop", "stretch"]
FIT: Fit = "crop"
INTERPOLATION: Literal["bilinear", "bicubic"] = "bilinear"
_WHITE = (255, 255, 255, 255)


def read_image(encoded: bytes, size: int) -> np.ndarray:
    """
    Decode, turn upright by EXIF, convert to RGB (transparency on white), fit to the square input.

    Returns:
        (size, size, 3), uint8.

    Raises:
        ValueError: for bytes that are no image or a damaged one.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(encoded)) as image:
                image.load()
                return np.asarray(fit(to_rgb(ImageOps.exif_transpose(image)), size, size))
    except (OSError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"not a readable image ({len(encoded):,} bytes): {error}") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB: 16-bit grey keeps its high byte, transparency is laid on white."""
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8) if image.mode != "F" else image).convert("RGB")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        return Image.alpha_composite(Image.new("RGBA", image.size, _WHITE), image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def fit(image: Image.Image, height: int, width: int) -> Image.Image:
    """Scale so that the shorter side fits and take the centre, with antialiasing; an image of the right size stays."""
    if image.size == (width, height):
        return image
    scale = min(image.width / width, image.height / height)
    left, top = (image.width - scale * width) / 2, (image.height - scale * height) / 2
    box = (left, top, left + scale * width, top + scale * height)
    return image.resize((width, height), Image.Resampling[INTERPOLATION.upper()], box=box)
