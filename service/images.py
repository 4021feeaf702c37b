"""From the bytes of one image file to the pixels that the trunk takes."""

import io
import math
import struct
from typing import Final

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from model_export.bundle import InputSpec
from service.errors import ServiceError
from service.structure import (
    JPEG_START,
    PNG_START,
    SCANS,
    SMALL_SCANS,
    check_structure,
    exif_of,
    has_more,
    has_plain_chunks,
    orientation_of,
    plain_head,
)

Image.MAX_IMAGE_PIXELS = None  # Pillow would warn at one size and refuse at another; `decode` has the limit

FILTERS: Final = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
# In a PNG whose first chunk is the header, as it must be.
PNG_SIZE_AT, PNG_DEPTH_AT = 16, 24
PNG_SIZE: Final = struct.Struct(">II")  # width, height
INNER_SHARE: Final = 7 / 8  # of the shorter side, in "inner_crop": 224 of 256
SMALL_JPEG: Final = 640 * 480  # pixels that take about a millisecond
SMALL_PNG: Final = 200 * 200
PILLOWS_COLOURS: Final = ("CMYK", "YCCK")  # of JPEGs; libjpeg-turbo would make another RGB of them than trainings see
SMALL_BYTES: Final = 256 * 1024
TIFF_BITS, TIFF_PHOTOMETRIC, TIFF_TILE_WIDTH, TIFF_TILE_LENGTH = 258, 262, 322, 323
WHITE_IS_ZERO: Final = 0
STRIP_PIXELS: Final = 2**18
# Of the limit on pixels: a WebP takes 18 bytes for each and more, others up to 12.
SCARCE: Final = {"WEBP": (0.6, "three fifths of ")}
SCALED_MARGIN: Final = 7  # times the input size; below 6, accuracy moved by more than 0.1 points
XMP: Final = ("xmp", "XML:com.adobe.xmp")
RAW_EXIF: Final = "Raw profile type exif"
# What undoes each EXIF orientation; 1 is upright.
TURNED_BACK: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(data: bytes, spec: InputSpec, max_pixels: int, *, scaled: bool = False) -> NDArray[np.uint8]:
    """
    Decode, turn upright, convert to RGB and resize one image.

    The bytes decide what it is, not a name or declared type. Of an animation the first frame counts. Transparent
    pixels show white. 16-bit grey is scaled to 8 bits.

    Args:
        max_pixels: width x height above which the image is refused before it is decoded.
        scaled: let a JPEG be decoded at a half, quarter or eighth of its size, where that is still seven times as large
            as the input.

    Returns:
        (H, W, 3), contiguous.

    Raises:
        ServiceError: image_unsupported, image_unreadable or image_too_large.
    """
    kind = sniff(data)
    if kind is None:
        raise _no_image(data)
    try:
        check_structure(kind, data)
        image = _decode_jpeg(data, spec, max_pixels, scaled) if kind == "JPEG" else None
        if image is None:
            image = _decode_any(kind, data, max_pixels)
    except (ServiceError, MemoryError):
        raise
    except Exception as error:  # a decoder may stumble over damaged bytes in any way
        raise _unreadable(kind, data, error) from error
    return _fitted(image, spec)


def decode_if_small(data: bytes, spec: InputSpec, max_pixels: int, *, scaled: bool = False) -> NDArray[np.uint8] | None:
    """
    As `decode`, where that takes less time than a hand-over to another thread; None where it does not, or may not.

    None for a damaged JPEG, too: `decode` says what is wrong with it.

    Raises:
        ServiceError: as `decode`.
    """
    if len(data) > SMALL_BYTES:
        return None
    if data.startswith(JPEG_START):
        if has_more(SCANS, data, SMALL_SCANS):
            return None
        image = _decode_jpeg(data, spec, max_pixels, scaled, most_pixels=SMALL_JPEG)
        return None if image is None else _fitted(image, spec)
    if data.startswith(PNG_START) and data[12:16] == b"IHDR" and len(data) >= PNG_SIZE_AT + PNG_SIZE.size:
        width, height = PNG_SIZE.unpack_from(data, PNG_SIZE_AT)
        if width * height <= SMALL_PNG and has_plain_chunks(data):
            return decode(data, spec, max_pixels)
    return None


