"""What the structure of an image file would cost a decoder, seen before it is opened; what is absurd is refused."""

import itertools
import math
import re
import struct
from collections.abc import Iterator
from typing import Final, Literal, NamedTuple

from PIL.JpegImagePlugin import MARKER

from service.errors import ServiceError

JPEG_START: Final = b"\xff\xd8\xff"
PNG_START: Final = b"\x89PNG\r\n\x1a\n"
# A progressive JPEG is painted over once for each scan; real ones have about 10, a hostile one as many as fit.
SCAN_MARK: Final = b"\xff\xda"
SCANS: Final = re.compile(SCAN_MARK)
JPEG_END: Final = b"\xff\xd9"
JPEG_MARKER: Final = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")  # what else follows 0xff says nothing
MAX_SCANS: Final = 100
SMALL_SCANS: Final = 16
MAX_MARKERS: Final = 1000  # of a JPEG that Pillow reads, one by one
APP1: Final = b"\xff\xe1"
COMMENT: Final = b"\xff\xfe"
EXIF_START: Final = b"Exif\0\0"
EXIF_MARK: Final = re.compile(EXIF_START)
EXIF_STARTS: Final = re.compile(b"\\A(?:" + EXIF_START + b"){1,2}")
SMALL_CHUNKS: Final = 32
MAX_CHUNKS: Final = 20_000  # of a PNG; usual ones are of 8 KiB or more
# Those of a PNG that cost nothing; others may hold compressed text, or a TIFF's worth of tags.
PLAIN_CHUNKS: Final = frozenset(
    (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"gAMA", b"cHRM", b"sRGB", b"sBIT", b"bKGD", b"pHYs", b"tIME")
)
GIF_HEADER_BYTES: Final = 13
MAX_GIF_BLOCKS: Final = 10_000  # before the first frame; a comment has one for each 255 bytes
BMP_HEADER_AT, BMP_COMPRESSION_AT = 14, 30
BMP_LEAST_HEADER: Final = 40  # of those that name a compression
BMP_RUN_LENGTHS: Final = (1, 2)
MAX_TIFF_TAGS: Final = 1000
TIFF_PIECES: Final = (273, 279, 324, 325)  # where strips and tiles are, and their sizes
MAX_TIFF_PIECES: Final = 2**16
MAX_TIFF_VALUES: Final = 3 * 2**16  # of any other tag: as many as the largest palette has
MAX_TIFF_RATIONALS: Final = 2**12  # of one tag; Pillow makes an object of each
TIFF_DIRECTORIES: Final = (34665, 34853, 40965)  # where EXIF, GPS and interoperability are, which Pillow reads whole
MAX_DIRECTORIES: Final = 8  # of these, at either depth
MAX_DIRECTORY_VALUES: Final = 2**14  # of one of these
TIFF_BYTES: Final = (1, 2, 7)  # types that stay bytes
TIFF_RATIONALS: Final = (5, 10)
TIFF_OFFSETS: Final = {4: 4, 13: 4, 16: 8, 18: 8}  # type -> bytes
TIFF_WHOLE: Final = {3: 2, 4: 4, 8: 2, 9: 4}  # types of whole numbers that may say how an image is turned -> bytes
ORIENTATION: Final = 0x0112
UPRIGHT: Final = 1


class Tag(NamedTuple):
    """An entry of a TIFF's directory: its value, or where that lies."""

    number: int
    value_type: int
    n_values: int
    value: bytes


def check_structure(kind: str, data: bytes) -> None:
    """
    Raise ServiceError image_unsupported for a file that takes far longer than its pixels and bytes let expect.

    Args:
        kind: Pillow's name of the format.
    """
    too_many = None
    if kind == "JPEG":
        if has_more(SCANS, data, MAX_SCANS) and _has_too_many_scans(data):
            too_many = f"{MAX_SCANS} scans, each of which paints it anew"
    elif kind == "PNG":
        if any(True for _ in itertools.islice(_chunks(data), MAX_CHUNKS, None)):
            too_many = f"{MAX_CHUNKS:,} chunks"
    elif kind == "GIF":
        if any(True for _ in itertools.islice(_gif_blocks(data), MAX_GIF_BLOCKS, None)):
            too_many = f"{MAX_GIF_BLOCKS:,} blocks before its first frame"
    elif kind == "TIFF":
        too_many = _excess_of_tiff(data)
    elif kind == "BMP" and _bmp_has_run_lengths(data):
        raise ServiceError("image_unsupported", "run-length encoded BMP; save it without compression, or as PNG")
    if too_many is not None:
        raise ServiceError("image_unsupported", f"{kind} has more than {too_many}; save it in fewer")


