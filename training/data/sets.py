"""Image sets: CIFAR by name, parquet files, class folders; and their training, held-out and test images."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from training.data.images import Fit, read_image
from training.data.longtail import class_counts, draw_subset
from training.recipe import Recipe

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "fine_label", "labels")
MOST_ERRORS = 20


class DataError(ValueError):
    """Images that cannot be found, read or split as asked."""


@dataclass(frozen=True)
class Source:
    """
    Images that are not decoded yet.

    Attributes:
        labels: (N,), int64 from 0.
        encoded: position to (bytes of the file or decoded pixels (H, W, 3), a name for error messages).
    """

    labels: np.ndarray
    encoded: Callable[[int], tuple[bytes | np.ndarray, str]]


@dataclass(frozen=True)
class Images:
    """
    Decoded images in memory.

    Attributes:
        pixels: (N, H, W, 3), uint8.
        labels: (N,), int64.
    """

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Images:
        """The same images on `device`."""
        return Images(self.pixels.to(device), self.labels.to(device))

    def even_sample(self, size: int) -> Tensor:
        """The pixels of at most `size` images, evenly spread over all: (size, H, W, 3)."""
        return self.pixels[torch.linspace(0, len(self) - 1, min(size, len(self))).round().long()]


@dataclass(frozen=True)
class Data:
    """
    What a training needs.

    Attributes:
        classes: C names.
        counts: C numbers of training images.
        train, heldout, test: heldout is for choices such as thresholds, test for figures only.
        heldout_note: where the held-out images come from, to stand beside every figure made with them.
    """

    classes: tuple[str, ...]
    counts: tuple[int, ...]
    train: Images
    heldout: Images
    test: Images
    heldout_note: str


def load_data(recipe: Recipe) -> Data:
    """
    The images of `recipe`, decoded and split.

    Raises:
        DataError: for a set that is missing or too small, or images that cannot be read, twenty named at once.
    """
    classes, train, test = _open(recipe.data)
    labels = train.labels
    if recipe.profile == "natural":
        test_positions = np.empty(0, np.int64)
        if test is None:
            test_positions = _share(labels, recipe.test_share, len(classes), recipe.subset_seed + 1)
        left = np.setdiff1d(np.arange(len(labels)), test_positions)
        heldout = left[_share(labels[left], recipe.holdout_share, len(classes), recipe.subset_seed)]
        chosen = np.setdiff1d(left, heldout)
        note = f"{recipe.holdout_share:.0%} of each class's training images, seed {recipe.subset_seed}"
    else:
        if test is None:
            raise DataError(f"{recipe.data}: profile={recipe.profile} needs a set with test images of its own")
        sizes = np.bincount(labels, minlength=len(classes))
        try:
            counts = class_counts(recipe.n_max or int(sizes[0]), recipe.imbalance, len(classes), recipe.profile)
            chosen = draw_subset(labels, counts, recipe.subset_seed, recipe.subset_order)
        except ValueError as error:
            raise DataError(f"{recipe.data}: {error}") from None
        left = np.setdiff1d(np.arange(len(labels)), chosen)
        left = np.random.default_rng(recipe.subset_seed).permutation(left)
        heldout = np.concatenate([left[labels[left] == c][: recipe.holdout_per_class] for c in range(len(classes))])
        missing = sorted(set(range(len(classes))) - set(labels[heldout].tolist()))
        note = f"training images that the long-tailed subset leaves out, up to {recipe.holdout_per_class} a class" + (
            f"; none for {', '.join(classes[c] for c in missing)}" if missing else ""
        )
    if not len(heldout):
        raise DataError(f"{recipe.data}: no images are left for the held-out set; every class needs three or more")
    decode = _Decoder(recipe.image_size)
    data = Data(
        classes=tuple(classes),
        counts=tuple(np.bincount(labels[chosen], minlength=len(classes)).tolist()),
        train=decode(train, chosen),
        heldout=decode(train, heldout, recipe.test_fit),
        test=decode(test or train, test_positions if test is None else np.arange(len(test.labels)), recipe.test_fit),
        heldout_note=note,
    )
    decode.raise_errors()
    empty = [name for name, count in zip(data.classes, data.counts, strict=True) if not count]
    if empty:
        raise DataError(f"{recipe.data}: no training images for {', '.join(empty[:MOST_ERRORS])}")
    return data


def channel_statistics(images: Images) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel (R, G, B) of pixels in [0, 1], rounded to four digits."""
    pixels = images.pixels.reshape(-1, 3).double() / 255
    rounded = [tuple(round(float(value), 4) for value in values) for values in (pixels.mean(0), pixels.std(0))]
    return rounded[0], rounded[1]


def _share(labels: np.ndarray, share: float, n_classes: int, seed: int) -> np.ndarray:
    """Positions of `share` of each class, at least one where a class has three images, never its last two."""
    generator = np.random.default_rng(seed)
    parts = []
    for label in range(n_classes):
        positions = generator.permutation(np.flatnonzero(labels == label))
        parts.append(positions[: max(round(share * len(positions)), 1) if len(positions) > 2 else 0])
    return np.sort(np.concatenate(parts))