def _decode_jpeg(
    data: bytes, spec: InputSpec, max_pixels: int, scaled: bool, *, most_pixels: float = math.inf
) -> Image.Image | NDArray[np.uint8] | None:
    """
    By libjpeg-turbo itself, three to ten times as fast as by Pillow; None for what is better left to Pillow.

    Args:
        most_pixels: None for a larger one, too.

    Returns:
        Pixels where they have the input's size already, else an image in RGBX, as Pillow keeps RGB: it need not copy.
    """
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:  # damaged; Pillow decides how badly
        return None
    _check_size("JPEG", width, height, max_pixels)
    if colours in PILLOWS_COLOURS or height * width > most_pixels:
        return None
    exif = exif_of(data)
    try:
        if not exif and (height, width) == (spec.height, spec.width):
            exact: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "RGB")
            return exact
        by = _scale(height, width, spec) if scaled else 1
        pixels = simplejpeg.decode_jpeg(
            data, "RGBX", min_height=math.ceil(height / by), min_width=math.ceil(width / by)
        )
    except ValueError:
        return None
    image = Image.frombuffer("RGBX", (pixels.shape[1], pixels.shape[0]), pixels, "raw", "RGBX", 0, 1)
    return _turn(image, orientation_of(exif))


def _fitted(image: Image.Image | NDArray[np.uint8], spec: InputSpec) -> NDArray[np.uint8]:
    """(H, W, 3), of the input's size; pixels have it already."""
    if isinstance(image, np.ndarray):
        return image
    if image.size != (spec.width, spec.height):
        image = fit(image, spec)
    return np.ascontiguousarray(np.asarray(image)[:, :, :3])


def _scale(height: int, width: int, spec: InputSpec) -> int:
    """By how much a JPEG may be decoded smaller: 1, 2, 4 or 8; what lies between is no faster than its neighbour."""
    least = SCALED_MARGIN * max(spec.height, spec.width)
    return max(by for by in (1, 2, 4, 8) if by == 1 or min(height, width) / by >= least)


def _decode_any(kind: str, data: bytes, max_pixels: int) -> Image.Image:
    file = io.BytesIO(plain_head(data) if kind == "JPEG" else data)
    with Image.open(file, formats=(kind,)) as image:
        _check_size(kind, image.width, image.height, max_pixels)
        bits, negative = 16, False
        if isinstance(image, TiffImageFile):
            tags = image.tag_v2
            tile = tags.get(TIFF_TILE_WIDTH, 0), tags.get(TIFF_TILE_LENGTH, 0)
            _check_size("TIFF with tiles", *tile, max_pixels)  # which are decoded whole
            bits, negative = tags.get(TIFF_BITS, (16,))[0], tags.get(TIFF_PHOTOMETRIC) == WHITE_IS_ZERO
        elif kind == "PNG":
            _widen_transparency(image, depth=data[PNG_DEPTH_AT])
        _forget_xmp(image)
        image.load()  # which turns a TIFF upright
        pixels = to_rgb(image, bits=bits, negative=negative)
        if kind == "TIFF":
            return pixels
        return _turn(pixels, orientation_of(exif_of(data) if kind == "JPEG" else _exif_beside(image)))


def _forget_xmp(image: Image.Image) -> None:
    """For want of an EXIF orientation Pillow turns a TIFF by that of an XMP block; EXIF alone counts."""
    for key in XMP:
        image.info.pop(key, None)


def _widen_transparency(image: Image.Image, depth: int) -> None:
    """Bring the transparent shade or colour of a PNG to the 8 bits that Pillow brings its pixels to; it forgets to."""
    shade = image.info.get("transparency")
    if depth == 16 and isinstance(shade, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in shade)
    elif depth < 8 and isinstance(shade, int) and image.mode == "L":  # with one bit Pillow does it itself
        image.info["transparency"] = shade * 255 // (2**depth - 1)


def _check_size(kind: str, width: int, height: int, max_pixels: int) -> None:
    share, said = SCARCE.get(kind, (1, ""))
    if width * height > share * max_pixels:
        raise ServiceError(
            "image_too_large",
            f"{kind} of {width}x{height} has {width * height:,} pixels, "
            f"the limit is {int(share * max_pixels):,} ({said}RIDE_MAX_PIXELS); send a smaller one",
        )


