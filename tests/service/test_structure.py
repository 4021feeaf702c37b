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
        (
            png(chunks=1000) + bytes(12 * 20_000),
            png(chunks=20_000),
            "PNG has more than 20,000 chunks; save it in fewer",
        ),
        (
            gif(b"!\xfe" + 9990 * b"\1x" + b"\0"),
            gif(b"!\xfe" + 10_000 * b"\1x" + b"\0"),
            "GIF has more than 10,000 blocks before its first frame; save it in fewer",
        ),
        (gif(1000 * b"\0") + bytes(10_000), gif(10_001 * b"\0"), "GIF has more than 10,000 blocks"),
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
    """
    Pillow reads them one by one, in seconds and gigabytes; as many as real files have are taken.

    A palette and what follows the end are none.
    """
    assert decode(good, SPEC, 10**6).shape == (SIZE, SIZE, 3)
    with pytest.raises(ServiceError, match=words) as refusal:
        decode(bad, SPEC, 10**6)
    assert refusal.value.code == "image_unsupported"


@pytest.mark.parametrize("number", structure.TIFF_PIECES)
def test_strips_and_tiles_are_counted_by_places_and_by_sizes(number):
    """Pillow reads all four lists."""
    pieces = [struct.pack("<HHI", number, 4, count) for count in (65_536, 65_537)]
    few, many = (tiff(strips=1000).replace(struct.pack("<HHI", 277, 3, 1), each) for each in pieces)
    structure.check_structure("TIFF", few)
    with pytest.raises(ServiceError, match="TIFF has more than 65,536 strips or tiles"):
        structure.check_structure("TIFF", many)


def test_a_gif_without_a_palette_for_all_frames_begins_at_once():
    """Whatever its other flags say."""
    head = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x77, 0, 0)
    structure.check_structure("GIF", head + 10_000 * b"\0")
    with pytest.raises(ServiceError, match="GIF has more than 10,000 blocks"):
        structure.check_structure("GIF", head + 10_001 * b"\0")


def test_exif_is_not_looked_for_without_end():
    """Behind 1,000 markers it turns nothing; each stray byte counts as one."""
    exif = b"\xff\xe1\0\x0aExif\0\0MM"
    assert structure.exif_of(jpeg("RGB", 998 * b"\xff" + exif)) == exif[4:]
    assert structure.exif_of(jpeg("RGB", 1000 * b"\xff" + exif)) == b""


def test_a_directory_of_too_many_tags_is_refused():
    """A big TIFF may have as many as there are bytes for."""
    data = b"II+\0" + struct.pack("<HHQQ", 8, 0, 16, 2**40)
    tag = struct.pack("<HHQQ", 305, 2, 1, 0)
    with pytest.raises(ServiceError, match="TIFF has more than 1,000 tags; save it in fewer"):
        decode(data + 1001 * tag, SPEC, 10**6)
    structure.check_structure("TIFF", data + 1000 * tag)


def test_a_tag_of_too_many_values_is_refused():
    """A name may be as long as it likes; fractions, each an object of its own, are expected to be few."""

    def with_tag(value_type, count):
        return tiff(strips=1000).replace(struct.pack("<HHI", 277, 3, 1), struct.pack("<HHI", 282, value_type, count))

    for value_type, count, limit in ((3, 200_000, "196,608"), (5, 5000, "4,096"), (10, 5000, "4,096")):
        with pytest.raises(ServiceError, match=f"TIFF has more than {limit} values in tag 282; save it in fewer"):
            structure.check_structure("TIFF", with_tag(value_type, count))
    structure.check_structure("TIFF", with_tag(3, 190_000))
    structure.check_structure("TIFF", with_tag(2, 200_000))


def with_directory(inner, pointer=34665, value_type=4, big=False, order="<"):
    """A TIFF that refers to a further directory of these entries: number, type, count, value."""
    width, entry, counter = (8, "<HHQQ", "<Q") if big else (4, order + "HHII", order + "H")
    start = b"II*\0" if order == "<" else b"MM\0*"
    data = (b"II+\0" + struct.pack("<HHQ", 8, 0, 16)) if big else (start + struct.pack(order + "I", 8))
    inner_at = len(data) + struct.calcsize(counter) + struct.calcsize(entry) + width
    data += struct.pack(counter, 1) + struct.pack(entry, pointer, value_type, 1, inner_at) + bytes(width)
    return data + struct.pack(counter, len(inner)) + b"".join(struct.pack(entry, *each) for each in inner)


