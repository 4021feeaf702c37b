"""Finished trainings whose answers another one learns from."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from training.checkpoint import CheckpointError
from training.models.multi_expert import MultiExpertNet
from training.recipe import Recipe


class Teacher:
    """
    The networks of finished runs, frozen, in evaluation mode, each with all its experts.

    Attributes:
        nets: one for each run.

    Args:
        recipe: of the student; `recipe.teacher` is a run directory, or several, separated by commas.
        n_classes: of the student.

    Raises:
        CheckpointError: for a run that is missing, not finished, or of other classes or another image size.
    """

    def __init__(self, recipe: Recipe, n_classes: int) -> None:
        runs = [run.strip() for run in recipe.teacher.split(",")]
        self.nets = nn.ModuleList(_network(run, recipe, n_classes) for run in runs)
        self.nets.requires_grad_(False).eval().to(memory_format=torch.channels_last)
        self.compiled = [torch.compile(net, dynamic=False) if recipe.compile else net for net in self.nets]

    def __call__(self, images: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 -> the mean of all experts' logits of a network, averaged over the networks (B, C)."""
        self.nets.to(images.device)
        with torch.no_grad():
            return torch.stack([net(images).expert_logits.mean(dim=0) for net in self.compiled]).mean(dim=0)


def _network(run: str, recipe: Recipe, n_classes: int) -> MultiExpertNet:
    from training.train import trained_model  # which imports the methods

    try:
        checkpoint, model = trained_model(Path(run))
    except CheckpointError as error:
        raise CheckpointError(f"teacher: {error}") from None
    for what, theirs, ours in (
        ("classes", len(checkpoint.classes), n_classes),
        ("image_size", checkpoint.recipe.image_size, recipe.image_size),
    ):
        if theirs != ours:
            raise CheckpointError(f"teacher: {run} has {what} {theirs}, this training {ours}")
    return cast(MultiExpertNet, model.net)
