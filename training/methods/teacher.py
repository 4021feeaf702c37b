"""A finished training whose answers another one learns from."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from training.checkpoint import CheckpointError
from training.recipe import Recipe


class Teacher:
    """
    The network of a finished run, frozen, in evaluation mode, with all its experts.

    Args:
        recipe: of the student; `recipe.teacher` is the run directory.
        n_classes: of the student.

    Raises:
        CheckpointError: for a run that is missing, not finished, or of other classes or another image size.
    """

    def __init__(self, recipe: Recipe, n_classes: int) -> None:
        from training.train import trained_model  # which imports the methods

        try:
            checkpoint, model = trained_model(Path(recipe.teacher))
        except CheckpointError as error:
            raise CheckpointError(f"teacher: {error}") from None
        for what, theirs, ours in (
            ("classes", len(checkpoint.classes), n_classes),
            ("image_size", checkpoint.recipe.image_size, recipe.image_size),
        ):
            if theirs != ours:
                raise CheckpointError(f"teacher: {recipe.teacher} has {what} {theirs}, this training {ours}")
        self.net = model.net.requires_grad_(False).to(memory_format=torch.channels_last)

    def __call__(self, images: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 -> the mean of its experts' logits (B, C)."""
        with torch.no_grad():
            return self.net.to(images.device)(images).expert_logits.mean(dim=0)
