"""Image files of every kind: the same picture gives the same answer."""

import dataclasses
import io
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps

import training.data.images
from model_export.bundle import InputSpec
from service.errors import ServiceError
from service.images import STRIP_PIXELS, decode, decode_if_small, fit, to_rgb
from tests.service.conftest import encode
from tests.tiny import SIZE, noise

pytestmark = pytest.mark.anyio
PIXELS = noise(1, seed=9)[0]
GREY = PIXELS[:, :, 0]
ALPHA = PIXELS[:, :, 1]
FEW_COLOURS = np.random.default_rng(3).integers(0, 256, (16, 3), dtype=np.uint8)
INDICES = np.random.default_rng(4).integers(0, 16, (SIZE, SIZE), dtype=np.uint8)


def chunk(kind, data):
    """A part of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def deep_png(samples, colour_type, extra=b""):
    """A PNG of 16 bits per sample, which Pillow reads and does not write; samples are (H, W, channels)."""

    height, width = samples.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + extra
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def transparent_chunk(*samples):
    """The colour that a PNG declares transparent."""
    return chunk(b"tRNS", struct.pack(f">{len(samples)}H", *samples))


def palette_image(transparency=None):
    image = Image.frombytes("P", (SIZE, SIZE), INDICES.tobytes())
    image.putpalette(FEW_COLOURS.tobytes())
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


def grey_as_rgb(grey):
    return np.repeat(grey[:, :, None], 3, axis=2)


def on_white(colours, alpha):
    """Compose by the book, in whole numbers, to within one step of what any program rounds to."""
    share = alpha[:, :, None] / 255
    return np.rint(colours * share + 255 * (1 - share)).astype(np.uint8)


WIDE = PIXELS.astype(np.uint16) * 257  # 16 bits that mean the same brightness
LOSSLESS = {
    "png": (encode(PIXELS), PIXELS),
    "png interlaced": (encode(PIXELS, "PNG", interlace=1), PIXELS),
    "bmp": (encode(PIXELS, "BMP"), PIXELS),
    "webp": (encode(PIXELS, "WEBP", lossless=True), PIXELS),
    "tiff": (encode(PIXELS, "TIFF"), PIXELS),
    "tiff lzw": (encode(PIXELS, "TIFF", compression="tiff_lzw"), PIXELS),
    "tiff deflate": (encode(PIXELS, "TIFF", compression="tiff_adobe_deflate"), PIXELS),
    "gif": (encode(palette_image(), "GIF"), FEW_COLOURS[INDICES]),
    "palette png": (encode(palette_image()), FEW_COLOURS[INDICES]),
    "palette tiff": (encode(palette_image(), "TIFF"), FEW_COLOURS[INDICES]),
    "palette bmp": (encode(palette_image(), "BMP"), FEW_COLOURS[INDICES]),
    "grey png": (encode(GREY), grey_as_rgb(GREY)),
    "grey bmp": (encode(GREY, "BMP"), grey_as_rgb(GREY)),
    "grey tiff": (encode(GREY, "TIFF"), grey_as_rgb(GREY)),
    "black and white png": (encode(Image.fromarray(GREY > 127)), grey_as_rgb(np.where(GREY > 127, 255, 0))),
    "black and white tiff": (
        encode(Image.fromarray(GREY > 127), "TIFF", compression="group4"), grey_as_rgb(np.where(GREY > 127, 255, 0))
    ),
    "opaque rgba png": (encode(np.dstack([PIXELS, np.full((SIZE, SIZE), 255, np.uint8)])), PIXELS),
    "invisible rgba png": (
        encode(np.dstack([PIXELS, np.zeros((SIZE, SIZE), np.uint8)])), np.full_like(PIXELS, 255)
    ),
    "half visible rgba png": (
        encode(np.dstack([PIXELS, np.where(ALPHA > 127, 255, 0).astype(np.uint8)])),
        np.where(ALPHA[:, :, None] > 127, PIXELS, 255),
    ),
    "rgba webp": (
        encode(np.dstack([PIXELS, np.where(ALPHA > 127, 255, 0).astype(np.uint8)]), "WEBP", lossless=True, exact=True),
        np.where(ALPHA[:, :, None] > 127, PIXELS, 255),
    ),
    "rgba tiff": (
        encode(np.dstack([PIXELS, np.where(ALPHA > 127, 255, 0).astype(np.uint8)]), "TIFF"),
        np.where(ALPHA[:, :, None] > 127, PIXELS, 255),
    ),
    "grey and alpha png": (
        encode(Image.fromarray(np.dstack([GREY, np.where(ALPHA > 127, 255, 0).astype(np.uint8)]))),
        grey_as_rgb(np.where(ALPHA > 127, GREY, 255)),
    ),
    "palette png with a transparent colour": (
        encode(palette_image(3), transparency=3), np.where((INDICES == 3)[:, :, None], 255, FEW_COLOURS[INDICES])
    ),
    "gif with a transparent colour": (
        encode(palette_image(3), "GIF", transparency=3), np.where((INDICES == 3)[:, :, None], 255, FEW_COLOURS[INDICES])
    ),
    "rgb png with a transparent colour": (
        encode(PIXELS, transparency=tuple(PIXELS[2, 2].tolist())),
        np.where((PIXELS[2, 2] == PIXELS).all(axis=2, keepdims=True), 255, PIXELS),
    ),
    "cmyk tiff": (encode(Image.fromarray(255 - PIXELS).convert("CMYK"), "TIFF"), 255 - PIXELS),
    "16-bit grey png": (encode(Image.fromarray(WIDE[:, :, 0])), grey_as_rgb(GREY)),
    "16-bit grey tiff": (encode(Image.fromarray(WIDE[:, :, 0]), "TIFF"), grey_as_rgb(GREY)),
    "16-bit grey png with a transparent shade": (
        deep_png(WIDE[:, :, :1], 0, transparent_chunk(WIDE[2, 2, 0])),
        grey_as_rgb(np.where(GREY[2, 2] == GREY, 255, GREY)),
    ),
    "16-bit rgb png": (deep_png(WIDE, 2), PIXELS),
    "16-bit rgba png": (
        deep_png(np.dstack([WIDE, np.where(ALPHA > 127, 65535, 0)]), 6), np.where(ALPHA[:, :, None] > 127, PIXELS, 255)
    ),
    "16-bit grey and alpha png": (
        deep_png(np.dstack([WIDE[:, :, 0], np.where(ALPHA > 127, 65535, 0)]), 4),
        grey_as_rgb(np.where(ALPHA > 127, GREY, 255)),
    ),
    "animated gif": (
        encode(palette_image(), "GIF", save_all=True, append_images=[Image.new("P", (SIZE, SIZE))]),
        FEW_COLOURS[INDICES],
    ),
    "animated webp": (
        encode(PIXELS, "WEBP", save_all=True, append_images=[Image.new("RGB", (SIZE, SIZE))], lossless=True), PIXELS
    ),
    "animated png": (encode(PIXELS, save_all=True, append_images=[Image.new("RGB", (SIZE, SIZE))]), PIXELS),
    "big tiff": (encode(PIXELS, "TIFF", big_tiff=True), PIXELS),
    "tiff pages": (encode(PIXELS, "TIFF", save_all=True, append_images=[Image.new("RGB", (SIZE, SIZE))]), PIXELS),
}  # fmt: skip


def predictions(response):
    assert response.status_code == 200, response.text
    (result,) = response.json()["results"]
    return result["predictions"], result["router_scores"]


@pytest.mark.parametrize("name", LOSSLESS)
async def test_every_lossless_kind_gives_the_answer_of_its_pixels(service, name):
    """Format, mode, depth, palette and transparency make no difference: the answer is that of the plain RGB PNG."""
    data, pixels = LOSSLESS[name]
    found = await service.client.post("/classify", content=data)
    plain = await service.client.post("/classify", content=encode(np.asarray(pixels, np.uint8)))

    assert predictions(found) == predictions(plain)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "YCCK"])
async def test_a_jpeg_gives_the_answer_of_its_decoded_pixels(service, mode):
    """Also progressive, grey, CMYK, and the YCCK that Photoshop makes of it."""
    data = encode(Image.fromarray(PIXELS).convert(mode.replace("YCCK", "CMYK")), "JPEG", quality=90, progressive=True)
    if mode == "YCCK":  # the same numbers, read as YCCK
        data = data.replace(b"Adobe\0d\0\0\0\0\0", b"Adobe\0d\0\0\0\0\2")
        assert simplejpeg.decode_jpeg_header(data)[2] == "YCCK"
    with Image.open(io.BytesIO(data)) as image:
        pixels = np.asarray(image.convert("RGB"))
    found = await service.client.post("/classify", content=data)
    plain = await service.client.post("/classify", content=encode(pixels))

    assert predictions(found) == predictions(plain)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
async def test_a_rotated_picture_is_turned_upright(service, kind, orientation):
    """Each of the eight EXIF orientations, wherever the format keeps it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    found = await service.client.post("/classify", content=encode(PIXELS, kind, exif=exif, **options))
    image = Image.fromarray(PIXELS)
    image.getexif()[0x0112] = orientation
    upright = await service.client.post("/classify", content=encode(np.asarray(ImageOps.exif_transpose(image))))

    assert predictions(found) == predictions(upright)


