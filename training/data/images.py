"""One image file to the pixels that the network sees. The service has the same rules; a test holds them equal."""

from __future__ import annotations

import io
from typing import Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

Fit = Literal["crop", "inner_crop"]
INTERPOLATION: Literal["bilinear"] = "bilinear"
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 200_000_000
PNG_DEPTH_AT = 24  # in a file whose first chunk is the header, as it must be
TIFF_BITS, TIFF_PHOTOMETRIC = 258, 262
WHITE_IS_ZERO = 0
XMP = ("xmp", "XML:com.adobe.xmp")
INNER_SHARE = 7 / 8  # of the shorter side, in "inner_crop": 224 of 256

Image.MAX_IMAGE_PIXELS = None  # Pillow would warn at one size and refuse at another; `refuse_large` has the limit


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
            refuse_large(image)
            bits, negative = 16, False
            if isinstance(image, TiffImageFile):
                tags = image.tag_v2
                bits, negative = tags.get(TIFF_BITS, (16,))[0], tags.get(TIFF_PHOTOMETRIC) == WHITE_IS_ZERO
            elif image.format == "PNG":
                _widen_transparency(image, depth=encoded[PNG_DEPTH_AT])
            _forget_xmp(image)
            image.load()  # which turns a TIFF upright
            _forget_xmp(image)  # that of a PNG may come behind its pixels
            return to_rgb(ImageOps.exif_transpose(image), bits=bits, negative=negative)
    except UnidentifiedImageError:
        raise ValueError(f"not a readable image ({len(encoded):,} bytes): neither {' nor '.join(FORMATS)}") from None
    except Exception as error:  # a decoder may stumble over damaged bytes in any way
        raise ValueError(f"not a readable image ({len(encoded):,} bytes): {error}") from error


def refuse_large(image: Image.Image) -> None:
    """
    Refuse an image with too many pixels.

    Raises:
        ValueError: for more than 200 million pixels.
    """
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width}x{image.height} is more than {MAX_PIXELS:,} pixels; scale it down")


def _forget_xmp(image: Image.Image) -> None:
    """For want of an EXIF orientation Pillow takes that of an XMP block, where it looks for one; EXIF alone counts."""
    for key in XMP:
        image.info.pop(key, None)


def _widen_transparency(image: Image.Image, depth: int) -> None:
    """Bring the transparent shade or colour of a PNG to the 8 bits that Pillow brings its pixels to; it forgets to."""
    shade = image.info.get("transparency")
    if depth == 16 and isinstance(shade, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in shade)
    elif depth < 8 and isinstance(shade, int) and image.mode == "L":  # with one bit Pillow does it itself
        image.info["transparency"] = shade * 255 // (2**depth - 1)


def to_rgb(image: Image.Image, *, bits: int = 16, negative: bool = False) -> Image.Image:
    """
    Any mode of 8 or 16 bits per channel to RGB; what is transparent becomes white.

    Args:
        bits: of grey with more than 8; white is the largest number of so many.
        negative: 0 is white in it. Pillow has turned 8-bit grey itself.
    """
    if image.mode.startswith("I;16"):
        grey, white = np.asarray(image).astype(np.uint32), 2**bits - 1
        if "transparency" in image.info:  # the one shade that is; Pillow's own conversion would forget it
            grey[grey == image.info["transparency"]] = white
        grey = (255 * np.minimum(grey, white) + white // 2) // white
        return Image.fromarray((255 - grey if negative else grey).astype(np.uint8)).convert("RGB")
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
    taken = min(image.width, scale * width), min(image.height, scale * height)  # not rounded up
    left, top = (image.width - taken[0]) / 2, (image.height - taken[1]) / 2
    box = (left, top, left + taken[0], top + taken[1])
    return image.resize((width, height), Image.Resampling[INTERPOLATION.upper()], box=box)
