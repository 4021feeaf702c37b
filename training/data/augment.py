"""Crop, flip and rotation of a whole batch at once, on the device that holds the images."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

AUTO_AUGMENT_FILL = 128  # grey, as SHIKE has it


def augment(
    images: Tensor, generator: torch.Generator, *,
    crop_padding: int, flip: bool, rotation: float, auto_augment: bool = False, cutout: int = 0,
) -> Tensor:  # fmt: skip
    """
    Random crop of the zero-padded image, then flip, rotation about the centre, AutoAugment and Cutout.

    Args:
        images: (B, H, W, 3), uint8.
        generator: on the CPU, so that a seed means the same on every device.
        crop_padding: pixels on each side.
        rotation: degrees, uniform in ± this.
        auto_augment: one of AutoAugment's 25 sub-policies for CIFAR-10 on each image.
        cutout: side of the black square, pixels; 0: none.

    Returns:
        (B, H, W, 3), uint8.
    """
    batch = len(images)

    def whole(high: int) -> Tensor:
        return torch.randint(high + 1, (batch,), generator=generator)

    angle = (torch.rand(batch, generator=generator) * 2 - 1) * math.radians(rotation)
    shift_y, shift_x = whole(2 * crop_padding) - crop_padding, whole(2 * crop_padding) - crop_padding
    images = transform(images, shift_y, shift_x, whole(1).bool() & flip, angle)
    if auto_augment:
        images = _auto_augment(images, generator)
    return cut_out(images, cutout, generator) if cutout else images


def cut_out(images: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """
    Blacken one square of each image; its centre is uniform over the image, so part of it may fall outside.

    Args:
        images: (B, H, W, 3), uint8.
        side: pixels.

    Source: Cutout, arXiv:1708.04552.
    """
    batch, height, width, _ = images.shape

    def covered(length: int) -> Tensor:
        first = torch.randint(length, (batch, 1), generator=generator) - side // 2
        place = torch.arange(length)
        return ((place >= first) & (place < first + side)).to(images.device)  # (B, length)

    hole = covered(height).unsqueeze(2) & covered(width).unsqueeze(1)
    return images.masked_fill(hole.unsqueeze(-1), 0)


def _auto_augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image by itself, through Pillow: torchvision's faster way for images of this size."""
    policy = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10, fill=AUTO_AUGMENT_FILL)
    with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        changed = [np.asarray(policy(Image.fromarray(image))) for image in images.cpu().numpy()]
    return torch.from_numpy(np.stack(changed)).to(images.device)


def transform(images: Tensor, shift_y: Tensor, shift_x: Tensor, mirrored: Tensor, angle: Tensor) -> Tensor:
    """
    Shift, mirror and turn each image by its own amount.

    The three are one gather of whole pixels (nearest neighbour, zero fill), which equals doing them one after another.

    Args:
        images: (B, H, W, 3), uint8.
        shift_y, shift_x: (B,), pixels: output pixel (0, 0) shows the image's pixel (shift_y, shift_x).
        mirrored: (B,), bool.
        angle: (B,), radians, counter-clockwise.

    Returns:
        (B, H, W, 3), uint8.
    """
    batch, height, width, _ = images.shape
    device = images.device
    shift_y, shift_x, mirrored, angle = (
        value.to(device).view(batch, 1, 1) for value in (shift_y, shift_x, mirrored, angle)
    )
    y = torch.arange(height, device=device).view(1, height, 1) + 0.5 - height / 2  # pixel centres about the middle
    x = torch.arange(width, device=device).view(1, 1, width) + 0.5 - width / 2
    cos, sin = torch.cos(angle), torch.sin(angle)
    source_x = torch.floor(cos * x - sin * y + width / 2).long()  # (B, H, W)
    source_y = torch.floor(sin * x + cos * y + height / 2).long()
    inside = (source_x >= 0) & (source_x < width) & (source_y >= 0) & (source_y < height)

    source_x = torch.where(mirrored, width - 1 - source_x, source_x) + shift_x
    source_y = source_y + shift_y
    inside &= (source_x >= 0) & (source_x < width) & (source_y >= 0) & (source_y < height)

    row = torch.arange(batch, device=device).view(batch, 1, 1)
    picked = images[row, source_y.clamp(0, height - 1), source_x.clamp(0, width - 1)]
    return picked * inside.unsqueeze(-1)