async def test_a_rotated_photograph_is_turned_before_it_is_cut(service):
    """A JPEG that lies on its side gives nearly the pixels of the upright one; the rest is JPEG's loss."""
    upright = np.zeros((32, 16, 3), np.uint8)
    upright[:16] = (250, 120, 0)  # the upper half
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn it clockwise to look at it
    lying = np.rot90(upright)
    spec = InputSpec(SIZE, SIZE, "crop", "bilinear", (0.5,) * 3, (0.5,) * 3)

    found = decode(encode(np.ascontiguousarray(lying), "JPEG", quality=100, subsampling=0, exif=exif), spec, 10_000)
    assert np.abs(found.astype(int) - decode(encode(upright), spec, 10_000)).max() <= 4


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow's, which the service logs
@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0II*\0garbage", b"Exif\0\0" + bytes(range(200))])
async def test_a_damaged_exif_block_spoils_nothing(service, exif):
    """The pixels are still good: upright it is."""
    found = await service.client.post("/classify", content=encode(PIXELS, "JPEG", exif=exif))
    plain = await service.client.post("/classify", content=encode(PIXELS, "JPEG"))

    assert predictions(found) == predictions(plain)


SPEC = InputSpec(SIZE, SIZE, "crop", "bilinear", (0.5,) * 3, (0.5,) * 3)


