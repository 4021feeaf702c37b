"""Finished trainings whose answers another one learns from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from training.checkpoint import CheckpointError, checkpoints_of
from training.models.multi_expert import MultiExpertNet
from training.recipe import PLACE_FIELDS, Recipe

# Of the recipe: which images there are. A teacher that has seen others hands on what it learnt from them.
IMAGE_FIELDS = (
    "image_size", "data", "train_list", "val_list", "image_root", "profile", "imbalance", "n_max", "subset_order",
    "subset_seed",
)  # fmt: skip


class Teacher:
    """
    The networks of finished runs, frozen, in evaluation mode, each with all its experts.

    Attributes:
        nets: one for each run.

    Args:
        recipe: of the student; `recipe.teacher` is a run directory, or several, separated by commas.
        class_counts: of the student's training images.

    Raises:
        CheckpointError: for a run that is missing, not finished, or that was trained on other images.
    """

    def __init__(self, recipe: Recipe, class_counts: Sequence[int]) -> None:
        self.nets = nn.ModuleList(_network(run, recipe, class_counts) for run in _runs(recipe))
        self.nets.requires_grad_(False).eval().to(memory_format=torch.channels_last)
        self.compiled = [torch.compile(net, dynamic=False) if recipe.compile else net for net in self.nets]

    def __call__(self, images: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 -> the mean of all experts' logits of a network, averaged over the networks (B, C)."""
        self.nets.to(images.device)
        with torch.no_grad():
            return torch.stack([net(images).expert_logits.mean(dim=0) for net in self.compiled]).mean(dim=0)


def refuse_other_teachers(recipe: Recipe, images_digest: str) -> None:
    """
    Refuse a teacher whose images had the same settings and numbers as those here, and are not the same.

    Raises:
        CheckpointError: where its checkpoints say so.
    """
    for run in _runs(recipe):
        for checkpoint in checkpoints_of(Path(run)).values():
            if not checkpoint.saw(images_digest):
                raise CheckpointError(
                    f"teacher: {run} was trained on other images, as many, but some have changed or go by other names; "
                    "train it anew"
                )


def _runs(recipe: Recipe) -> list[str]:
    return [run.strip() for run in recipe.teacher.split(",")]


def _network(run: str, recipe: Recipe, class_counts: Sequence[int]) -> MultiExpertNet:
    from training.train import trained_model  # which imports the methods

    try:
        checkpoint, model = trained_model(Path(run))
    except CheckpointError as error:
        raise CheckpointError(f"teacher: {error}") from None
    # Where there is a digest, `refuse_other_teachers` looks at the images themselves.
    places = PLACE_FIELDS if checkpoint.images_digest else ()
    compared = {
        name: (getattr(checkpoint.recipe, name), getattr(recipe, name)) for name in IMAGE_FIELDS if name not in places
    }
    compared |= {
        "classes": (len(checkpoint.class_counts), len(class_counts)),
        "images by class": (list(checkpoint.class_counts), list(class_counts)),
    }
    for what, (theirs, ours) in compared.items():
        if theirs != ours:
            raise CheckpointError(
                f"teacher: {run} has {what} {theirs}, this training {ours}; it must have seen the same"
            )
    return cast(MultiExpertNet, model.net)
