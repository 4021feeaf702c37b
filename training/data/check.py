"""Looking at every image of a set before training: is it there, can it be read, is it there twice?"""

from __future__ import annotations

import hashlib
import io
import os
import stat
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Literal

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset

from training.data.images import FORMATS, refuse_large
from training.data.images import decode as decode_image
from training.data.limits import available_cores
from training.data.report import Report
from training.data.sources import Encoded, Files, ImageSet, label_text, open_set
from training.recipe import Recipe

Depth = Literal["bytes", "headers", "pixels"]
EDGE = 4096  # bytes at each end of a file that tell it from others of the same size
IN_PROCESS = 2000  # images that are looked at before worker processes would have started
CHUNK = 64
DIGEST_BYTES = 16


def check_data(recipe: Recipe, *, decode: bool = True) -> Report:
    """
    Everything that is wrong with the images that `recipe` names, in one report. Trains nothing.

    Args:
        decode: decode every image to the end; False: look at the headers only, which finds no damage further in.

    Raises:
        DataError: where there is nothing that could be a set.
    """
    image_set = open_set(recipe)
    examine(image_set, "pixels" if decode else "headers", workers_for(recipe))
    return image_set.report


def workers_for(recipe: Recipe) -> int:
    """How many processes decode: what the recipe says, or one for each processor that this process may use."""
    return available_cores() if recipe.workers is None else recipe.workers


def examine(image_set: ImageSet, depth: Depth, workers: int) -> dict[str, np.ndarray]:
    """
    Add to the report of `image_set` what is wrong with its images.

    Args:
        depth: "bytes": is each there; "headers": is it an image by its first bytes; "pixels": decode it whole. Images
            that are there twice are found at every depth.
        workers: processes that share the work; a small set is done in this one.

    Returns:
        Of each part, (N, 16), uint8: digests that equal images share, wherever they lie; 0 for those that are wrong.
    """
    report = image_set.report
    seen: dict[bytes, list[tuple[str, int]]] = defaultdict(list)
    digests: dict[str, np.ndarray] = {}
    for part, source in image_set.parts().items():
        digests[part] = np.zeros((len(source), DIGEST_BYTES), np.uint8)
        for position, finding in enumerate(_findings(source.images, depth, workers)):
            if finding.kind is not None:
                report.add(finding.kind, finding.text)
            else:
                seen[finding.digest].append((part, position))
                digests[part][position] = np.frombuffer(finding.digest, np.uint8)
    _tell_lone(image_set, np.flatnonzero(image_set.train.counts(len(image_set.classes)) == 1))
    for group in seen.values():
        if len(group) > 1:
            _tell_twice(image_set, group)
    return digests


def _tell_lone(image_set: ImageSet, labels: np.ndarray) -> None:
    for label in labels:
        position = int(np.flatnonzero(image_set.train.labels == label)[0])
        where = image_set.train.images.name(position)
        image_set.report.add("class with one image", f"{image_set.classes[label]}: {where}")


def _tell_twice(image_set: ImageSet, group: list[tuple[str, int]]) -> None:
    """
    What it means that these images are, or seem to be, the same.

    Args:
        group: (part, position) of each.
    """
    sources = image_set.parts()
    copies: dict[str | bytes, list[tuple[str, int]]] = defaultdict(list)  # by path, and by all bytes
    for part, position in group:
        images = sources[part].images
        if isinstance(images, Files):
            copies[images.name(position)].append((part, position))
    distinct = [members[0] for members in copies.values()] if copies else group
    whole: dict[bytes, list[tuple[str, int]]] = defaultdict(list)
    if len(distinct) > 1:
        for part, position in distinct:
            whole[_digest(sources[part].images.read(position))].append((part, position))
    for listed, same in ((True, copies.values()), (False, whole.values())):
        for members in same:
            if len(members) > 1:
                _tell_same(image_set, members, listed)