@pytest.mark.parametrize("layout", [{}, {"big": True}, {"order": ">"}], ids=["usual", "big", "other byte order"])
@pytest.mark.parametrize("pointer", structure.TIFF_DIRECTORIES)
def test_what_a_directory_refers_to_is_limited_as_well(pointer, layout):
    """Pillow makes objects of all that is in the directories of EXIF, GPS and interoperability; bytes stay bytes."""
    fractions = with_directory([(50_000 + n, 5, 4096, 0) for n in range(5)], pointer, **layout)
    with pytest.raises(ServiceError, match=f"16,384 values in the directory of tag {pointer}; save it in fewer"):
        structure.check_structure("TIFF", fractions)
    with pytest.raises(ServiceError, match=f"1,000 tags or .* in the directory of tag {pointer}"):
        structure.check_structure("TIFF", with_directory(1001 * [(305, 2, 1, 0)], pointer, **layout))
    with pytest.raises(ServiceError, match=f"TIFF's tag {pointer} is no offset; save it anew"):
        structure.check_structure("TIFF", with_directory([], pointer, value_type=3, **layout))
    few = [(37500, 7, 10**6, 0), (33434, 5, 1, 0)]
    for value_type in (4, 13):  # a number, and what TIFF calls an offset to a directory
        structure.check_structure("TIFF", with_directory(few, pointer, value_type, **layout))


def test_a_directory_that_exif_refers_to_is_limited_as_well():
    """That of interoperability lies one deeper; it may even be that of EXIF again, or EXIF the first one."""
    entries = [(40965, 4, 1, 26), (50_000, 5, 16_383, 0)]
    assert with_directory(entries)[26:28] == b"\x02\0"  # it begins there
    itself = b"II*\0" + struct.pack("<IHHHII", 8, 1, 34665, 4, 1, 8) + bytes(4)
    structure.check_structure("TIFF", itself)
    structure.check_structure("TIFF", with_directory(entries))
    deep = with_directory([(40965, 4, 1, 26 + 2 + 12)])
    with pytest.raises(ServiceError, match="16,384 values in the directory of tag 40965"):
        structure.check_structure("TIFF", deep + struct.pack("<H", 1) + struct.pack("<HHII", 50_000, 5, 16_385, 0))


@pytest.mark.parametrize("data", [
    with_directory(9 * [(40965, 4, 1, 26)]),
    b"II*\0" + struct.pack("<IH", 8, 9) + 9 * struct.pack("<HHII", 34665, 4, 1, 8) + bytes(4),
], ids=["inner", "outer"])  # fmt: skip
def test_many_references_to_directories_are_refused(data):
    """Each would be read again; Pillow knows one of each kind."""
    with pytest.raises(ServiceError, match="TIFF has more than 8 directories of EXIF and the like; save it in fewer"):
        structure.check_structure("TIFF", data)


@pytest.mark.parametrize("value_type", [16, 18])
def test_an_offset_that_does_not_fit_its_field_is_refused(value_type):
    """In a TIFF of the usual kind the field then says where the offset is."""
    with pytest.raises(ServiceError, match="TIFF's tag 34665 is no offset; save it anew"):
        structure.check_structure("TIFF", with_directory([], value_type=value_type))
    structure.check_structure("TIFF", with_directory([], value_type=value_type, big=True))


def test_a_tiff_with_the_tags_of_a_camera_is_taken():
    """Pillow's own, with directories of EXIF and GPS."""
    exif = Image.Exif()
    exif[0x0112] = 3
    exif.get_ifd(34665)[33434] = 0.01
    exif.get_ifd(34853)[1] = "N"
    data = encode(PIXELS, "TIFF", exif=exif)
    np.testing.assert_array_equal(decode(data, SPEC, 10**6), PIXELS[::-1, ::-1])


def test_the_other_byte_order_of_a_big_tiff_is_no_image_here():
    """Pillow takes it for a small one, whose first directory lies elsewhere."""
    with pytest.raises(ServiceError, match="are no known image"):
        decode(b"MM\0+" + tiff(strips=1)[4:], SPEC, 10**6)


