"""Images of a batch mixed with one another, and labels that say how much of each class is in them."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


class Mixing:
    """
    Mixup or CutMix of each image with the one at the mirrored place of its batch, under one share for the batch.

    Where both are on, a batch has either with probability 1/2. Where both are 0, images stay and labels are smoothed.

    Args:
        n_classes: C.
        mixup, cutmix: α of the Beta(α, α) from which the share is drawn; 0 turns it off.
        smoothing: part of each label that is spread evenly over all classes.

    Source: mixup, arXiv:1710.09412; CutMix, arXiv:1905.04899; put together as in Swin's public code.
    """

    def __init__(self, n_classes: int, mixup: float, cutmix: float, smoothing: float) -> None:
        self.n_classes, self.mixup, self.cutmix, self.smoothing = n_classes, mixup, cutmix, smoothing

    def __call__(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """
        Mix a batch in pairs.

        Args:
            images: (B, H, W, 3), uint8.
            labels: (B,).
            generator: on the CPU.

        Returns:
            Images (B, H, W, 3), uint8, mixed pixels rounded; targets (B, C), rows that sum to 1.
        """
        targets = F.one_hot(labels, self.n_classes).float()
        targets = targets * (1 - self.smoothing) + self.smoothing / self.n_classes
        draw = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
        kinds = [(kind, alpha) for kind, alpha in ((_mixup, self.mixup), (_cutmix, self.cutmix)) if alpha]
        if not kinds:
            return images, targets
        kind, alpha = kinds[draw.integers(len(kinds))]
        images, share = kind(images, float(draw.beta(alpha, alpha)), draw)
        return images, share * targets + (1 - share) * targets.flip(0)


def _mixup(images: Tensor, share: float, draw: np.random.Generator) -> tuple[Tensor, float]:
    mixed = share * images.float() + (1 - share) * images.flip(0).float()
    return mixed.round().to(torch.uint8), share


def _cutmix(images: Tensor, share: float, draw: np.random.Generator) -> tuple[Tensor, float]:
    """A rectangle about a uniform centre, of the area 1 − share before the border cuts it; the share that is left."""
    _, height, width, _ = images.shape
    side = math.sqrt(1 - share)
    (top, bottom), (left, right) = (_covered(length, side, draw) for length in (height, width))
    mixed = images.clone()
    mixed[:, top:bottom, left:right] = images.flip(0)[:, top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)


def _covered(length: int, side: float, draw: np.random.Generator) -> tuple[int, int]:
    half, centre = int(length * side) // 2, int(draw.integers(length))
    return max(centre - half, 0), min(centre + half, length)
