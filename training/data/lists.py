"""List files: one line per image, its path, a space, its label, as the large long-tailed sets are published."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from training.data.report import DataError, Report

PART_WORDS = {
    "train": ("train", "training"),
    "heldout": ("val", "valid", "validation", "heldout"),
    "test": ("test", "testing"),
}
TRIED_PATHS = 20
LONGEST_LABEL = 4000  # digits, what Python converts


@dataclass(frozen=True)
class ListFile:
    """
    A list that was read.

    Attributes:
        file: the list itself.
        paths: (N,), as they are listed but for "./" and "//", relative to the image root.
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
    Which list is for "train", "heldout" and "test"; empty where the directory has none for "train" and none is named.

    Without names it is the only one that has one of `PART_WORDS` in its name as a whole word, in any case of letters:
    ImageNet_LT_train.txt as well as train.txt, but not constraints.txt.

    Args:
        train, val, test: file names, below `directory` unless absolute; None: to be found.

    Raises:
        DataError: for a named list that is not there, or several that could be meant.
    """
    named = {"train": train, "heldout": val, "test": test}
    found: dict[str, Path] = {}
    for part, name in named.items():
        if name is not None:
            if not (directory / name).is_file():
                raise DataError(f"{directory / name}: no such list file")
            found[part] = directory / name
    if "train" not in found and not lists_for("train", directory):
        if found:
            told = ", ".join(file.name for file in found.values())
            raise DataError(f"{directory}: {told}, but no list for training such as train.txt; set train_list")
        return {}
    for part in [part for part in named if part not in found]:
        fitting = lists_for(part, directory)
        if len(fitting) > 1:
            field = {"train": "train_list", "heldout": "val_list", "test": "test_list"}[part]
            raise DataError(f"{directory}: {', '.join(file.name for file in fitting)} could all be meant; set {field}")
        if fitting:
            found[part] = fitting[0]
    return {part: found[part] for part in named if part in found}


def lists_for(part: str, directory: Path) -> list[Path]:
    """The files that may be lists for "train", "heldout" or "test", by their names."""
    word = re.compile(rf"(?<![a-z])({'|'.join(PART_WORDS[part])})(?![a-z])")
    return sorted(file for file in directory.glob("*.txt") if word.search(file.stem.lower()) and not file.is_dir())


def read_list(file: Path, report: Report) -> ListFile:
    """
    The lines of `file`; those that are no path and label go into the report.

    Raises:
        DataError: where the file is not text or holds no image.
    """
    paths: list[str] = []
    labels: list[int] = []
    wrong: list[str] = []
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read as text: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        path, _, label = line.strip().rpartition(" ")
        parts = path.strip().split("/")
        if not path.strip() or not label.removeprefix("-").isdecimal() or len(label) > LONGEST_LABEL:
            wrong.append(f"{file.name} line {number}: {line[:80]!r} is not a path, a space, a whole number")
        elif os.path.isabs(path) or ".." in parts:
            wrong.append(f"{file.name} line {number}: {path[:80]!r} leaves the image root")
        else:
            paths.append(posixpath.normpath(path.strip()))
            labels.append(max(min(int(label), 2**62), -(2**62)))
    if not paths:
        first = f"; {wrong[0]}" if wrong else ""
        raise DataError(f"{file}: none of its {len(lines)} lines is a path below the root, a space, a label{first}")
    report.add_all("malformed", wrong)
    return ListFile(file, paths, np.array(labels, np.int64))


def image_root_of(root: Path, entries: ListFile) -> tuple[Path, int]:
    """
    Where the images of a list really lie.

    Repositories list the same images under different leading directories (`train/…`, `data_256/…`). Where most of the
    paths are not below `root` as they stand, they are looked for without their leading directories, and below each
    directory in `root`.

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
            as_listed = (base, dropped) == (root, 0)
            if found == len(tried) or (as_listed and found > len(tried) / 2):
                return base, dropped
            if found > most:
                best, most = (base, dropped), found
    if not most:
        raise DataError(
            f"{entries.file}: none of its images is below {root}, nor without leading directories, nor one level "
            f"deeper; the first would be {root / tried[0]}. Set image_root"
        )
    return best
