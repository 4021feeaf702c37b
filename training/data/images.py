"""One image file to the pixels that the network sees. The service has the same rules; a test holds them equal."""

from __future__ import annotations

import io
from typing import Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

Fit = Literal["crop", "inner_crop"]
INTERPOLATION: Literal["bilinear"] = "bilinear"
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 200_000_000
INNER_SHARE = 7 / 8  # of the shorter side, in "inner_crop": 224 of 256


def read_image(encoded: bytes, size: int, how: Fit = "crop") -> np.ndarray:
    """
    Decode, turn upright by EXIF, convert to RGB, fit to the square input. Of an animation the first frame counts.

    Returns:
        (size, size, 3), uint8.

    Raises:
        ValueError: for bytes that are no image of a known format, are damaged, or hold more than 200 million pixels.
    """
    return np.asarray(fit(decode(encoded), size, size, how))


def decode(encoded: bytes) -> Image.Image:
    """
    Decode, turn upright by EXIF, convert to RGB, in the size that the image has.

    Raises:
        ValueError: as `read_image`.
    """
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}x{image.height} is more than {MAX_PIXELS:,} pixels; scale it down")
            image.load()
            return to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError:
        raise ValueError(f"not a readable image ({len(encoded):,} bytes): neither {' nor '.join(FORMATS)}") from None
    except Exception as error:  # a decoder may stumble over damaged bytes in any way
        raise ValueError(f"not a readable image ({len(encoded):,} bytes): {error}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode of 8 or 16 bits per channel to RGB; what is transparent becomes white."""
    if image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.uint32)
        if "transparency" in image.info:  # the one shade that is; Pillow's own conversion would forget it
            grey[grey == image.info["transparency"]] = 65535
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")  # 257 takes 65,535 to 255
    if image.mode in ("I", "F", "LAB"):
        raise ValueError(f"pixels of mode {image.mode!r} have no fixed range of brightness; convert to 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def fit(image: Image.Image, height: int, width: int, how: Fit = "crop") -> Image.Image:
    """
    Scale so that the shorter side fits and take the centre, antialiased; an image of the right size stays.

    Args:
        how: "inner_crop" scales the shorter side to 8/7 of what fits first, as in "resize to 256, cut out 224".
    """
    if image.size == (width, height):
        return image
    scale = min(image.width / width, image.height / height)
    if how == "inner_crop":
        scale *= INNER_SHARE
    left, top = (image.width - scale * width) / 2, (image.height - scale * height) / 2
    box = (left, top, left + scale * width, top + scale * height)
    return image.resize((width, height), Image.Resampling[INTERPOLATION.upper()], box=box)