class _Decoder:
    """Decodes chosen images of a source and gathers what cannot be read."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.errors: list[str] = []

    def __call__(self, source: Source, positions: np.ndarray, how: Fit = "crop") -> Images:
        pixels = np.zeros((len(positions), self.size, self.size, 3), np.uint8)
        for row, position in enumerate(positions):
            content, name = source.encoded(int(position))
            try:
                pixels[row] = content if isinstance(content, np.ndarray) else read_image(content, self.size, how)
            except ValueError as error:
                self.errors.append(f"{name}: {error}")
        return Images(torch.from_numpy(pixels), torch.from_numpy(source.labels[positions]))

    def raise_errors(self) -> None:
        if self.errors:
            shown = "\n  ".join(self.errors[:MOST_ERRORS])
            raise DataError(f"{len(self.errors)} images cannot be read; repair or remove them:\n  {shown}")


def _open(name: str) -> tuple[Sequence[str], Source, Source | None]:
    """Class names, training source, and test source where the set has one."""
    if not name:
        raise DataError("no data named; give --data cifar100, a directory of class folders, or one with train*.parquet")
    if name in ("cifar10", "cifar100"):
        root = os.environ.get("RIDE_DATA")
        return _open_directory(Path(root, name)) if root else _open_torchvision(name)
    return _open_directory(Path(name))


def _open_directory(directory: Path) -> tuple[Sequence[str], Source, Source | None]:
    if not directory.is_dir():
        raise DataError(f"{directory}: no such directory")
    if list(directory.glob("train*.parquet")):
        return _open_parquet(directory)
    if (directory / "train").is_dir():
        classes, train = _open_folder(directory / "train")
        if not (directory / "test").is_dir():
            return classes, train, None
        test_classes, test = _open_folder(directory / "test")
        if test_classes != classes:
            odd = sorted(set(classes) ^ set(test_classes))
            raise DataError(f"{directory}: train and test have different classes: {', '.join(odd[:MOST_ERRORS])}")
        return classes, train, test
    return *_open_folder(directory), None


def _open_folder(directory: Path) -> tuple[list[str], Source]:
    """Every sub-directory is a class, in alphabetical order; images may lie deeper."""
    classes = sorted(entry.name for entry in directory.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(path for path in (directory / name).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        files += found
        labels += [label] * len(found)
    if len(classes) < 2:
        raise DataError(f"{directory}: {len(classes)} class directories; a classifier needs two or more")
    empty = sorted(set(range(len(classes))) - set(labels))
    if empty:
        raise DataError(f"{directory}: no images in {', '.join(classes[c] for c in empty[:MOST_ERRORS])}")
    return classes, Source(np.array(labels, np.int64), lambda row: (files[row].read_bytes(), str(files[row])))


def _open_parquet(directory: Path) -> tuple[list[str], Source, Source | None]:
    """train*.parquet and, where there are any, test*.parquet; bytes or the {bytes, path} struct of Hugging Face."""
    train, names = _read_parquet(sorted(directory.glob("train*.parquet")))
    test_files = sorted(directory.glob("test*.parquet"))
    test = _read_parquet(test_files)[0] if test_files else None
    if (directory / "classes.txt").is_file():
        names = (directory / "classes.txt").read_text(encoding="utf-8").split("\n")
        names = [name.strip() for name in names if name.strip()]
    highest = max(int(source.labels.max()) for source in (train, test) if source is not None)
    if names is None:
        names = [f"class {c}" for c in range(highest + 1)]
    if highest >= len(names) or train.labels.min() < 0:
        raise DataError(f"{directory}: labels from {train.labels.min()} to {highest}, but {len(names)} class names")
    return names, train, test


def _read_parquet(files: list[Path]) -> tuple[Source, list[str] | None]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.concat_tables([pyarrow.parquet.read_table(file) for file in files])
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{files[0].parent}: the parquet files cannot be read: {error}") from None
    image = _column(files[0], table.column_names, IMAGE_COLUMNS)
    label = _column(files[0], table.column_names, LABEL_COLUMNS)
    images = table[image].combine_chunks() if table[image].num_chunks != 1 else table[image].chunk(0)
    if pyarrow.types.is_struct(images.type):
        images = images.field("bytes")
    if images.null_count or table[label].null_count or not len(images):
        raise DataError(
            f"{files[0]}: {images.null_count} rows without image bytes, {table[label].null_count} without label"
        )
    labels = table[label].to_numpy().astype(np.int64)
    return Source(labels, lambda row: (images[row].as_py(), f"{files[0].parent}: row {row}")), _feature_names(
        table, label
    )


def _column(file: Path, found: list[str], wanted: Sequence[str]) -> str:
    for name in wanted:
        if name in found:
            return name
    raise DataError(f"{file}: columns {', '.join(found)}; one of them must be named {' or '.join(wanted)}")


def _feature_names(table: object, label: str) -> list[str] | None:
    """Class names as the `datasets` library stores them in a parquet schema."""
    metadata = (table.schema.metadata or {}).get(b"huggingface")  # type: ignore[attr-defined]
    if metadata is None:
        return None
    names: list[str] | None = json.loads(metadata).get("info", {}).get("features", {}).get(label, {}).get("names")
    return names


def _open_torchvision(name: str) -> tuple[list[str], Source, Source]:
    """CIFAR as torchvision downloads it, under ~/.cache/ride-serving."""
    from torchvision.datasets import CIFAR10, CIFAR100

    kind = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    root = Path.home() / ".cache" / "ride-serving"
    try:
        train, test = (kind(root, train=part, download=True) for part in (True, False))
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{name}: cannot be downloaded to {root} ({error}); "
            f"or set RIDE_DATA to a directory that holds {name}/train.parquet"
        ) from None

    def source(part: CIFAR10) -> Source:
        return Source(np.array(part.targets, np.int64), lambda row: (part.data[row], f"{name}: row {row}"))

    return list(train.classes), source(train), source(test)