def plain_head(jpeg: bytes) -> bytes:
    """
    The JPEG for Pillow: its EXIF segments are comments now. Pillow would look for a resolution in all of them, joined.

    Raises:
        ServiceError: image_unsupported where Pillow would find no end of markers before the first scan.
    """
    exif_at = []
    for count, (at, marker, segment) in enumerate(_segments(jpeg), 1):
        if count == MAX_MARKERS:
            raise ServiceError(
                "image_unsupported",
                f"JPEG has {MAX_MARKERS:,} markers and stray bytes, or more, before its image; save it anew",
            )
        if marker == APP1 and segment.startswith(EXIF_START):
            exif_at.append(at)
    if not exif_at:
        return jpeg
    plain = bytearray(jpeg)
    for at in exif_at:
        plain[at : at + len(COMMENT)] = COMMENT
    return bytes(plain)


def exif_of(jpeg: bytes) -> bytes:
    """The EXIF block that says how the image is turned: the first one; empty where there is none."""
    if EXIF_MARK.search(jpeg) is None:  # nearly all, after one look
        return b""
    for _, marker, segment in itertools.islice(_segments(jpeg), MAX_MARKERS):
        if marker == APP1 and segment.startswith(EXIF_START):
            return segment
    return b""


def _segments(jpeg: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """Each marker before the first scan, as Pillow reads them: its place, it, what it holds (a stray byte: nothing)."""
    at = len(JPEG_START) - 1
    while at + 2 <= len(jpeg) and (marker := jpeg[at : at + 2]) != SCAN_MARK:
        code, end = int.from_bytes(marker), at + 1
        if code in MARKER:
            has_length = MARKER[code][2] is not None
            end = at + 2 + (int.from_bytes(jpeg[at + 2 : at + 4]) if has_length else 0)
        yield at, marker, jpeg[at + 4 : end]
        at = end


def has_more(marks: re.Pattern[bytes], data: bytes, limit: int) -> bool:
    """Whether there are more than `limit` of these marks, in a third of the time that `data.count` takes."""
    return any(itertools.islice(marks.finditer(data), limit, None))


def has_plain_chunks(png: bytes) -> bool:
    """Whether a PNG consists of few chunks, all of kinds that take no time beyond that of its pixels."""
    first = list(itertools.islice(_chunks(png), SMALL_CHUNKS + 1))
    return len(first) <= SMALL_CHUNKS and PLAIN_CHUNKS.issuperset(first)


def _chunks(png: bytes) -> Iterator[bytes]:
    """The kinds of a PNG's chunks, to its end."""
    at = len(PNG_START)
    while at < len(png):
        kind = png[at + 4 : at + 8]
        yield kind
        if kind == b"IEND":
            return
        at += 12 + int.from_bytes(png[at : at + 4])  # length, kind, what it holds, checksum


def _gif_blocks(gif: bytes) -> Iterator[int]:
    """Where each sub-block or stray byte before the first frame begins: what Pillow reads one by one."""
    flags = gif[GIF_HEADER_BYTES - 3] if len(gif) >= GIF_HEADER_BYTES else 0
    at = GIF_HEADER_BYTES + (3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0)
    while at < len(gif) and gif[at] not in b",;":
        yield at
        if gif[at] == ord("!"):
            at += 2
            while at < len(gif) and gif[at]:
                yield at
                at += 1 + gif[at]
        at += 1


def orientation_of(exif: bytes) -> int:
    """
    How an EXIF block, which is a TIFF without pixels, says that the image is turned; 1, upright, where it does not.

    Read here: Pillow would make Python objects of whatever else is in it, and of a million values in this tag.
    """
    block = EXIF_STARTS.sub(b"", exif)
    for tag in itertools.islice(_tiff_tags(block), MAX_TIFF_TAGS):
        if tag.number == ORIENTATION:
            n_bytes = TIFF_WHOLE.get(tag.value_type, 0) if tag.n_values == 1 else 0
            return int.from_bytes(tag.value[:n_bytes], _byte_order(block)) if n_bytes else UPRIGHT
    return UPRIGHT


def _excess_of_tiff(tiff: bytes) -> str | None:
    """What there is too much of in the first directory, or in one that Pillow reads whole, if anything."""
    tags = list(itertools.islice(_tiff_tags(tiff), MAX_TIFF_TAGS + 1))
    if len(tags) > MAX_TIFF_TAGS:
        return f"{MAX_TIFF_TAGS:,} tags"
    for tag in tags:
        limit = MAX_TIFF_RATIONALS if tag.value_type in TIFF_RATIONALS else MAX_TIFF_VALUES
        if tag.number in TIFF_PIECES and tag.n_values > MAX_TIFF_PIECES:
            return f"{MAX_TIFF_PIECES:,} strips or tiles"
        if tag.value_type not in TIFF_BYTES and tag.n_values > limit:
            return f"{limit:,} values in tag {tag.number}"
    directories = [tag for tag in tags if tag.number in TIFF_DIRECTORIES]
    for _ in range(2):  # that of EXIF may refer to one, too; Pillow goes no deeper
        if len(directories) > MAX_DIRECTORIES:
            return f"{MAX_DIRECTORIES} directories of EXIF and the like"
        deeper: list[Tag] = []
        for directory in directories:
            inner = list(itertools.islice(_tiff_tags(tiff, directory), MAX_TIFF_TAGS + 1))
            n_values = sum(tag.n_values for tag in inner if tag.value_type not in TIFF_BYTES)
            if len(inner) > MAX_TIFF_TAGS or n_values > MAX_DIRECTORY_VALUES:
                where = f"the directory of tag {directory.number}"
                return f"{MAX_TIFF_TAGS:,} tags or {MAX_DIRECTORY_VALUES:,} values in {where}"
            deeper += [tag for tag in inner if tag.number in TIFF_DIRECTORIES]
        directories = deeper
    return None


def _byte_order(tiff: bytes) -> Literal["little", "big"]:
    return "little" if tiff.startswith(b"II") else "big"


def _tiff_tags(tiff: bytes, directory: Tag | None = None) -> Iterator[Tag]:
    """
    The entries of the first directory, or of the one that a tag of the file refers to, as far as they are there.

    Raises:
        ServiceError: image_unsupported where that tag's value is not what refers to a directory.
    """
    order = "<" if _byte_order(tiff) == "little" else ">"
    big = tiff[2:3] == b"+"  # where Pillow looks
    offset, count, entry = ("Q", "Q", "HHQ8s") if big else ("I", "H", "HHI4s")
    try:
        if directory is None:
            (at,) = struct.unpack_from(order + offset, tiff, 8 if big else 4)
        elif directory.n_values == 1 and TIFF_OFFSETS.get(directory.value_type, math.inf) <= len(directory.value):
            at = int.from_bytes(directory.value[: TIFF_OFFSETS[directory.value_type]], _byte_order(tiff))
        else:
            raise ServiceError("image_unsupported", f"TIFF's tag {directory.number} is no offset; save it anew")
        (n_entries,) = struct.unpack_from(order + count, tiff, at)
        layout = struct.Struct(order + entry)
        for index in range(n_entries):
            yield Tag._make(layout.unpack_from(tiff, at + struct.calcsize(count) + index * layout.size))
    except struct.error:  # it ends too early, which is for the decoder to say
        return


def _bmp_has_run_lengths(bmp: bytes) -> bool:
    """Whether a few bytes may stand for a million pixels."""
    header = int.from_bytes(bmp[BMP_HEADER_AT : BMP_HEADER_AT + 4], "little")
    compression = int.from_bytes(bmp[BMP_COMPRESSION_AT : BMP_COMPRESSION_AT + 4], "little")
    return header >= BMP_LEAST_HEADER and compression in BMP_RUN_LENGTHS


def _has_too_many_scans(data: bytes) -> bool:
    """Of the image itself, not of its preview or of a video that is appended to it."""
    at = scans = 0
    while marker := JPEG_MARKER.search(data, at):
        at = marker.end()
        if marker[0] == JPEG_END:
            break
        if marker[0] != JPEG_START[:2]:  # all others have a length here
            at += int.from_bytes(data[at : at + 2])
        scans += marker[0] == SCAN_MARK
        if scans > MAX_SCANS:
            return True
    return False
