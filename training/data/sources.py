"""Where images come from, before any is decoded: class folders, parquet files, list files, CIFAR by name."""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from training.data.lists import PART_WORDS, ListFile, image_root_of, lists_for, lists_of, read_list
from training.data.report import DataError, Report
from training.recipe import Recipe

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "fine_label", "labels")
NO_LABEL = np.iinfo(np.int64).min  # of a row that has none
MOST_NAMES = 20


class Encoded(Protocol):
    """Images as they are stored. Can be sent to another process."""

    def __len__(self) -> int: ...

    def name(self, position: int) -> str:
        """For messages."""
        ...

    def read(self, position: int) -> bytes | np.ndarray:
        """The bytes of an image file, or decoded pixels (H, W, 3); OSError where the file cannot be read."""
        ...


@dataclass(frozen=True)
class Files:
    """Image files."""

    paths: Sequence[str]

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, position: int) -> str:
        """The path."""
        return self.paths[position]

    def read(self, position: int) -> bytes:
        """The file's bytes."""
        return Path(self.paths[position]).read_bytes()


@dataclass(frozen=True)
class Rows:
    """A column of image bytes: a pyarrow.ChunkedArray."""

    directory: str
    column: Any

    def __len__(self) -> int:
        return len(self.column)

    def name(self, position: int) -> str:
        """Directory and row."""
        return f"{self.directory}: row {position}"

    def read(self, position: int) -> bytes:
        """The row's bytes; none where the row is null."""
        return self.column[position].as_py() or b""


@dataclass(frozen=True)
class Pixels:
    """Decoded images: (N, H, W, 3), uint8."""

    set_name: str
    pixels: np.ndarray

    def __len__(self) -> int:
        return len(self.pixels)

    def name(self, position: int) -> str:
        """Set and row."""
        return f"{self.set_name}: row {position}"

    def read(self, position: int) -> np.ndarray:
        """(H, W, 3), uint8."""
        return self.pixels[position]


@dataclass(frozen=True)
class Source:
    """
    Images that are not decoded yet.

    Attributes:
        labels: (N,), int64.
        images: of the same length.
    """

    labels: np.ndarray
    images: Encoded

    def __len__(self) -> int:
        return len(self.labels)

    def counts(self, n_classes: int) -> np.ndarray:
        """(C,): images of each class; labels out of range do not count."""
        possible = self.labels[(self.labels >= 0) & (self.labels < n_classes)]
        return np.bincount(possible, minlength=n_classes)


@dataclass(frozen=True)
class ImageSet:
    """
    A set as it lies on the disk.

    Attributes:
        name: as the user gave it.
        classes: C names, in the order of the labels.
        train, heldout, test: None where the set has no such images of its own.
        report: what was found wrong while opening; labels may be out of range where it has errors.
    """

    name: str
    classes: Sequence[str]
    train: Source
    heldout: Source | None = None
    test: Source | None = None
    report: Report = field(default_factory=Report)

    def parts(self) -> dict[str, Source]:
        """Those that there are, by "train", "heldout", "test"."""
        named = {"train": self.train, "heldout": self.heldout, "test": self.test}
        return {name: source for name, source in named.items() if source is not None}


def open_set(recipe: Recipe) -> ImageSet:
    """
    The images that `recipe.data` names, none of them decoded.

    A directory holds, in this order of precedence: list files, where the recipe names some or there is one
    such as train.txt; train*.parquet; train/, val/ and test/ of class folders, by any of `PART_WORDS` and in any case
    of letters; class folders.

    Where there are validation images but no test images, the validation images are the test images.

    Raises:
        DataError: where there is nothing that could be a set. What is wrong with single images is in the report.
    """
    found = _open(recipe)
    return found if found.test is not None else replace(found, test=found.heldout, heldout=None)


