"""CIFAR ResNets of 6·n + 2 layers (20, 32, 44, 56), cut after their first stage into a trunk and an expert."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BLOCKS = 5  # n, per stage, of ResNet-32
TRUNK_WIDTH = 16


class Subsampled(nn.Module):
    """A shortcut without parameters (option A): every second row and column, and channels of zeros on both sides."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.width_in, self.width, self.stride = width_in, width, stride
        self.padding = (width - width_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        """(B, width_in, H, W) -> (B, width, H/stride, W/stride)."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))

    def as_convolution(self) -> nn.Conv2d:
        """The same as a 1x1 convolution of ones and zeros, exact in every precision."""
        convolution = nn.Conv2d(self.width_in, self.width, 1, self.stride, bias=False)
        with torch.no_grad():
            nn.init.zeros_(convolution.weight)[self.padding : self.padding + self.width_in, :, 0, 0].fill_diagonal_(1)
        return convolution


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is `Subsampled` where the width grows."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity() if width == width_in else Subsampled(width_in, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width_in, H, W) -> (B, width, H/stride, W/stride)."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


def _stage(width_in: int, width: int, stride: int, blocks: int) -> nn.Sequential:
    return nn.Sequential(BasicBlock(width_in, width, stride), *(BasicBlock(width, width, 1) for _ in range(blocks - 1)))


def trunk(blocks: int = BLOCKS) -> nn.Sequential:
    """(B, 3, H, W) -> (B, 16, H, W): the first convolution and the first stage of `blocks` blocks."""
    layers = nn.Sequential(
        nn.Conv2d(3, TRUNK_WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(TRUNK_WIDTH), nn.ReLU(),
        _stage(TRUNK_WIDTH, TRUNK_WIDTH, 1, blocks),
    )  # fmt: skip
    initialise(layers)
    return layers


def expert_layers(reduced: bool, blocks: int = BLOCKS) -> nn.Sequential:
    """(B, 16, H, W) -> (B, D): stages two and three and the global average; D is 48 when reduced, else 64."""
    middle, last = (24, 48) if reduced else (32, 64)
    layers = nn.Sequential(
        _stage(TRUNK_WIDTH, middle, 2, blocks), _stage(middle, last, 2, blocks), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    initialise(layers)
    return layers


def initialise(layers: nn.Module) -> None:
    """Give convolutions the first weights of He et al., as the public code does."""
    for module in layers.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
