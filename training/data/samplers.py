"""In which order an epoch visits the training images."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

IMAGES_PER_CLASS = 4  # of class-aware sampling, one after another


def shuffled(labels: Tensor, generator: torch.Generator) -> Tensor:
    """(N,): every image once, in random order (instance-balanced)."""
    return torch.randperm(len(labels), generator=generator)


def class_balanced(labels: Tensor, generator: torch.Generator) -> Tensor:
    """
    (N,): the class uniform, then the next image of that class's reshuffled list; N draws.

    A class's list is reshuffled each time it has been used up, so within a class images appear equally often.
    """
    classes = torch.unique(labels)
    return _next_images(labels, classes[torch.randint(len(classes), (len(labels),), generator=generator)], generator)


def class_aware(labels: Tensor, generator: torch.Generator) -> Tensor:
    """
    (N,): the next class of a reshuffled list of all, then the next four images of that class's reshuffled list.

    Source: the public code of OLTR, arXiv:1904.05160, and of decoupled training, arXiv:1910.09217.
    """
    classes = torch.unique(labels)
    rounds = -(-len(labels) // (IMAGES_PER_CLASS * len(classes)))
    passes = torch.cat([classes[torch.randperm(len(classes), generator=generator)] for _ in range(rounds)])
    return _next_images(labels, passes.repeat_interleave(IMAGES_PER_CLASS)[: len(labels)], generator)


def reversed_frequency(labels: Tensor, generator: torch.Generator) -> Tensor:
    """(N,): class c with probability proportional to 1/n_c, then any of its images; draws are independent."""
    _, places, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    drawn = torch.multinomial(1 / counts.double(), len(labels), replacement=True, generator=generator)
    by_class = torch.argsort(places, stable=True)
    within = (torch.rand(len(labels), generator=generator, dtype=torch.float64) * counts[drawn]).long()
    return by_class[(counts.cumsum(0) - counts)[drawn] + within]


def uniform_and_reversed(batch_size: int) -> Callable[[Tensor, torch.Generator], Tensor]:
    """
    A sampler: of every `batch_size` images the first half are `shuffled`, the other half `reversed_frequency`.

    Images left over make no batch, as in the public code, but where there is no other: each half is normalised by
    itself, which one image cannot be.

    Args:
        batch_size: even, of the stage.

    Source: BBN, arXiv:1912.02413.
    """

    def sampler(labels: Tensor, generator: torch.Generator) -> Tensor:
        uniform, rare = shuffled(labels, generator), reversed_frequency(labels, generator)
        half = min(batch_size // 2, len(labels))
        whole = len(labels) // half * half
        return torch.stack([uniform[:whole].view(-1, half), rare[:whole].view(-1, half)], dim=1).flatten()

    return sampler


def of_classes(classes: Sequence[int]) -> Callable[[Tensor, torch.Generator], Tensor]:
    """A sampler: the images of `classes` alone, each once, in random order."""

    def sampler(labels: Tensor, generator: torch.Generator) -> Tensor:
        members = torch.nonzero(torch.isin(labels, torch.tensor(classes))).flatten()
        return members[torch.randperm(len(members), generator=generator)]

    return sampler


def _next_images(labels: Tensor, drawn: Tensor, generator: torch.Generator) -> Tensor:
    """An image for each class of `drawn`: the next one of that class's list, which is reshuffled when used up."""
    order = torch.empty(len(drawn), dtype=torch.long)
    for label in torch.unique(labels):
        members = torch.nonzero(labels == label).flatten()
        places = torch.nonzero(drawn == label).flatten()
        rounds = -(-len(places) // len(members))
        passes = [members[torch.randperm(len(members), generator=generator)] for _ in range(rounds)]
        if passes:
            order[places] = torch.cat(passes)[: len(places)]
    return order


SAMPLERS = {"shuffled": shuffled, "class_balanced": class_balanced, "class_aware": class_aware}


def batch_sizes(count: int, batch_size: int) -> list[int]:
    """
    Of an epoch's batches. The last may be smaller; a single image left over joins the batch before, as batch norms have
    nothing to normalise one by where its last feature map has one pixel.
    """
    sizes = [batch_size] * (count // batch_size)
    left = count % batch_size
    if left == 1 and sizes:
        sizes[-1] += 1
    elif left:
        sizes.append(left)
    return sizes