def _open(recipe: Recipe) -> ImageSet:
    name = recipe.data
    if not name:
        raise DataError(
            "no data named; give --data cifar100, a directory of class folders, one with train*.parquet, "
            "or one with list files such as train.txt"
        )
    if name in ("cifar10", "cifar100"):
        root = os.environ.get("RIDE_DATA")
        if not root:
            return _open_torchvision(name)
        return _open_parquet(name, _existing(Path(root, name)))
    directory = _existing(Path(name))
    lists = lists_of(directory, recipe.train_list, recipe.val_list, recipe.test_list)
    if lists:
        return _open_lists(name, directory, lists, recipe.image_root)
    if recipe.image_root is not None:
        raise DataError(f"image_root={recipe.image_root}: {directory} has no list files, whose paths could start there")
    opened = (_open_parquet if _parquet_files(directory, "train") else _open_folders)(name, directory)
    stray = lists_for("heldout", directory) + lists_for("test", directory)
    opened.report.add_all("not taken", (f"{file}: no list for training is beside it" for file in stray))
    return opened


def _existing(directory: Path) -> Path:
    """
    The directory, where it exists.

    Raises:
        DataError: where it is not there.
    """
    if not directory.is_dir():
        raise DataError(f"{directory}: no such directory")
    return directory


def _open_folders(name: str, directory: Path) -> ImageSet:
    """train/, val/ and test/, or the classes themselves."""
    report = Report()
    parts = _part_directories(directory)
    if "train" not in parts:
        classes, train = _open_folder(directory, report)
        return ImageSet(name, classes, train, report=report)
    _tell_broken_links(directory, report)
    classes, train = _open_folder(parts["train"], report)
    others = {part: _open_folder(home, report, classes)[1] for part, home in parts.items() if part != "train"}
    for part in [part for part, source in others.items() if not len(source)]:
        del others[part]  # as if it were not there; that it holds nothing is in the report
    left_out = set(_directories(directory)) - set(parts.values())
    report.add_all("not taken", (f"{home}: neither training, validation nor test images" for home in sorted(left_out)))
    return ImageSet(name, classes, train, others.get("heldout"), others.get("test"), report)


def _part_directories(directory: Path) -> dict[str, Path]:
    """By "train", "heldout", "test"; of several for one part that whose name comes first in `PART_WORDS`."""
    found = _directories(directory)
    fitting = {
        part: [home for name in names for home in found if home.name.lower() == name]
        for part, names in PART_WORDS.items()
    }
    return {part: homes[0] for part, homes in fitting.items() if homes}


def _directories(directory: Path) -> list[Path]:
    """Those in `directory` that are not hidden, in alphabetical order."""
    return sorted(entry for entry in directory.iterdir() if entry.is_dir() and not _is_hidden(entry.name))


def _tell_broken_links(directory: Path, report: Report) -> None:
    """A link to a disk that is not there would pass for a class, or a part, that does not exist."""
    broken = (entry for entry in directory.iterdir() if entry.is_symlink() and not entry.exists())
    report.add_all("missing", (f"{link}: leads nowhere" for link in sorted(broken) if not _is_hidden(link.name)))


