"""Files whose structure costs far more than their pixels: refused before a decoder sees them; real ones are not."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from service import structure
from service.errors import ServiceError
from service.images import decode
from tests.service.conftest import encode
from tests.service.test_images import PIXELS, SPEC, chunk
from tests.tiny import SIZE
from training.data.images import read_image


def jpeg(mode, before=b""):
    """A JPEG with this behind its first marker."""
    data = encode(Image.fromarray(PIXELS).convert(mode), "JPEG")
    return data[:2] + before + data[2:]


def gif(comment=b""):
    """A GIF with this between its palette and its first frame."""
    data = encode(PIXELS, "GIF")
    at = 13 + 3 * 2 ** ((data[10] & 7) + 1)
    return data[:at] + comment + data[at:]


def png(*, chunks):
    """A PNG with so many empty chunks of a private kind."""
    data = encode(PIXELS, "PNG")
    return data[:33] + chunks * chunk(b"abCd", b"") + data[33:]


def tiff(*, strips, big=False):
    """A grey TIFF, one pixel wide, each of whose rows is a strip of its own."""
    size, kind = (8, 16) if big else (4, 4)
    n_entries = 8
    strips_at = (16 + 8 + n_entries * 20 + 8) if big else (8 + 2 + n_entries * 12 + 4)
    entries = [
        (256, kind, 1, 1), (257, kind, 1, strips), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1),
        (273, 3, strips, strips_at), (277, 3, 1, 1), (278, kind, 1, 1),
    ]  # fmt: skip
    if big:
        head = b"II+\0" + struct.pack("<HHQQ", 8, 0, 16, n_entries)
    else:
        head = b"II*\0" + struct.pack("<IH", 8, n_entries)
    directory = b"".join(struct.pack("<HHQQ" if big else "<HHII", *entry) for entry in entries)
    return head + directory + bytes(size) + strips * b"\x08\0"


@pytest.mark.parametrize(
    ("good", "bad", "words"),
    [
        (png(chunks=1000), png(chunks=20_000), "PNG has more than 20,000 chunks; save it in fewer"),
        (
            gif(b"!\xfe" + 9000 * b"\1x" + b"\0"),
            gif(b"!\xfe" + 10_000 * b"\1x" + b"\0"),
            "GIF has more than 10,000 blocks before its first frame; save it in fewer",
        ),
        (gif(1000 * b"\0"), gif(10_001 * b"\0"), "GIF has more than 10,000 blocks"),
        (tiff(strips=1000), tiff(strips=65_537), "TIFF has more than 65,536 strips or tiles; save it in fewer"),
        (tiff(strips=1000, big=True), tiff(strips=65_537, big=True), "TIFF has more than 65,536 strips or tiles"),
        (
            jpeg("CMYK", 900 * b"\xff\xfe\0\2"),
            jpeg("CMYK", 1000 * b"\xff\xfe\0\2"),
            "JPEG has 1,000 markers and stray bytes, or more, before its image; save it anew",
        ),
        (jpeg("CMYK", 900 * b"\xff"), jpeg("CMYK", 1000 * b"\xff"), "JPEG has 1,000 markers"),
        (jpeg("CMYK", b"\xff\xfe\1\0" + bytes(254)), jpeg("CMYK", 1000 * b"\xff\xd0"), "JPEG has 1,000 markers"),
    ],
    ids=["chunks", "comment", "stray bytes", "strips", "big TIFF", "markers", "fill bytes", "without lengths"],
)
def test_what_has_too_many_parts_is_refused(good, bad, words):
    """Pillow reads them one by one, in seconds and gigabytes; as many as real files have are taken."""
    assert decode(good, SPEC, 10**6).shape == (SIZE, SIZE, 3)
    with pytest.raises(ServiceError, match=words) as refusal:
        decode(bad, SPEC, 10**6)
    assert refusal.value.code == "image_unsupported"


def test_a_directory_of_too_many_tags_is_refused():
    """A big TIFF may have as many as there are bytes for."""
    data = b"II+\0" + struct.pack("<HHQQ", 8, 0, 16, 2**40)
    tag = struct.pack("<HHQQ", 305, 2, 1, 0)
    with pytest.raises(ServiceError, match="TIFF has more than 1,000 tags; save it in fewer"):
        decode(data + 1001 * tag, SPEC, 10**6)
    structure.check_structure("TIFF", data + 1000 * tag)


def test_a_tag_of_too_many_values_is_refused():
    """Resolutions come as fractions, each an object of its own; a name may be as long as it likes."""
    resolutions = tiff(strips=1000).replace(struct.pack("<HHI", 277, 3, 1), struct.pack("<HHI", 282, 5, 200_000))
    name = tiff(strips=1000).replace(struct.pack("<HHI", 277, 3, 1), struct.pack("<HHI", 282, 2, 200_000))
    with pytest.raises(ServiceError, match="TIFF has more than 196,608 values in tag 282"):
        structure.check_structure("TIFF", resolutions)
    structure.check_structure("TIFF", name)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "TIFF", "BMP", "WEBP"])
def test_a_file_that_ends_anywhere_is_for_the_decoder_to_judge(kind):
    """Structure refuses nothing that is merely cut short."""
    data = encode(PIXELS, kind)
    for end in range(0, len(data), 7):
        structure.check_structure(kind, data[:end])
        if kind == "JPEG":
            structure.check_head(data[:end])


def test_a_bitmap_of_the_oldest_kind_has_no_compression():
    """Where later headers name one, its palette begins."""
    palette = bytes((1, 0, 0)) * 256
    header = b"BM" + struct.pack("<IHHI", 26 + 768 + 4, 0, 0, 26 + 768) + struct.pack("<IHHHH", 12, 4, 1, 1, 8)
    found = decode(header + palette + bytes(4), SPEC, 1000)
    np.testing.assert_array_equal(found, np.broadcast_to((0, 0, 1), (SIZE, SIZE, 3)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_only_exif_turns_an_image(kind):
    """Pillow would take an orientation from XMP in some formats and not in others."""
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="3"/></x:xmpmeta>'
    image, file = Image.fromarray(PIXELS), io.BytesIO()
    if kind == "PNG":
        text = b"XML:com.adobe.xmp\0\0\0\0\0" + xmp
        data = encode(PIXELS, "PNG")
        data = data[:33] + chunk(b"iTXt", text) + data[33:]
    else:
        options = {"tiffinfo": {700: xmp}} if kind == "TIFF" else {"xmp": xmp}
        image.save(file, kind, **options, **({"lossless": True} if kind == "WEBP" else {}))
        data = file.getvalue()
    with Image.open(io.BytesIO(data)) as opened:
        assert b"Orientation" in str(opened.info).encode()
    np.testing.assert_array_equal(read_image(data, SIZE), decode(data, SPEC, 10**6))
    np.testing.assert_array_equal(
        decode(data, SPEC, 10**6),
        decode(encode(PIXELS, kind, **({"lossless": True} if kind == "WEBP" else {})), SPEC, 10**6),
    )


def test_exif_turns_a_jpeg_wherever_it_stands():
    """Behind large segments of other programs, too; bytes that only look like EXIF do not."""
    exif = Image.Exif()
    exif[0x0112] = 3
    data = encode(PIXELS, "JPEG", exif=exif)
    at, plain = data.index(b"\xff\xe1"), encode(PIXELS, "JPEG")
    segment = data[at : at + 2 + int.from_bytes(data[at + 2 : at + 4])]
    other = b"\xff\xed\xff\xff" + bytes(65533)
    late = plain[:2] + 2 * other + segment + plain[2:]
    comment = plain[:2] + b"\xff\xfe" + (2 + len(segment)).to_bytes(2) + segment + plain[2:]

    np.testing.assert_array_equal(decode(late, SPEC, 10**6), decode(plain, SPEC, 10**6)[::-1, ::-1])
    np.testing.assert_array_equal(read_image(late, SIZE), read_image(plain, SIZE)[::-1, ::-1])
    np.testing.assert_array_equal(decode(comment, SPEC, 10**6), decode(plain, SPEC, 10**6))
