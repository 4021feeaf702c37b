"""
CIFAR ResNet-32 cut after its second stage, with experts that fuse their deep features with shallower ones.

Source: SHIKE, arXiv:2304.01279, depth-wise knowledge fusion; sizes as in its public code.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.models.resnet_cifar import BLOCKS, BasicBlock, initialise

LOW_WIDTH, HIGH_WIDTH = 16, 32  # of the first and of the second stage


class ProjectionBlock(BasicBlock):
    """A basic block whose shortcut, where the width grows, is a 1x1 convolution with batch norm (option B)."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__(width_in, width, stride)
        if width != width_in:
            self.shortcut = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))


class TwoLevelTrunk(nn.Module):
    """First convolution, first and second stage; the outputs of both stages, one after the other, in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Sequential(
            nn.Conv2d(3, LOW_WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(LOW_WIDTH), nn.ReLU(),
            _stage(LOW_WIDTH, LOW_WIDTH, 1),
        )  # fmt: skip
        self.high = _stage(LOW_WIDTH, HIGH_WIDTH, 2)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, 16·S² + 32·⌈S/2⌉²)."""
        low = self.low(images)
        return torch.cat([low.flatten(1), self.high(low).flatten(1)], dim=1)


class FusionLayers(nn.Module):
    """
    A last stage of its own, times a shallow branch of the same size, element by element, then the global average.

    Experts alternate in where the branch starts: those of even index at the first stage (two convolutions), those of
    odd index at the second (one).

    Args:
        index: of the expert, from 0.
        width: D, of the last stage.
        image_size: S, side of the images, pixels; it tells where in the trunk's output the second level begins.
    """

    def __init__(self, index: int, width: int, image_size: int) -> None:
        super().__init__()
        self.low_side, self.high_side = image_size, -(-image_size // 2)
        self.deep = _stage(HIGH_WIDTH, width, 2)
        self.starts_low = index % 2 == 0
        if self.starts_low:
            self.shallow = nn.Sequential(
                nn.Conv2d(LOW_WIDTH, HIGH_WIDTH, 3, 2, padding=1, bias=False), nn.BatchNorm2d(HIGH_WIDTH), nn.ReLU(),
                nn.Conv2d(HIGH_WIDTH, width, 3, 2, padding=1, bias=False), nn.BatchNorm2d(width),
            )  # fmt: skip
        else:
            self.shallow = nn.Sequential(
                nn.Conv2d(HIGH_WIDTH, width, 3, 2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
            )
        initialise(self.deep)  # the shallow branch begins as torch has it, as in the public code

    def forward(self, levels: Tensor) -> Tensor:
        """(B, 16·S² + 32·⌈S/2⌉²) -> (B, D)."""
        cut = LOW_WIDTH * self.low_side**2
        high = levels[:, cut:].unflatten(1, (HIGH_WIDTH, self.high_side, self.high_side))
        start = levels[:, :cut].unflatten(1, (LOW_WIDTH, self.low_side, self.low_side)) if self.starts_low else high
        fused = self.deep(high).float() * self.shallow(start).float()  # (B, D, S/4, S/4), beyond fp16's range
        return F.adaptive_avg_pool2d(fused, 1).flatten(1)


def _stage(width_in: int, width: int, stride: int) -> nn.Sequential:
    blocks = [ProjectionBlock(width_in, width, stride), *(ProjectionBlock(width, width, 1) for _ in range(BLOCKS - 1))]
    return nn.Sequential(*blocks)
