"""In which order an epoch visits the training images."""

from __future__ import annotations

import torch
from torch import Tensor


def shuffled(labels: Tensor, generator: torch.Generator) -> Tensor:
    """(N,): every image once, in random order (instance-balanced)."""
    return torch.randperm(len(labels), generator=generator)


def class_balanced(labels: Tensor, generator: torch.Generator) -> Tensor:
    """
    (N,): the class uniform, then the next image of that class's reshuffled list; N draws.

    A class's list is reshuffled each time it has been used up, so within a class images appear equally often.
    """
    classes = torch.unique(labels)
    drawn = classes[torch.randint(len(classes), (len(labels),), generator=generator)]
    order = torch.empty(len(labels), dtype=torch.long)
    for label in classes:
        members = torch.nonzero(labels == label).flatten()
        places = torch.nonzero(drawn == label).flatten()
        rounds = -(-len(places) // len(members))
        passes = [members[torch.randperm(len(members), generator=generator)] for _ in range(rounds)]
        if passes:
            order[places] = torch.cat(passes)[: len(places)]
    return order


SAMPLERS = {"shuffled": shuffled, "class_balanced": class_balanced}
