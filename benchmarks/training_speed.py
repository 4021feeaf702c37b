"""
How many images a second the experts' stage trains: plain fp32 eager against bf16, channels_last and compilation.

    python -m benchmarks.training_speed [--rounds 5] [--steps 20]

The contestants take turns, so that whatever else the machine does meets all of them; the medians of the rounds are
compared. Random images, RIDE-3 on 100 classes, batches of 128: augmentation, forward, loss, backward, step.
"""

from __future__ import annotations

import argparse
import dataclasses
import platform
import statistics
import time
from collections.abc import Callable
from typing import Literal

import torch

from training.data.augment import augment
from training.data.longtail import class_counts
from training.loop import forward_of, train_step
from training.methods import ride
from training.methods.method import Stage
from training.models.multi_expert import Outputs, Trunk
from training.recipe import CIFAR_MEAN, CIFAR_STD, Recipe
from training.recipes import RECIPES

BATCH = 128


class PlainTrunk(Trunk):
    """The trunk as a plain loop would feed it: contiguous (B, 3, H, W)."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, H, W, 3) uint8 -> features."""
        pixels = images.permute(0, 3, 1, 2).float().contiguous()
        return self.layers((pixels - self.mean) / self.std)


def contestant(
    precision: Literal["fp32", "bf16"], compiled: bool, plain: bool
) -> tuple[Recipe, Stage, Callable[[torch.Tensor], Outputs]]:
    """A fresh model of the same seed, its first stage, and its forward pass."""
    recipe = dataclasses.replace(RECIPES["ride-cifar100"], precision=precision, compile=compiled)
    torch.manual_seed(0)
    mean, std = recipe.mean or CIFAR_MEAN, recipe.std or CIFAR_STD
    model, (stage, *_) = ride.build(recipe, class_counts(500, 100, 100), mean, std)
    assert isinstance(stage, Stage)
    if plain:
        model.net.trunk = PlainTrunk(model.net.trunk.layers, mean, std)
        return recipe, stage, model.net
    return recipe, stage, forward_of(model, stage, recipe)


class Turns:
    """A contestant's training, a few steps at a time on the same random batch."""

    def __init__(self, recipe: Recipe, stage: Stage, forward: Callable[[torch.Tensor], Outputs]) -> None:
        self._recipe, self._stage, self._forward = recipe, stage, forward
        self._optimiser = torch.optim.SGD(stage.part.parameters(), 0.01)
        self._generator = torch.Generator().manual_seed(0)
        self._images = torch.randint(0, 256, (BATCH, 32, 32, 3), generator=self._generator, dtype=torch.uint8)
        self._labels = torch.randint(0, 100, (BATCH,), generator=self._generator)

    def images_per_second(self, steps: int) -> float:
        """Over so many steps, augmentation included."""
        recipe, generator = self._recipe, self._generator
        began = time.perf_counter()
        for _ in range(steps):
            pixels = augment(
                self._images, generator, crop_padding=recipe.crop_padding, flip=recipe.flip, rotation=recipe.rotation
            )
            train_step(self._forward, self._stage, self._optimiser, pixels, self._labels, epoch=0, generator=generator)
        return steps * BATCH / (time.perf_counter() - began)


def main() -> None:
    """Run all rounds and print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rounds", type=int, default=5, help="turns of each contestant; more are steadier [default: 5]"
    )
    parser.add_argument("--steps", type=int, default=20, help="steps of a turn [default: 20]")
    options = parser.parse_args()

    contestants = {
        "fp32, eager, contiguous (plain)": Turns(*contestant("fp32", compiled=False, plain=True)),
        "fp32, eager, channels_last": Turns(*contestant("fp32", compiled=False, plain=False)),
        "fp32, compiled, channels_last": Turns(*contestant("fp32", compiled=True, plain=False)),
        "bf16, eager, channels_last": Turns(*contestant("bf16", compiled=False, plain=False)),
        "bf16, compiled, channels_last": Turns(*contestant("bf16", compiled=True, plain=False)),
    }

    for turns in contestants.values():
        turns.images_per_second(3)  # compiles
    speeds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(options.rounds):
        for name, turns in contestants.items():
            speeds[name].append(turns.images_per_second(options.steps))

    plain = statistics.median(next(iter(speeds.values())))
    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}\n"
    )
    print("| training step | images/s, median | lowest to highest | against plain |")
    print("| --- | --- | --- | --- |")
    for name, values in speeds.items():
        median = statistics.median(values)
        print(f"| {name} | {median:.0f} | {min(values):.0f} to {max(values):.0f} | {median / plain:.2f} |")


if __name__ == "__main__":
    main()
