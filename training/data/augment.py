"""Crop, flip and rotation of a whole batch at once, on the device that holds the images."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def augment(images: Tensor, generator: torch.Generator, *, crop_padding: int, flip: bool, rotation: float) -> Tensor:
    """
    Random crop of the zero-padded image, then horizontal flip, then rotation about the centre.

    Args:
        images: (B, H, W, 3), uint8.
        generator: on the CPU, so that a seed means the same on every device.
        crop_padding: pixels on each side.
        rotation: degrees, uniform in ± this.

    Returns:
        (B, H, W, 3), uint8.
    """
    batch = len(images)

    def whole(high: int) -> Tensor:
        return torch.randint(high + 1, (batch,), generator=generator)

    angle = (torch.rand(batch, generator=generator) * 2 - 1) * math.radians(rotation)
    shift_y, shift_x = whole(2 * crop_padding) - crop_padding, whole(2 * crop_padding) - crop_padding
    return transform(images, shift_y, shift_x, whole(1).bool() & flip, angle)


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