def photograph(width, height, **options):
    """A JPEG with something to see in it."""
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([rows % 251, columns % 241, (rows * columns) % 239], axis=2).astype(np.uint8)
    return encode(pixels, "JPEG", quality=90, **options)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True}])
def test_libjpeg_turbo_gives_the_pixels_that_training_saw(mode, options):
    """Bit for bit what Pillow decodes and resizes, whichever of the two decoded here."""
    rng = np.random.default_rng(1)
    data = encode(Image.fromarray(rng.integers(0, 256, (61, 83, 3), np.uint8)).convert(mode), "JPEG", **options)
    with Image.open(io.BytesIO(data)) as image:
        expected = fit(image.convert("RGB"), SPEC)

    np.testing.assert_array_equal(decode(data, SPEC, 10_000), np.asarray(expected))


@pytest.mark.parametrize("shape", [(1, 9), (2, STRIP_PIXELS), (2, STRIP_PIXELS + 9), (2 * STRIP_PIXELS // 99 + 7, 99)])
def test_transparency_is_laid_on_white_strip_by_strip(shape):
    """With the same pixels as all at once, whichever strip they fall into; a strip has a row at least."""
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 4), np.uint8)
    image = Image.fromarray(pixels, "RGBA")
    expected = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")

    np.testing.assert_array_equal(np.asarray(to_rgb(image)), np.asarray(expected))


@pytest.mark.parametrize(
    ("mode", "kind"),
    [*((mode, "PNG") for mode in ("RGB", "RGBA", "P", "I;16")), ("CMYK", "TIFF"), ("RGB", "WEBP"), ("RGBA", "WEBP")],
)
def test_decoding_takes_no_more_memory_than_its_setting_says(mode, kind):
    """Twelve bytes a pixel of the largest image, whatever its mode, beside what the process has."""
    height = 1500 if kind == "WEBP" else 2500
    script = DECODE_LARGEST.format(mode=mode, kind=kind, height=height)
    before, after = map(
        int, subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout.split()
    )

    assert (after - before) * 1024 < 12 * 4000 * 2500


DECODE_LARGEST = """
import io, resource
import numpy as np
from PIL import Image
from service.images import decode
from model_export.bundle import InputSpec
file, spec = io.BytesIO(), InputSpec(32, 32, "crop", "bilinear", (0.5,) * 3, (0.5,) * 3)
Image.new("{mode}", (100, 100)).save(file, "{kind}")
decode(file.getvalue(), spec, 10**7)
image = Image.new("{mode}", (4000, {height}))
if "{mode}" == "P":
    image.info["transparency"] = 0
file = io.BytesIO()
image.save(file, "{kind}")
del image
open("/proc/self/clear_refs", "w").write("5")
peak = lambda: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(peak())
decode(file.getvalue(), spec, 10**7)
print(peak())
"""


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_scaled_photograph_is_nearly_the_same_and_upright(orientation):
    """Decoded at a fraction of its size, it differs by little; a small one is not scaled at all."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = photograph(1200, 800, exif=exif)
    plain, scaled = (decode(data, SPEC, 10**6, scaled=scaled).astype(int) for scaled in (False, True))
    assert 0 < np.abs(plain - scaled).mean() < 3

    small = photograph(SIZE * 13, SIZE * 20)
    for spec in (SPEC, dataclasses.replace(SPEC, height=SIZE // 4)):  # the longer side of the input counts
        np.testing.assert_array_equal(decode(small, spec, 10**6), decode(small, spec, 10**6, scaled=True))


def is_small(data):
    """Whether it is decoded at once; then as elsewhere."""
    pixels = decode_if_small(data, SPEC, 1_000_000, scaled=True)
    if pixels is None:
        return False
    np.testing.assert_array_equal(pixels, decode(data, SPEC, 1_000_000, scaled=True))
    return True


def test_of_a_small_jpeg_only_its_size_is_refused_at_once():
    """What else is wrong is said by whoever decodes it in a thread."""
    data = encode(PIXELS, "JPEG")
    assert not is_small(data[: len(data) // 2])
    with pytest.raises(ServiceError, match="JPEG of 8x8 has 64 pixels, the limit is 63"):
        decode_if_small(data, SPEC, 63)


def test_what_takes_long_to_decode_is_not_small():
    """By the header, whatever the file's size; what cannot be told is not."""
    blank = np.zeros((1000, 1000, 3), np.uint8)
    assert is_small(photograph(640, 480))
    assert is_small(encode(PIXELS, "PNG"))
    cmyk = encode(Image.fromarray(PIXELS).convert("CMYK"), "JPEG")  # which Pillow reads, with all that is before it
    large = encode(blank, "JPEG"), encode(blank, "PNG")
    for data in (*large, cmyk, encode(PIXELS, "GIF"), b"", b"\xff\xd8\xff", b"\x89PNG"):
        assert not is_small(data)


@pytest.mark.parametrize(
    "extra",
    [
        chunk(b"zTXt", b"a\0\0" + zlib.compress(b"a" * 10**6)),
        chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(b"a" * 10**6)),
        chunk(b"eXIf", b"MM\0*" + 100 * b"\xff"),
        40 * chunk(b"tIME", b""),
        chunk(b"tIME", b"")[:-4] + b"\0",
    ],
    ids=["compressed text", "international text", "tags", "many chunks", "chunks out of step"],
)
def test_a_png_with_more_than_pixels_is_not_small(extra):
    """What takes no time by its size takes it by its other content, which only the decoder looks at."""
    data = encode(PIXELS, "PNG")
    assert is_small(data)
    assert not is_small(data[:33] + extra + data[33:])


