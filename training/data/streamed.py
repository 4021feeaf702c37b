"""Images that are decoded when they are needed, by worker processes."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from training.data.images import decode
from training.data.limits import free_memory
from training.data.report import MOST_SHOWN, UnreadableError
from training.data.samplers import batch_sizes
from training.data.sources import Source
from training.data.views import evaluation_view, train_view
from training.distributed import gather_rows, own_rows
from training.recipe import Recipe

CHUNK = 64  # images that a worker decodes at a time where there are no batches
MEMORY_SHARE = 0.25


@dataclass(frozen=True)
class StreamedImages:
    """
    Images on the disk; has what `Images` has, and decodes.

    Attributes:
        source: where they come from.
        positions: (N,), which of its images.
        recipe: how they are viewed.
        labels: (N,), int64, on the device on which pixels arrive too.
        workers: processes that decode; 0: this one.
    """

    source: Source
    positions: np.ndarray
    recipe: Recipe
    labels: Tensor
    workers: int

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> StreamedImages:
        """The same images, arriving on `device`."""
        return replace(self, labels=self.labels.to(device))

    @property
    def pixels(self) -> Tensor:
        """All of them decoded: (N, S, S, 3), uint8. Takes the memory that streaming was to save."""
        return self._whole(np.arange(len(self)))

    def even_sample(self, size: int) -> Tensor:
        """The pixels of at most `size` images, evenly spread over all: (size, S, S, 3)."""
        return self._whole(torch.linspace(0, len(self) - 1, min(size, len(self))).round().long().numpy())

    def in_order(self, batch_size: int) -> Iterator[Tensor]:
        """All images as evaluation sees them, in batches (B, S, S, 3)."""
        yield from self._decoded(np.arange(len(self)), _chunks(len(self), batch_size), None)

    def training_batches(
        self, order: Tensor, batch_size: int, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """
        Augmented images (B, S, S, 3) uint8 and labels (B,) in `order`, in batches as `batch_sizes` has them.

        What is drawn for an image depends on the seed of `generator` and the image's place in `order` alone, not on
        workers, processes or batch size. Of several processes each decodes its own rows and gets all.
        """
        positions = order.numpy()
        batches = _ranges(batch_sizes(len(positions), batch_size))
        own = [batch[own_rows(len(batch))] for batch in batches]
        for batch, pixels in zip(batches, self._decoded(positions, own, generator.initial_seed()), strict=True):
            yield gather_rows(pixels, len(batch)), self.labels[order[batch[0] : batch[-1] + 1].to(self.labels.device)]

    def _whole(self, rows: np.ndarray) -> Tensor:
        return torch.cat(list(self._decoded(rows, _chunks(len(rows), CHUNK), None)))

    def _decoded(self, rows: np.ndarray, batches: Sequence[Sequence[int]], seed: int | None) -> Iterator[Tensor]:
        """The images rows[batch] of each batch, (B, S, S, 3), on the device."""
        views = _Views(self.source, self.positions[rows], self.recipe, seed)
        loader = DataLoader(
            views, batch_sampler=batches, num_workers=min(self.workers, len(batches)), collate_fn=list,  # type: ignore[arg-type]
            pin_memory=False, worker_init_fn=_end_with_parent,
        )  # fmt: skip
        size = self.recipe.image_size
        for decoded in loader:
            failed = [each for each in decoded if isinstance(each, str)]
            if failed:
                raise UnreadableError("images cannot be read any more:\n  " + "\n  ".join(failed[:MOST_SHOWN]))
            pixels = np.stack(decoded) if decoded else np.empty((0, size, size, 3), np.uint8)
            yield torch.from_numpy(pixels).to(self.labels.device)


def _end_with_parent(_: int) -> None:
    """Let this worker end when its parent is gone: it might wait for ever for somebody to take what it decoded."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _Views(Dataset[np.ndarray | str]):
    """Views of chosen images, in whichever process; a message where one cannot be read."""

    def __init__(self, source: Source, positions: np.ndarray, recipe: Recipe, seed: int | None) -> None:
        self.source, self.positions, self.recipe, self.seed = source, positions, recipe, seed

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, place: int) -> np.ndarray | str:
        position = int(self.positions[place])
        try:
            content = self.source.images.read(position)
            image = decode(content) if isinstance(content, bytes) else Image.fromarray(content)
        except (OSError, ValueError) as error:
            return f"{self.source.images.name(position)}: {error}"
        if self.seed is None:
            return evaluation_view(image, self.recipe)
        drawn = np.random.SeedSequence([self.seed, place]).generate_state(1, np.uint64)[0]
        return train_view(image, self.recipe, torch.Generator().manual_seed(int(drawn >> np.uint64(1))))


def fits_in_memory(n_images: int, recipe: Recipe) -> bool:
    """Whether that many decoded images take less than a quarter of the memory that is free for this process."""
    free = free_memory() / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if torch.cuda.is_available():
        free = min(free, torch.cuda.mem_get_info()[0])
    return n_images * recipe.image_size**2 * 3 <= MEMORY_SHARE * free


def _ranges(sizes: Sequence[int]) -> list[range]:
    """Consecutive ranges of these sizes."""
    ends = [*itertools.accumulate(sizes)]
    return [range(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def _chunks(count: int, size: int) -> list[range]:
    """Ranges of `size`, the last one shorter."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]