def _open_folder(directory: Path, report: Report, wanted: Sequence[str] | None = None) -> tuple[list[str], Source]:
    """
    Every sub-directory is a class, in alphabetical order; images may lie deeper. What is hidden does not count.

    Args:
        wanted: the classes of the training images, where these are others; some may be missing here.
    """
    _tell_broken_links(directory, report)
    classes = [home.name for home in _directories(directory)]
    if wanted is None:
        _check_classes(directory, classes)
    else:
        if odd := sorted(set(classes) - set(wanted)):
            raise DataError(f"{directory}: classes without training images: {', '.join(odd[:MOST_NAMES])}")
        classes = list(wanted)
    files: list[str] = []
    labels: list[int] = []
    bare: list[Path] = []
    left_out = {directory: [entry for entry in directory.iterdir() if entry.is_file() and not _is_hidden(entry.name)]}
    for label, name in enumerate(classes):
        home = directory / name
        inside = _files_below(home, report) if home.is_dir() else []
        found = [path for path in inside if path.suffix.lower() in IMAGE_SUFFIXES]
        left_out[home] = [path for path in inside if path.suffix.lower() not in IMAGE_SUFFIXES]
        bare += [] if found else [home]
        files += map(str, found)
        labels += [label] * len(found)
    if wanted is None or files:
        kind = "empty class" if wanted is None else "class without such images"
        report.add_all(kind, (f"no images in {home}" for home in bare))
    else:
        report.add("not taken", f"{directory}: no images in directories named like the classes")
    for home, paths in left_out.items():
        endings = Counter(f"*{path.suffix}" if path.suffix else "no ending" for path in paths)
        if endings and (home != directory or wanted is None):
            report.add("not taken for an image", f"{home}: {', '.join(f'{n} {end}' for end, n in endings.items())}")
    return classes, Source(np.array(labels, np.int64), Files(files))


def _files_below(home: Path, report: Report) -> list[Path]:
    """
    In alphabetical order, none of them hidden. Links are followed, to each directory once and to none around. A
    directory that cannot be listed goes into the report.
    """

    def tell(error: OSError) -> None:
        report.add("unreadable", f"{error.filename}: {error.strerror}")

    found: list[Path] = []
    seen = {str(around) for around in Path(os.path.realpath(home)).parents}
    for place, directories, names in os.walk(home, onerror=tell, followlinks=True):
        real = os.path.realpath(place)
        directories[:] = [] if real in seen else sorted(name for name in directories if not _is_hidden(name))
        found += [Path(place, name) for name in names if real not in seen and not _is_hidden(name)]
        seen.add(real)
    return sorted(found)


def _check_classes(directory: Path, classes: Sequence[str]) -> None:
    words = set(itertools.chain(*PART_WORDS.values()))
    if len(classes) < 2:
        hint = "; if it is a class itself, move all classes into a directory train/"
        raise DataError(
            f"{directory}: {len(classes)} class directories; a classifier needs two or more"
            + (hint if directory.name.lower() in words else "")
        )
    if odd := [name for name in classes if name.encode(errors="ignore").decode() != name]:
        raise DataError(
            f"{directory}: names of classes are not UTF-8: {', '.join(map(ascii, odd[:MOST_NAMES]))}; rename the "
            f"director{'y' if len(odd) == 1 else 'ies'}"
        )
    if {name.lower() for name in classes} <= words:
        raise DataError(
            f"{directory}: its directories {', '.join(classes)} are named like parts of a set, not like classes; "
            "name a directory that holds train/, with a directory for each class in it"
        )


def _is_hidden(name: str) -> bool:
    """What systems and tools put between one's files: .DS_Store, ._copies, .ipynb_checkpoints, __MACOSX."""
    return name.startswith(".") or name == "__MACOSX"


def _open_lists(name: str, directory: Path, lists: dict[str, Path], image_root: str | None) -> ImageSet:
    """One text line per image, as ImageNet-LT, Places-LT and iNaturalist 2018 have them."""
    report = Report()
    read = {part: read_list(file, report) for part, file in lists.items()}
    if "heldout" in read and "test" in read and read["heldout"].same_lines(read["test"]):
        del read["heldout"]  # as iNaturalist 2018 is used: the validation images are the test images
    root = Path(image_root) if image_root is not None else directory
    if not root.is_dir():
        raise DataError(f"image_root={root}: no such directory")
    sources = {}
    for part, entries in read.items():
        base, dropped = image_root_of(root, entries)
        paths = [os.path.join(base, path.split("/", dropped)[-1] if dropped else path) for path in entries.paths]
        sources[part] = Source(entries.labels, Files(paths))
    names = _names_beside(directory) or _names_of_directories(read["train"], _n_classes(read["train"].labels))
    return _checked(name, directory, names, sources, report)


