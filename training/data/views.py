"""What training and evaluation see of an image: one by one as files are decoded, or a whole decoded batch."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from training.data.augment import augment
from training.data.images import fit
from training.recipe import IMAGENET_MEAN, IMAGENET_STD, Recipe

CROPPED_SHARE = (0.08, 1.0)  # of the image's area
RAND_AUGMENT_OPERATIONS = 2
RAND_AUGMENT_CHANCE = 0.5  # of each of them
RAND_AUGMENT_MAGNITUDE = (9.0, 0.5)  # mean and deviation, of 10
RAND_AUGMENT_BINS = 31  # torchvision's: strength 30 is the magnitude 10
ERASED_SHARE = (0.02, 1 / 3)
ERASED_ASPECT = (0.3, 3.3)


def train_view(image: Image.Image, recipe: Recipe, generator: torch.Generator) -> np.ndarray:
    """
    One image as a training step sees it.

    Args:
        image: RGB, upright, in its own size.
        generator: of this image in this epoch, on the CPU; it alone decides what is drawn.

    Returns:
        (S, S, 3), uint8, S = recipe.image_size.
    """
    if recipe.crop == "padded":
        pixels = torch.from_numpy(np.array(fit(image, recipe.image_size, recipe.image_size))).unsqueeze(0)
        return train_views(pixels, recipe, generator)[0].numpy()
    with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        return np.array(_pipeline(recipe)(image))


def evaluation_view(image: Image.Image, recipe: Recipe) -> np.ndarray:
    """One image as evaluation and service see it: (S, S, 3), uint8."""
    return np.asarray(fit(image, recipe.image_size, recipe.image_size, recipe.test_fit))


def train_views(images: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """
    A batch of decoded images, with padded crops, as a training step sees them; on the device that holds them.

    Args:
        images: (B, S, S, 3), uint8.
        generator: on the CPU.

    Returns:
        (B, S, S, 3), uint8.
    """
    return augment(
        images, generator, crop_padding=recipe.crop_padding, flip=recipe.flip, rotation=recipe.rotation,
        auto_augment=recipe.auto_augment, cutout=recipe.cutout,
    )  # fmt: skip


@functools.cache
def _pipeline(recipe: Recipe) -> v2.Compose:
    """A random part of the image, at random proportions, then flip, colours, RandAugment and erasing by the recipe."""
    bicubic = recipe.crop_interpolation == "bicubic"
    filter_ = InterpolationMode.BICUBIC if bicubic else InterpolationMode.BILINEAR
    mean, std = recipe.mean or IMAGENET_MEAN, recipe.std or IMAGENET_STD
    steps: list[torch.nn.Module] = [v2.RandomResizedCrop(recipe.image_size, CROPPED_SHARE, interpolation=filter_)]
    if recipe.flip:
        steps.append(v2.RandomHorizontalFlip())
    if recipe.rotation:
        steps.append(v2.RandomRotation(recipe.rotation))
    if recipe.colour_jitter:
        steps.append(v2.ColorJitter(*[recipe.colour_jitter] * 3))
    if recipe.rand_augment:
        steps.append(RandAugment([round(255 * value) for value in mean]))
    if recipe.random_erasing:
        steps.append(NoiseErasing(recipe.random_erasing, mean, std))
    return v2.Compose(steps)


class RandAugment(torch.nn.Module):
    """
    Up to two of torchvision's fourteen operations, each with probability 1/2, of magnitude N(9, 0.5) of 10.

    This is the "m9-mstd0.5" of Swin's recipe, whose list has Invert and SolarizeAdd besides, and no Identity.

    Args:
        fill: colour (R, G, B) of what moves into the image.

    Source: RandAugment, arXiv:1909.13719.
    """

    def __init__(self, fill: Sequence[int]) -> None:
        super().__init__()
        self.fill = list(fill)

    def forward(self, image: Image.Image) -> Image.Image:
        """An image of the same size."""
        operations = int((torch.rand(RAND_AUGMENT_OPERATIONS) < RAND_AUGMENT_CHANCE).sum())
        for _ in range(operations):
            magnitude = float(torch.normal(*map(torch.tensor, RAND_AUGMENT_MAGNITUDE)).clamp(0, 10))
            strength = round(magnitude / 10 * (RAND_AUGMENT_BINS - 1))
            image = v2.RandAugment(1, strength, RAND_AUGMENT_BINS, InterpolationMode.BILINEAR, self.fill)(image)
        return image


class NoiseErasing(torch.nn.Module):
    """
    With a probability, a rectangle becomes noise: normal around the mean colour, as far as bytes can hold it.

    Source: random erasing, arXiv:1708.04896; sizes as in Swin's recipe.
    """

    def __init__(self, probability: float, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.erase = v2.RandomErasing(probability, ERASED_SHARE, ERASED_ASPECT, value="random")
        self.mean, self.std = (255 * torch.tensor(values).view(3, 1, 1) for values in (mean, std))

    def forward(self, image: Image.Image) -> np.ndarray:
        """(H, W, 3), uint8."""
        normalised = (torch.from_numpy(np.array(image)).permute(2, 0, 1) - self.mean) / self.std
        pixels = (self.erase(normalised) * self.std + self.mean).round().clamp(0, 255)
        return pixels.to(torch.uint8).permute(1, 2, 0).numpy()