def _tell_same(image_set: ImageSet, members: list[tuple[str, int]], listed: bool) -> None:
    """`members` are one file that is listed several times, or files with the same bytes."""
    sources = image_set.parts()
    labels = [int(sources[part].labels[position]) for part, position in members]
    names = [sources[part].images.name(position) for part, position in members]
    told = ", ".join(
        f"{'' if listed else name + ': '}{_class_of(image_set, label)} ({part})"
        for name, label, (part, _) in zip(names, labels, members, strict=True)
    )
    told = f"{names[0]}: {told}" if listed else told
    places = list(zip(labels, (part for part, _ in members), strict=True))
    if len(set(labels)) > 1:
        image_set.report.add("file in two classes" if listed else "image in two classes", told)
    if len({part for _, part in places}) > 1:
        image_set.report.add("file in two parts" if listed else "image in two parts", told)
    elif len(set(labels)) == 1:
        image_set.report.add("image twice", told)


def _class_of(image_set: ImageSet, label: int) -> str:
    return f"class {image_set.classes[label]!r}" if 0 <= label < len(image_set.classes) else label_text(label)


@dataclass(frozen=True)
class _Finding:
    """Of one image: what is wrong with it, or a digest that equal images share."""

    kind: str | None = None
    text: str = ""
    digest: bytes = b""


class _Inspection(Dataset[_Finding]):
    """A look at each image of a part, in whichever process."""

    def __init__(self, images: Encoded, depth: Depth) -> None:
        self.images, self.depth = images, depth

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position: int) -> _Finding:
        name = self.images.name(position)
        try:
            if isinstance(self.images, Files) and not stat.S_ISREG(os.stat(name).st_mode):  # a pipe would never end
                return _Finding("unreadable", f"{name}: not a regular file")
            if isinstance(self.images, Files) and self.depth != "pixels":
                return _Finding(digest=_look_at_file(name, self.depth))
            content = self.images.read(position)
            if isinstance(content, bytes):
                if not content and not isinstance(self.images, Files):
                    return _Finding("missing", f"{name} has no image bytes")
                if self.depth == "pixels":
                    decode_image(content)
                elif self.depth == "headers":
                    _look_at_header(io.BytesIO(content))
            if isinstance(self.images, Files) and isinstance(content, bytes):
                return _Finding(digest=_digest_of_ends(content[:EDGE], content[-EDGE:], len(content)))
            return _Finding(digest=_digest(content))
        except FileNotFoundError:
            return _Finding("missing", name)
        except (OSError, ValueError) as error:
            return _Finding("unreadable", f"{name}: {error}")


def _findings(images: Encoded, depth: Depth, workers: int) -> Iterator[_Finding]:
    """In the order of the images."""
    inspection = _Inspection(images, depth)
    if len(inspection) <= IN_PROCESS:
        workers = 0
    for chunk in DataLoader(inspection, CHUNK, num_workers=workers, collate_fn=list):
        yield from chunk


def _look_at_file(path: str, depth: Depth) -> bytes:
    with open(path, "rb") as file:
        if depth == "headers":
            _look_at_header(file)
            file.seek(0)
        size = os.fstat(file.fileno()).st_size
        head = file.read(EDGE)
        file.seek(max(size - EDGE, 0))
        return _digest_of_ends(head, file.read(EDGE), size)


def _digest_of_ends(head: bytes, tail: bytes, size: int) -> bytes:
    return _digest(head + tail + size.to_bytes(8, "little"))


def _digest(content: bytes | np.ndarray) -> bytes:
    return hashlib.blake2b(
        content if isinstance(content, bytes) else content.tobytes(), digest_size=DIGEST_BYTES
    ).digest()


def _look_at_header(file: IO[bytes]) -> None:
    try:
        refuse_large(Image.open(file, formats=FORMATS))  # reads no further
    except UnidentifiedImageError:
        raise ValueError(f"not a readable image: neither {' nor '.join(FORMATS)}") from None
    except Exception as error:  # a decoder may stumble over damaged bytes in any way
        raise ValueError(f"not a readable image: {error}") from error