def _names_of_directories(entries: ListFile, n_classes: int) -> list[str] | None:
    """Where each class has a directory to itself, its name."""
    found: dict[int, set[str]] = {}
    for path, label in zip(entries.paths, entries.labels.tolist(), strict=True):
        found.setdefault(label, set()).add(os.path.basename(os.path.dirname(path)))
    names = [next(iter(found[c])) if len(found.get(c, ())) == 1 else "" for c in range(n_classes)]
    return names if all(names) and len(set(names)) == len(names) else None


def _open_parquet(name: str, directory: Path) -> ImageSet:
    """train*.parquet, val*.parquet, test*.parquet; bytes or the {bytes, path} struct of Hugging Face."""
    train, naming = _read_parquet(directory, _parquet_files(directory, "train"))
    sources = {"train": train}
    for part in ("heldout", "test"):
        if files := _parquet_files(directory, part):
            sources[part], others = _read_parquet(directory, files)
            naming |= others
    return _checked(name, directory, _names_beside(directory) or _agreed_names(naming), sources, Report())


def _agreed_names(naming: dict[Path, list[str]]) -> list[str] | None:
    """
    The one list of class names that all files carry, if any does.

    Raises:
        DataError: where two files name the classes differently, so that a label means one thing here and another there.
    """
    for (file, names), (other, others) in itertools.pairwise(naming.items()):
        if names != others:
            pairs = enumerate(itertools.zip_longest(names, others))
            label, (one, another) = next((label, pair) for label, pair in pairs if pair[0] != pair[1])
            raise DataError(
                f"{file} names class {label} {one!r}, {other} names it {another!r}; write all with the same class names"
            )
    return next(iter(naming.values()), None)


def _parquet_files(directory: Path, part: str) -> list[Path]:
    """In alphabetical order, those whose names begin with one of `PART_WORDS`, in any case of letters."""
    files = (file for file in directory.iterdir() if file.name.lower().endswith(".parquet"))
    return sorted(file for file in files if file.name.lower().startswith(PART_WORDS[part]))


def _read_parquet(directory: Path, files: list[Path]) -> tuple[Source, dict[Path, list[str]]]:
    """Their rows, and the class names that each of the files carries, if it does."""
    import pyarrow

    if not files:
        raise DataError(f"{directory}: no train*.parquet there")
    read = {file: _read_shard(file) for file in files}
    try:
        table = pyarrow.concat_tables([shard for shard, _ in read.values()], promote_options="permissive")
    except pyarrow.ArrowException as error:
        raise DataError(f"{directory}: the parquet files do not belong together: {error}") from None
    if not len(table):
        raise DataError(f"{directory}: no rows in {', '.join(file.name for file in files)}")
    rows = Rows(str(directory), table["image"])
    labels = table["label"].cast(pyarrow.int64(), safe=False).fill_null(NO_LABEL).to_numpy()
    return Source(labels, rows), {file: names for file, (_, names) in read.items() if names}


def _read_shard(file: Path) -> tuple[Any, list[str] | None]:
    """A pyarrow.Table of the columns image (binary) and label (integers), and the class names that the file carries."""
    import pyarrow
    import pyarrow.compute
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(file)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{file}: cannot be read as parquet: {error}") from None
    image = _column(file, table.column_names, IMAGE_COLUMNS)
    label = _column(file, table.column_names, LABEL_COLUMNS)
    images, labels = table[image], table[label]
    if pyarrow.types.is_struct(images.type) and images.type.get_field_index("bytes") >= 0:
        images = pyarrow.compute.struct_field(images, "bytes")
    if not _is_binary(images.type):
        raise DataError(
            f"{file}: column {image} holds {table[image].type}; image files are wanted as binary, or as bytes in a "
            "struct of bytes and path"
        )
    if not pyarrow.types.is_integer(labels.type):
        raise DataError(f"{file}: column {label} holds {labels.type}; labels must be whole numbers from 0")
    return pyarrow.table({"image": images, "label": labels}), _feature_names(table, label)


