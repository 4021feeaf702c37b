"""The images of a training: chosen from a set, split, and decoded or ready to be."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from training.data.check import Depth, check_data, examine, workers_for
from training.data.images import Fit, fit, read_image
from training.data.longtail import SPLITS, class_counts, draw_subset, split_of
from training.data.report import DataError, Report
from training.data.sources import ImageSet, Source, open_set
from training.data.streamed import StreamedImages, fits_in_memory
from training.distributed import from_first, world_size
from training.recipe import Decoding, Recipe

STATISTICS_IMAGES = 5000  # of a streamed set
STATISTICS_BATCH = 256
_PARTS = {"train": "training images", "heldout": "held-out images", "test": "test images"}


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

    def in_order(self, batch_size: int) -> Iterator[Tensor]:
        """All images in batches (B, H, W, 3)."""
        yield from self.pixels.split(batch_size)


AnyImages: TypeAlias = Images | StreamedImages


@dataclass(frozen=True)
class Data:
    """
    What a training needs.

    Attributes:
        classes: C names.
        counts: C numbers of training images.
        train, heldout, test: heldout is for choices such as thresholds, test for figures only.
        heldout_note: where the held-out images come from, to stand beside every figure made with them.
        report: what is odd about the set, none of it an error.
        digest: of the training images, their labels and their order, wherever they lie.
        unseen_digest: of the held-out and test images, likewise.
    """

    classes: tuple[str, ...]
    counts: tuple[int, ...]
    train: AnyImages
    heldout: AnyImages
    test: AnyImages
    heldout_note: str
    report: Report = field(default_factory=Report)
    digest: str = ""
    unseen_digest: str = ""

    @property
    def decoding(self) -> Decoding:
        """How the images are decoded: "resident" or "streamed", never "auto"."""
        return "streamed" if isinstance(self.train, StreamedImages) else "resident"


@dataclass(frozen=True)
class Shares:
    """Which images of which source are for what: pairs of a source and positions in it."""

    train: tuple[Source, np.ndarray]
    heldout: tuple[Source, np.ndarray]
    test: tuple[Source, np.ndarray]
    heldout_note: str

    def parts(self) -> dict[str, tuple[Source, np.ndarray]]:
        """By "train", "heldout", "test"."""
        return {"train": self.train, "heldout": self.heldout, "test": self.test}


def load_data(recipe: Recipe, *, checked: bool = False) -> Data:
    """
    The images of `recipe`, checked and split; decoded, where they fit in memory.

    Args:
        checked: every image was decoded before, at the start of the same training: streamed ones are looked at by
            their headers only.

    Raises:
        DataError: for a set that is missing or too small, or with everything that is wrong with its images at once.
    """
    if world_size() > 1:
        from_first(lambda: open_set(recipe) and None)  # what has to be downloaded is there for the others
    image_set = open_set(recipe)
    total = sum(len(source) for source in image_set.parts().values())
    fits = from_first(lambda: fits_in_memory(total, recipe))  # all processes must agree
    whole = recipe.crop == "padded" and fits  # other crops need the image in its own size
    streamed = recipe.decoding == "streamed" or (recipe.decoding == "auto" and not whole)
    if recipe.decoding == "resident" and recipe.crop == "resized":
        raise DataError(
            "decoding=resident: keeps images in the input's size, crop=resized needs their own; auto or streamed"
        )
    depth: Depth = "bytes" if not streamed else "headers" if checked else "pixels"

    def check() -> tuple[Report, dict[str, np.ndarray]]:
        digests = examine(image_set, depth, workers_for(recipe))
        again = image_set.report.has_errors and depth != "pixels"
        return check_data(recipe) if again else image_set.report, digests

    report, digests = from_first(check)
    report.raise_errors(image_set.name)
    shares = share_out(image_set, recipe, report)
    report.raise_errors(image_set.name)
    if recipe.profile != "natural" and recipe.subset_order == "first" and (np.diff(image_set.train.labels) >= 0).all():
        report.add("sorted", image_set.name)
    parts: dict[str, AnyImages] = {}
    for name, (source, positions) in shares.parts().items():
        # padded crops are taken of the whole image, streamed or resident
        how = "crop" if name == "train" and recipe.crop == "padded" else recipe.test_fit
        if streamed:
            labels = torch.from_numpy(source.labels[positions])
            viewed = dataclasses.replace(recipe, test_fit=how)
            parts[name] = StreamedImages(source, positions, viewed, labels, workers_for(recipe))
        else:
            parts[name] = _decoded(source, positions, recipe.image_size, how, report)
    report.raise_errors(image_set.name)
    counts = np.bincount(parts["train"].labels, minlength=len(image_set.classes))
    of_source = {id(source): digests[name] for name, source in image_set.parts().items()}
    return Data(
        classes=tuple(image_set.classes), counts=tuple(counts.tolist()), heldout_note=shares.heldout_note,
        report=report, digest=_digest(of_source, shares.train),
        unseen_digest=_digest(of_source, shares.heldout, shares.test), **parts,
    )  # fmt: skip


def share_out(image_set: ImageSet, recipe: Recipe, report: Report) -> Shares:
    """
    Which images are for what. Into the report go classes of a natural set that are too small for a drawn part, and a
    set of which nothing is held out.

    Raises:
        DataError: where the profile asks for more than the set has.
    """
    classes, train, test = image_set.classes, image_set.train, image_set.test
    labels = train.labels
    all_tested = np.arange(len(test)) if test is not None else np.empty(0, np.int64)
    if recipe.profile == "natural":
        least = 3
        most = len(labels) if recipe.n_max is None else recipe.n_max
        left = _drawn(labels, lambda size: min(size, most), len(classes), recipe.subset_seed)
        sizes = np.bincount(labels[left], minlength=len(classes))
        if test is None:
            tested = partial(_taken, share=recipe.test_share)
            all_tested = left[_drawn(labels[left], tested, len(classes), recipe.subset_seed + 1)]
            left = np.setdiff1d(left, all_tested)
            least = next(n for n in itertools.count() if n - _taken(n, recipe.test_share) > 2)
            _tell_small(classes, sizes, labels[all_tested], "test images", report)
        if image_set.heldout is not None:
            heldout, chosen, note = np.arange(len(image_set.heldout)), left, "the set's own validation images"
        else:
            kept = partial(_taken, share=recipe.holdout_share)
            heldout = left[_drawn(labels[left], kept, len(classes), recipe.subset_seed)]
            chosen = np.setdiff1d(left, heldout)
            note = f"{recipe.holdout_share:.0%} of each class's training images, seed {recipe.subset_seed}"
            small = _tell_small(classes, sizes, labels[heldout], "held-out images", report)
            note += f"; none for {small} of {len(classes)} classes" if small else ""
        aside = image_set.heldout or train
        needed = f"classes need {least} or more each"
        if recipe.n_max is not None and recipe.n_max < least:
            needed += f", n_max={recipe.n_max} leaves fewer"
    else:
        if test is None:
            raise DataError(
                f"{image_set.name}: profile={recipe.profile} thins a set that has test images of its own, and this one "
                "has none; --set profile=natural --set mean=none --set std=none takes its images as they are"
            )
        sizes = np.bincount(labels, minlength=len(classes))
        try:
            n_max = recipe.n_max or int(sizes[0])
            counts = class_counts(n_max, recipe.imbalance, len(classes), recipe.profile)
            chosen = draw_subset(labels, counts, recipe.subset_seed, recipe.subset_order)
        except ValueError as error:
            raise DataError(f"{image_set.name}: {error}") from None
        left = np.setdiff1d(np.arange(len(labels)), chosen)
        left = np.random.default_rng(recipe.subset_seed).permutation(left)
        heldout = np.concatenate([left[labels[left] == c][: recipe.holdout_per_class] for c in range(len(classes))])
        missing = sorted(set(range(len(classes))) - set(labels[heldout].tolist()))
        note = f"training images that the long-tailed subset leaves out, up to {recipe.holdout_per_class} a class" + (
            f"; none for {', '.join(classes[c] for c in missing)}" if missing else ""
        )
        aside = train
        needed = f"profile={recipe.profile} takes all with imbalance={recipe.imbalance:g}; lower n_max ({n_max})"
    if not len(heldout):
        report.add("nothing held out", needed)
    return Shares((train, chosen), (aside, heldout), (train if test is None else test, all_tested), note)


def summary_of(image_set: ImageSet, shares: Shares | None) -> str:
    """
    How many classes and images there are, and how unevenly.

    Args:
        shares: as a training takes them; None: where errors keep it from taking any, as they lie there.
    """
    classes = image_set.classes
    taken = {name: (source, np.arange(len(source))) for name, source in image_set.parts().items()}
    sizes = {name: len(positions) for name, (_, positions) in (shares.parts() if shares else taken).items()}
    parts = ", ".join(f"{size:,} {_PARTS[name]}" for name, size in sizes.items())
    source, positions = shares.train if shares else taken["train"]
    counts = Source(source.labels[positions], source.images).counts(len(classes))
    splits = Counter(split_of(count) for count in counts.tolist())
    largest, smallest = int(counts.argmax()), int(counts.argmin())
    return (
        f"{len(counts)} classes; {parts}; from {counts[largest]:,} ({classes[largest]}) to {counts[smallest]:,} "
        f"({classes[smallest]}) training images, " + ", ".join(f"{splits[name]} classes {name}" for name in SPLITS)
    )


def _digest(of_source: Mapping[int, np.ndarray], *chosen: tuple[Source, np.ndarray]) -> str:
    """
    Of the chosen images.

    Args:
        of_source: by the id of a source, the digests (N, 16) of its images.
        chosen: pairs of a source and positions in it.
    """
    whole = hashlib.blake2b(digest_size=16)
    for source, positions in chosen:
        whole.update(of_source[id(source)][positions].tobytes())
        whole.update(source.labels[positions].astype("<i8").tobytes())
    return whole.hexdigest()


def _decoded(source: Source, positions: np.ndarray, size: int, how: Fit, report: Report) -> Images:
    """The images, decoded; what cannot be read goes into the report."""
    pixels = np.zeros((len(positions), size, size, 3), np.uint8)
    for row, position in enumerate(positions):
        try:
            content = source.images.read(int(position))
            if isinstance(content, bytes):
                pixels[row] = read_image(content, size, how)
            else:
                pixels[row] = np.asarray(fit(Image.fromarray(content), size, size, how))
        except (OSError, ValueError) as error:
            report.add("unreadable", f"{source.images.name(int(position))}: {error}")
    return Images(torch.from_numpy(pixels), torch.from_numpy(source.labels[positions]))


def channel_statistics(images: AnyImages) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """
    Mean and standard deviation per channel (R, G, B) of pixels in [0, 1], rounded to four digits.

    The deviation is 1 of a channel that is the same everywhere, as in images of one fluorescent dye. Of a streamed
    set, those of at most 5,000 images, evenly spread over it.
    """
    batches = images.in_order(STATISTICS_BATCH)
    if isinstance(images, StreamedImages):
        chosen = torch.linspace(0, len(images) - 1, min(STATISTICS_IMAGES, len(images))).round().long()
        sample = dataclasses.replace(images, positions=images.positions[chosen], labels=images.labels[chosen])
        batches = sample.in_order(STATISTICS_BATCH)
    seen = sum(torch.stack([batch[..., c].flatten().bincount(minlength=256) for c in range(3)]) for batch in batches)
    histogram = torch.as_tensor(seen).double()  # (3, 256): how often each channel has each value
    values = torch.arange(256, device=histogram.device).double() / 255
    total = histogram.sum(dim=1)
    mean = (histogram * values).sum(dim=1) / total
    variance = (histogram * (values - mean.unsqueeze(1)).square()).sum(dim=1) / (total - 1)
    rounded = [tuple(round(float(value), 4) for value in numbers) for numbers in (mean, variance.sqrt())]
    return rounded[0], tuple(value or 1.0 for value in rounded[1])


def _drawn(labels: np.ndarray, how_many: Callable[[int], int], n_classes: int, seed: int) -> np.ndarray:
    """Positions of so many images of each class, at random, in their order; `how_many`: of a class of that size."""
    generator = np.random.default_rng(seed)
    parts = [generator.permutation(np.flatnonzero(labels == label)) for label in range(n_classes)]
    return np.sort(np.concatenate([part[: how_many(len(part))] for part in parts]))


def _taken(size: int, share: float) -> int:
    """How many of a class are `share` of it: at least one where it has three images, none of fewer."""
    return max(round(share * size), 1) if size > 2 else 0


def _tell_small(classes: Sequence[str], sizes: np.ndarray, drawn: np.ndarray, what: str, report: Report) -> int:
    """
    How many classes have no label among those `drawn`; each is told.

    Args:
        sizes: (C,), images that each class had to draw from.
    """
    small = np.flatnonzero(np.bincount(drawn, minlength=len(classes)) == 0).tolist()
    report.add_all("class without such images", (f"{classes[c]}: {sizes[c]} are too few to draw {what}" for c in small))
    return len(small)