@pytest.mark.parametrize("kind", ["JPEG", "CMYK", "PNG", "PNG of old", "WEBP"])
def test_pillow_reads_no_exif(monkeypatch, kind):
    """It would make an object of each of a million values, in half a minute; the image is turned all the same."""
    exif = Image.Exif()
    exif[0x0112] = 3
    image = Image.fromarray(PIXELS).convert("CMYK" if kind == "CMYK" else "RGB")
    options = {"dpi": (72, 72)} if kind in ("JPEG", "CMYK") else {"lossless": True} if kind == "WEBP" else {}
    file_kind = {"CMYK": "JPEG", "PNG of old": "PNG"}.get(kind, kind)
    plain, turned = encode(image, file_kind, **options), encode(image, file_kind, exif=exif, **options)
    if kind == "PNG of old":
        text = b"Raw profile type exif\0\nexif\n      38\n" + exif.tobytes().hex().encode() + b"\n"
        turned = plain[:33] + chunk(b"tEXt", text) + plain[33:]

    def refuse(*_):
        raise AssertionError("Pillow was asked for EXIF")

    upright = decode(plain, SPEC, 10**6)
    monkeypatch.setattr(Image.Exif, "load", refuse)
    np.testing.assert_array_equal(decode(turned, SPEC, 10**6), upright[::-1, ::-1])


def exif_block(value_type, count, value=b"\3\0\0\0", order="<", before=0):
    """An EXIF block with an orientation, behind so many other tags."""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, before + 1)
    other = before * struct.pack(order + "HHI4x", 1, 2, 1)
    return b"Exif\0\0" + head + other + struct.pack(order + "HHI", 0x0112, value_type, count) + value


def test_only_a_plain_orientation_turns_an_image():
    """One whole number, in either byte order; anything else leaves the image as it is."""
    for value_type, width in ((3, 2), (4, 4), (8, 2), (9, 4)):
        assert structure.orientation_of(exif_block(value_type, 1)) == 3
        turned = (6).to_bytes(width).ljust(4, b"\0")
        assert structure.orientation_of(exif_block(value_type, 1, turned, ">")) == 6
    assert structure.orientation_of(exif_block(3, 1)[6:]) == 3
    assert structure.orientation_of(b"Exif\0\0" + exif_block(3, 1)) == 3
    assert structure.orientation_of(exif_block(3, 1, b"\0\6\0\0", ">", before=900)) == 6
    for block in (
        exif_block(5, 4_000_000),
        exif_block(6, 4),
        exif_block(3, 2),
        exif_block(3, 1, before=1000),
        b"",
        b"x",
    ):
        assert structure.orientation_of(block) == 1
    assert structure.orientation_of(exif_block(3, 1)[:-4]) == 1


def test_exif_is_no_business_of_pillow_s():
    """Damaged or endless, it spoils no CMYK image; what is not EXIF stays."""
    segment = b"\xff\xe1" + (2 + 6 + 26).to_bytes(2) + b"Exif\0\0MM\0*" + bytes(22)
    np.testing.assert_array_equal(decode(jpeg("CMYK", 900 * segment), SPEC, 10**6), decode(jpeg("CMYK"), SPEC, 10**6))
    adobe = b"\xff\xe1" + (2 + 4).to_bytes(2) + b"http"
    assert structure.plain_head(jpeg("RGB", segment + adobe)) == jpeg("RGB", b"\xff\xfe" + segment[2:] + adobe)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "TIFF", "BMP", "WEBP"])
def test_a_file_that_ends_anywhere_is_for_the_decoder_to_judge(kind):
    """Structure refuses nothing that is merely cut short."""
    data = encode(PIXELS, kind)
    for end in range(0, len(data), 7):
        structure.check_structure(kind, data[:end])
        if kind == "JPEG":
            structure.plain_head(data[:end])


def test_a_bitmap_of_the_oldest_kind_has_no_compression():
    """Where later headers name one, its palette begins."""
    palette = bytes((1, 0, 0, 0, 1, 0)) + bytes(762)
    assert palette[4:8] == b"\1\0\0\0"  # run lengths, if it were one
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
    """Behind large segments, too, or a marker without a length; bytes that only look like EXIF do not."""
    exif = Image.Exif()
    exif[0x0112] = 3
    data = encode(PIXELS, "JPEG", exif=exif)
    at, plain = data.index(b"\xff\xe1"), encode(PIXELS, "JPEG")
    segment = data[at : at + 2 + int.from_bytes(data[at + 2 : at + 4])]
    other = b"\xff\xed\xff\xff" + bytes(65533)
    late = plain[:2] + 2 * other + b"\xff\xd0" + segment + plain[2:]
    comments = b"\xff\xfe" + (2 + len(segment)).to_bytes(2) + segment + b"\xff\xfe" + segment[2:]

    np.testing.assert_array_equal(decode(late, SPEC, 10**6), decode(plain, SPEC, 10**6)[::-1, ::-1])
    np.testing.assert_array_equal(read_image(late, SIZE), read_image(plain, SIZE)[::-1, ::-1])
    np.testing.assert_array_equal(decode(plain[:2] + comments + plain[2:], SPEC, 10**6), decode(plain, SPEC, 10**6))