def _turn(pixels: Image.Image, orientation: int) -> Image.Image:
    return pixels.transpose(TURNED_BACK[orientation]) if orientation in TURNED_BACK else pixels


def sniff(data: bytes) -> str | None:
    """Pillow's name of the format that the first bytes announce; None for what we do not take."""
    if data.startswith(JPEG_START):
        return "JPEG"
    if data.startswith(PNG_START):
        return "PNG"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP"
    if data.startswith(b"BM"):
        return "BMP"
    if data.startswith((b"II*\0", b"MM\0*", b"II+\0")):  # MM\0+ is none that Pillow can read
        return "TIFF"
    return None


def to_rgb(image: Image.Image, *, bits: int = 16, negative: bool = False) -> Image.Image:
    """
    Convert a loaded image of any 8- or 16-bit mode to RGB; what is transparent becomes white.

    Args:
        bits: of grey with more than 8; white is the largest number of so many.
        negative: 0 is white in it. Pillow has turned 8-bit grey itself.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16"):
        shades, white = np.arange(2**16, dtype=np.uint32), 2**bits - 1
        if "transparency" in image.info:  # the one shade that is; Pillow's own conversion would forget it
            shades[shades == image.info["transparency"]] = white
        shades = (255 * np.minimum(shades, white) + white // 2) // white
        table = (255 - shades if negative else shades).astype(np.uint8)
        return Image.fromarray(table[np.asarray(image)]).convert("RGB")
    if image.mode in ("I", "F", "LAB"):
        raise ServiceError(
            "image_unsupported",
            f"{image.format} with pixels of mode {image.mode!r} has no fixed range of brightness here; "
            "send 8 or 16 bits per channel, grey, RGB or CMYK",
        )
    if image.has_transparency_data:
        return _on_white(image if image.mode == "RGBA" else image.convert("RGBA"))
    return image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    """RGBA to RGB, strip by strip: the copies that it takes would be as large as the image, each."""
    opaque = Image.new("RGB", image.size)
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        opaque.paste(Image.alpha_composite(Image.new("RGBA", strip.size, "white"), strip).convert("RGB"), (0, top))
    return opaque


def fit(image: Image.Image, spec: InputSpec) -> Image.Image:
    """Resize an RGB image to the input's size, antialiased: of its centre (crops) or the whole of it ("stretch")."""
    box = (0.0, 0.0, float(image.width), float(image.height))
    if spec.fit != "stretch":
        scale = min(image.width / spec.width, image.height / spec.height) * (1.0 if spec.fit == "crop" else INNER_SHARE)
        width, height = min(image.width, spec.width * scale), min(image.height, spec.height * scale)  # not rounded up
        left, top = (image.width - width) / 2, (image.height - height) / 2
        box = (left, top, left + width, top + height)
    return image.resize((spec.width, spec.height), FILTERS[spec.interpolation], box=box)


def _exif_beside(image: Image.Image) -> bytes:
    """The EXIF block that Pillow found beside a loaded image's pixels; empty where there is none, or a damaged one."""
    if "exif" in image.info:
        return bytes(image.info["exif"])
    _, _, _, *lines = f"{image.info.get(RAW_EXIF, '')}\n\n\n".split("\n")  # as ImageMagick writes it into a PNG
    try:
        return bytes.fromhex("".join(lines))
    except ValueError:
        return b""


def _no_image(data: bytes) -> ServiceError:
    if not data:
        return ServiceError("image_unreadable", "file is empty (0 bytes); was the upload cut short?")
    return ServiceError(
        "image_unsupported",
        f"{len(data):,} bytes that begin with {data[:8]!r} are no known image; send JPEG, PNG, WebP, GIF, BMP or TIFF",
    )


def _unreadable(kind: str, data: bytes, error: Exception) -> ServiceError:
    reason = str(error)
    if not reason or "<" in reason or len(reason) > 120:  # an object's address, or no sentence
        reason = "its content does not fit its header"
    return ServiceError(
        "image_unreadable", f"{kind} of {len(data):,} bytes is damaged ({reason}); was the upload cut short?"
    )