@pytest.mark.parametrize("mode", ["RGB", "CMYK"])  # libjpeg-turbo reads the one, Pillow the other
def test_a_jpeg_of_many_exif_segments_is_turned_as_the_first_one_says(mode):
    """Phones write several."""
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\x06\0\0\0\0\0\0"
    data = encode(Image.fromarray(PIXELS).convert(mode), "JPEG", exif=exif)
    at = data.index(b"\xff\xe1")
    segment = data[at : at + 2 + int.from_bytes(data[at + 2 : at + 4])]
    turned = decode(data[:at] + segment + 99 * segment.replace(b"\6", b"\3") + data[at + len(segment) :], SPEC, 1000)

    np.testing.assert_array_equal(turned, np.rot90(decode(data[:at] + data[at + len(segment) :], SPEC, 1000), 3))


@pytest.mark.parametrize("compression", [1, 2])
def test_a_bmp_of_run_lengths_is_refused(compression):
    """Of 8 or 4 bits; a few bytes of it may be a million pixels, one by one."""
    data = bytearray(encode(PIXELS, "BMP"))
    assert decode(bytes(data), SPEC, 1000).shape == (SIZE, SIZE, 3)
    data[30] = compression
    with pytest.raises(ServiceError, match="run-length encoded BMP; save it without compression, or as PNG"):
        decode(bytes(data), SPEC, 1000)


