"""List files: one line per image, its path, a space, its label, as the large long-tailed sets are published."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from training.data.report import DataError, Report

PARTS = {"train": ("train",), "heldout": ("val", "heldout"), "test": ("test",)}
TRIED_PATHS = 20


@dataclass(frozen=True)
class ListFile:
    """
    A list that was read.

    Attributes:
        file: the list itself.
        paths: (N,), as they are listed, relative to the image root.
        labels: (N,), int64.
    """

    file: Path
    paths: Sequence[str]
    labels: np.ndarray

    def same_lines(self, other: ListFile) -> bool:
        """Whether both list the same images under the same labels."""
        return list(self.paths) == list(other.paths) and np.array_equal(self.labels, other.labels)


def lists_of(directory: Path, train: str | None, val: str | None, test: str | None) -> dict[str, Path]:
    """
    Which list is for "train", "heldout" and "test"; empty where the directory has no lists.

    Without names it is the only *train*.txt, *val*.txt and *test*.txt, in any case of letters, so that
    ImageNet_LT_train.txt is found as well as train.txt.

    Args:
        train, val, test: file names, below `directory` unless absolute; None: to be found.

    Raises:
        DataError: for a named list that is not there, or several that could be meant.
    """
    found: dict[str, Path] = {}
    texts = sorted(file for file in directory.glob("*.txt") if file.is_file())
    for (part, words), name in zip(PARTS.items(), (train, val, test), strict=True):
        if name is not None:
            if not (directory / name).is_file():
                raise DataError(f"{directory / name}: no such list file")
            found[part] = directory / name
            continue
        fitting = [file for file in texts if any(word in file.stem.lower() for word in words)]
        if len(fitting) > 1:
            field = {"train": "train_list", "heldout": "val_list", "test": "test_list"}[part]
            raise DataError(f"{directory}: {', '.join(file.name for file in fitting)} could all be meant; set {field}")
        if fitting:
            found[part] = fitting[0]
    if found and "train" not in found:
        raise DataError(f"{directory}: {', '.join(f.name for f in found.values())}, but no *train*.txt; set train_list")
    return found


def read_list(file: Path, report: Report) -> ListFile:
    """
    The lines of `file`; those that are no path and label go into the report.

    Raises:
        DataError: where the file is not text or holds no image.
    """
    paths: list[str] = []
    labels: list[int] = []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read as text: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        path, _, label = line.strip().rpartition(" ")
        parts = path.strip().split("/")
        if not path.strip() or not label.removeprefix("-").isdecimal():
            report.add("malformed", f"{file.name} line {number}: {line[:80]!r} is not a path, a space, a whole number")
        elif os.path.isabs(path) or ".." in parts:
            report.add("malformed", f"{file.name} line {number}: {path[:80]!r} leaves the image root")
        else:
            paths.append(path.strip())
            labels.append(max(min(int(label), 2**62), -(2**62)))
    if not paths:
        raise DataError(f"{file}: none of its {len(lines)} lines is a path, a space and a label")
    return ListFile(file, paths, np.array(labels, np.int64))


def image_root_of(root: Path, entries: ListFile) -> tuple[Path, int]:
    """
    Where the images of a list really lie.

    Repositories list the same images under different leading directories (`train/…`, `data_256/…`). Where a path is not
    below `root` as it stands, it is looked for without its leading directories, and below each directory in `root`.

    Returns:
        The directory, and how many leading directories of each listed path to drop.

    Raises:
        DataError: where none of the first paths can be found in any of these ways.
    """
    tried = [entries.paths[i] for i in np.linspace(0, len(entries.paths) - 1, TRIED_PATHS).round().astype(int)]
    deepest = min(path.count("/") for path in tried)
    below = sorted(entry for entry in root.iterdir() if entry.is_dir())
    best, most = (root, 0), 0
    for dropped in range(deepest + 1):
        for base in (root, *below):
            found = sum((base / path.split("/", dropped)[-1]).is_file() for path in tried)
            if found == len(tried):
                return base, dropped
            if found > most:
                best, most = (base, dropped), found
    if not most:
        raise DataError(
            f"{entries.file}: none of its images is below {root}, nor without leading directories, nor one level "
            f"deeper; the first would be {root / tried[0]}. Set image_root"
        )
    return best