def _is_binary(kind: Any) -> bool:
    """Whether the elements of a pyarrow.DataType are bytes in Python."""
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    tests = (types.is_binary, types.is_large_binary, types.is_fixed_size_binary, types.is_binary_view)
    return any(test(kind) for test in tests)


def _column(file: Path, found: list[str], wanted: Sequence[str]) -> str:
    for name in wanted:
        if name in found:
            return name
    raise DataError(f"{file}: columns {', '.join(found)}; one of them must be named {' or '.join(wanted)}")


def _feature_names(table: Any, label: str) -> list[str] | None:
    """Class names as the `datasets` library stores them in a parquet schema."""
    metadata = (table.schema.metadata or {}).get(b"huggingface")
    if metadata is None:
        return None
    names: list[str] | None = json.loads(metadata).get("info", {}).get("features", {}).get(label, {}).get("names")
    return names


def _names_beside(directory: Path) -> list[str] | None:
    """
    classes.txt: one name a line, in the order of the labels.

    Raises:
        DataError: where it is not UTF-8.
    """
    file = directory / "classes.txt"
    if not file.is_file():
        return None
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8-sig").rstrip().split("\n")]
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: cannot be read as text: {error}") from None


def unnamed_classes(n_classes: int) -> tuple[str, ...]:
    """What the classes of a set are called that does not name them."""
    return tuple(f"class {c}" for c in range(n_classes))


def _n_classes(labels: np.ndarray) -> int:
    """One more than the largest label that `labels` (N,) can have without gaps; a stray large one does not count."""
    possible = labels[(labels >= 0) & (labels < len(labels))]
    return int(possible.max()) + 1 if len(possible) else 0


def _checked(
    name: str, directory: Path, names: Sequence[str] | None, sources: dict[str, Source], report: Report
) -> ImageSet:
    """The set, its labels compared with its class names, or with the training labels where it has no names."""
    if names is None:
        names = unnamed_classes(_n_classes(sources["train"].labels))
    if len(names) < 2:
        raise DataError(f"{directory}: {len(names)} classes; a classifier needs two or more")
    if odd := sorted(name for name, times in Counter(names).items() if times > 1 or not name):
        shown = ", ".join(map(repr, odd[:MOST_NAMES]))
        raise DataError(f"{directory}: classes without a name of their own: {shown}; give each another")
    for source in sources.values():
        wrong = np.flatnonzero((source.labels < 0) | (source.labels >= len(names))).tolist()
        told = ((source.images.name(p), label_text(source.labels[p])) for p in wrong)
        report.add_all(
            "label out of range", (f"{image} has {label}, there are {len(names)} classes" for image, label in told)
        )
    present = sources["train"].counts(len(names))
    report.add_all(
        "empty class",
        (f"no training images of label {c} ({names[c]}); labels go from 0 to {len(names) - 1}"
         for c in np.flatnonzero(present == 0).tolist()),
    )  # fmt: skip
    for part, what in (("heldout", "validation"), ("test", "test")):
        if part in sources:
            lacking = sorted(set(range(len(names))) - set(sources[part].labels.tolist()))
            report.add_all(
                "class without such images", (f"no {what} images of label {c} ({names[c]})" for c in lacking)
            )
    return ImageSet(name, names, sources["train"], sources.get("heldout"), sources.get("test"), report)


def label_text(label: int) -> str:
    """A label as messages say it."""
    return "no label" if label == NO_LABEL else f"label {label}"


def _open_torchvision(name: str) -> ImageSet:
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
        return Source(np.array(part.targets, np.int64), Pixels(name, part.data))

    return ImageSet(name, list(train.classes), source(train), test=source(test))