def test_a_webp_may_have_three_fifths_of_the_pixels():
    """It takes half as much memory again for each."""
    data = encode(PIXELS, "WEBP")
    assert decode(data, SPEC, 5 * SIZE * SIZE // 3 + 1).shape == (SIZE, SIZE, 3)
    with pytest.raises(ServiceError, match=r"the limit is \d+ \(three fifths of RIDE_MAX_PIXELS\)"):
        decode(data, SPEC, 5 * SIZE * SIZE // 3 - 2)


def with_scans(count, ending=b""):
    """A progressive JPEG whose last scan comes so often, and what follows it."""
    data = encode(PIXELS, "JPEG", progressive=True)
    last, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
    return data[:last] + count * data[last:end] + data[end:] + ending


def test_a_jpeg_of_too_many_scans_is_refused_before_it_is_decoded():
    """Each takes as long as the image is large; as many as real files have are taken, and decoded elsewhere if many."""
    assert decode(with_scans(80), SPEC, 1000).shape == (SIZE, SIZE, 3)
    with pytest.raises(ServiceError, match="JPEG has more than 100 scans") as refusal:
        decode(with_scans(100), SPEC, 1000)
    assert refusal.value.code == "image_unsupported"
    first = with_scans(100).index(b"\xff\xda")
    with pytest.raises(ServiceError, match="JPEG has more than 100 scans"):  # TEM is a marker without a length
        decode(with_scans(100)[:first] + b"\xff\x01" + with_scans(100)[first:], SPEC, 1000)
    assert is_small(with_scans(1))
    assert not is_small(with_scans(20))


def test_what_follows_a_jpeg_is_not_mistaken_for_scans():
    """Phones append a video, whose bytes are any."""
    video = 30_000 * b"\xff\xda\0\x0c"
    np.testing.assert_array_equal(decode(with_scans(1, video), SPEC, 1000), decode(with_scans(1), SPEC, 1000))


def test_a_small_file_is_one_whose_header_says_so():
    """Not one of many bytes, nor a PNG that does not begin with its header."""
    hidden = encode(PIXELS, "PNG")
    hidden = hidden[:8] + chunk(b"teXt", b"") + hidden[8:]
    assert not is_small(hidden)
    assert not is_small(photograph(64, 64) + bytes(300_000))


def fitted(pixels, height, width, fit="crop", interpolation="bilinear"):
    spec = InputSpec(height, width, fit, interpolation, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    return decode(encode(pixels), spec, 1_000_000)


def test_crop_takes_the_centre_and_stretch_takes_all():
    """Of a wide image, of a high one, and for an input that is itself not square."""
    wide = noise(1)[0].repeat(3, axis=1)  # 8x24
    wide[:, 8:16] = PIXELS
    assert (fitted(wide, SIZE, SIZE) == PIXELS).all()
    assert (fitted(wide.transpose(1, 0, 2).copy(), SIZE, SIZE) == PIXELS.transpose(1, 0, 2)).all()
    assert (fitted(wide, 4, 12) == np.asarray(Image.fromarray(wide).resize((12, 4), Image.Resampling.BILINEAR))).all()

    thirds = np.zeros((8, 24, 3), np.uint8)
    thirds[:, 8:16] = 255
    assert fitted(thirds, 4, 4)[:, 1:3].min() == 255  # the middle third alone
    assert fitted(thirds, 4, 4, "stretch")[:, [0, 3]].max() < 60  # the black thirds as well


@pytest.mark.parametrize("side", [224, 299])
def test_an_image_of_any_size_is_cropped(side):
    """As in training; scale times side may be rounded up, beyond the image, as for 225x300 at 224."""
    spec = InputSpec(side, side, "crop", "bilinear", (0.5,) * 3, (0.2,) * 3)
    pixels = np.random.default_rng(side).integers(0, 256, (933, 700, 3), dtype=np.uint8)
    for shorter in (225, 450, *range(1, 700, 7)):
        image = Image.fromarray(pixels[: 4 * shorter // 3, :shorter])
        for turned in (image, image.transpose(Image.Transpose.ROTATE_90)):
            served = np.asarray(fit(turned, spec))
            np.testing.assert_array_equal(served, np.asarray(training.data.images.fit(turned, side, side)))
            assert served.shape == (side, side, 3)


def test_our_own_failure_is_not_blamed_on_the_image(monkeypatch):
    """It is for the log, and a 500: the client can do nothing about it."""

    def fail(image, spec):
        raise ValueError("no box")

    monkeypatch.setattr("service.images.fit", fail)
    for kind in ("PNG", "JPEG"):
        with pytest.raises(ValueError, match="no box"):
            decode(encode(noise(1)[0].repeat(3, axis=1), kind), SPEC, 1_000_000)

    def lack(*_, **__):
        raise MemoryError

    monkeypatch.setattr("service.images.to_rgb", lack)
    with pytest.raises(MemoryError):
        decode(encode(PIXELS), SPEC, 1_000_000)


def test_scaling_is_antialiased_and_enlarging_works():
    """A fine checkerboard becomes grey, not black or white; one pixel becomes a whole image; both filters are known."""
    checkerboard = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    for interpolation in ("bilinear", "bicubic"):
        small = fitted(grey_as_rgb(checkerboard), SIZE, SIZE, interpolation=interpolation)
        assert np.abs(small.astype(int) - 127).max() <= 2
    assert (fitted(np.full((1, 1, 3), 77, np.uint8), SIZE, SIZE) == 77).all()
    step = np.zeros((16, 16, 3), np.uint8)
    step[:, 8:] = 200
    assert not (fitted(step, SIZE, SIZE) == fitted(step, SIZE, SIZE, interpolation="bicubic")).all()


def test_sixteen_bit_grey_is_rounded_to_the_nearest_of_256_shades():
    """As a division by 257 would be."""
    shades = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(SIZE, SIZE)
    spec = InputSpec(SIZE, SIZE, "crop", "bilinear", (0.5,) * 3, (0.5,) * 3)

    assert (decode(encode(Image.fromarray(shades)), spec, 1000)[:, :, 0] == np.rint(shades / 257)).all()


def tiff(tags, data):
    """A little-endian TIFF of these tags, (kind, value) by number; data begins at byte 8. Pillow writes no such."""
    entries = b"".join(
        struct.pack("<HHI", tag, kind, 1) + struct.pack("<I", value) for tag, (kind, value) in sorted(tags.items())
    )
    directory = struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory


def grey_tiff(samples, bits, photometric):
    """Of SIZE x SIZE samples, one strip; 12-bit samples are packed."""
    if bits == 16:
        data = samples.astype("<u2").tobytes()
    else:
        pairs = samples.reshape(-1, 2).astype(np.uint32)
        packed = (pairs[:, 0] << 12) | pairs[:, 1]
        data = np.stack([packed >> 16, packed >> 8 & 255, packed & 255], axis=1).astype(np.uint8).tobytes()
    size = (3, SIZE)
    return tiff({
        256: size, 257: size, 258: (3, bits), 259: (3, 1), 262: (3, photometric), 273: (4, 8), 277: (3, 1),
        278: size, 279: (4, len(data)),
    }, data)  # fmt: skip


@pytest.mark.parametrize(("bits", "photometric"), [(16, 1), (16, 0), (12, 1)])
def test_deep_grey_of_a_tiff_runs_from_black_to_white(bits, photometric):
    """Whatever number is white in it, and also where 0 is."""
    samples = np.linspace(0, 2**bits - 1, SIZE * SIZE).round().reshape(SIZE, SIZE)
    found = decode(grey_tiff(samples, bits, photometric), SPEC, 1000)[:, :, 0].astype(int)
    expected = np.rint(255 * samples / (2**bits - 1))

    np.testing.assert_array_equal(found, expected if photometric else 255 - expected)


def test_a_tiff_of_enormous_tiles_is_refused_by_its_header():
    """A tile is decoded whole, however little of it the image shows."""
    one, side = (3, 1), (3, 32768)
    tags = {256: one, 257: one, 258: (3, 8), 259: (3, 8), 262: one, 277: one, 322: side, 323: side}
    data = zlib.compress(bytes(32768))
    with pytest.raises(ServiceError, match="TIFF with tiles of 32768x32768 has 1,073,741,824 pixels") as refusal:
        decode(tiff(tags | {324: (4, 8), 325: (4, len(data))}, data), SPEC, 10**6)
    assert refusal.value.code == "image_too_large"


def grey_png_of_4_bits():
    """Its shade 7 is transparent."""
    header = struct.pack(">IIBBBBB", SIZE, SIZE, 4, 0, 0, 0, 0)
    rows = b"".join(b"\0" + (b"\x70" if row == 0 else b"\x30") + b"\x33" * (SIZE // 2 - 1) for row in range(SIZE))
    parts = chunk(b"IHDR", header), transparent_chunk(7), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_transparency_of_a_png_follows_its_depth():
    """16-bit colours, and grey of less than 8 bits: the colour that is transparent shows white."""
    colours = np.full((SIZE, SIZE, 3), 0x4000, np.uint16)
    colours[0, 0] = (0x1234, 0x8000, 0x4000)
    found = decode(deep_png(colours, 2, transparent_chunk(0x1234, 0x8000, 0x4000)), SPEC, 1000)
    assert (found[0, 0].tolist(), found[1, 1].tolist()) == ([255] * 3, [0x40] * 3)

    found = decode(grey_png_of_4_bits(), SPEC, 1000)
    assert (found[0, 0].tolist(), found[1, 2].tolist()) == ([255] * 3, [0x33] * 3)


def test_partly_transparent_pixels_are_mixed_with_white():
    """By their share, to within one step of rounding."""
    spec = InputSpec(SIZE, SIZE, "crop", "bilinear", (0.5,) * 3, (0.5,) * 3)
    found = decode(encode(np.dstack([PIXELS, ALPHA])), spec, 1000)

    assert np.abs(found.astype(int) - on_white(PIXELS, ALPHA)).max() <= 1


LARGE = {kind: encode(np.zeros((10, 11, 3), np.uint8), kind) for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF")}


@pytest.mark.parametrize("kind", LARGE)
def test_an_image_with_too_many_pixels_is_refused_by_its_header(kind):
    """One pixel above the limit; at the limit it is taken."""
    spec = InputSpec(SIZE, SIZE, "crop", "bilinear", (0.5,) * 3, (0.5,) * 3)
    assert decode(LARGE[kind], spec, 110).shape == (SIZE, SIZE, 3)
    with pytest.raises(
        ServiceError, match=f"{kind} of 11x10 has 110 pixels, the limit is 109 .RIDE_MAX_PIXELS."
    ) as found:
        decode(LARGE[kind], spec, 109)
    assert found.value.code == "image_too_large"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
async def test_a_truncated_image_of_any_kind_is_unreadable(service, kind, share):
    """422, with the kind, the size and the likely reason."""
    whole = encode(noise(1)[0].repeat(8, axis=0).repeat(8, axis=1), kind)
    data = whole[: int(len(whole) * share)]
    response = await service.client.post("/classify", content=data)

    assert (response.status_code, response.json()["error"]["code"]) == (422, "image_unreadable")
    assert response.json()["error"]["message"].startswith(f"{kind} of {len(data):,} bytes is damaged (")


NOT_IMAGES = {
    "text": b"Dear Sir or Madam",
    "pdf": b"%PDF-1.7\n",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "ppm": b"P6 1 1 255 \0\0\0",
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n",
    "zip": b"PK\x03\x04" + bytes(30),
    "ico": encode(Image.new("RGB", (16, 16)), "ICO"),
    "heif": b"\0\0\0\x18ftypheic",
    "tiff of real numbers": encode(Image.fromarray(np.zeros((SIZE, SIZE), np.float32)), "TIFF"),
    "tiff of 32-bit numbers": encode(Image.fromarray(np.zeros((SIZE, SIZE), np.int32)), "TIFF"),
    "tiff in Lab colours": encode(Image.new("LAB", (SIZE, SIZE)), "TIFF"),
}


@pytest.mark.parametrize("name", NOT_IMAGES)
async def test_what_is_no_image_that_we_take_is_unsupported(service, name):
    """415, whatever the declared type, and with what would do."""
    response = await service.client.post("/classify", content=NOT_IMAGES[name], headers={"content-type": "image/png"})

    assert (response.status_code, response.json()["error"]["code"]) == (415, "image_unsupported")
    assert "; send " in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "name", ["png", "webp", "tiff", "gif", "bmp", "palette png", "16-bit rgb png", "animated webp"]
)
def test_damaged_bytes_never_do_more_than_fail(name):
    """Whatever is changed in a file: pixels of the right shape come out, or a refusal that says which kind it was."""
    data, spec = LOSSLESS[name][0], InputSpec(SIZE, SIZE, "crop", "bilinear", (0.5,) * 3, (0.5,) * 3)
    random = np.random.default_rng(0)
    codes = set()
    for _ in range(200):
        damaged = bytearray(data)
        for place in random.integers(0, len(data), random.integers(1, 6)):
            damaged[place] = random.integers(256)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's, about what it could read all the same
                assert decode(bytes(damaged), spec, 100_000).shape == (SIZE, SIZE, 3)
        except ServiceError as error:
            codes.add(error.code)
    assert "image_unreadable" in codes
    assert codes <= {"image_unreadable", "image_unsupported", "image_too_large"}
