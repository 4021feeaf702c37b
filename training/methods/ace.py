"""
ACE: the first expert learns all classes, each later one only rarer classes, gently; then routers.

Source: Cai et al., "ACE: Ally Complementary Experts for Solving Long-Tailed Recognition in One-Shot", arXiv:2108.02385.
There is no one reading of it. What sources disagree on, read as here; where a field is named, that changes it:

- network: as RIDE's: the first stage is shared, the others are an expert's own;
- groups: nested, the rarest classes by number (`group_shares`, planned by hand);
- what a later expert sees: every image passes through it, and its losses are means over the images of its group. So the
  running statistics of its batch norms are those of the images that it is tested on, and a batch with one image of
  its group, or none, is like any other: with none its losses are 0. The alternative, to let only the group's images
  pass, gives the last expert of CIFAR-100-LT three or four images a batch to normalise by;
- gradients: later experts do not train the trunk (`group_stop_gradient`);
- learning rates: proportional to the images of the group (`group_lr_scaling`), for the expert's own layers;
- complementary loss: the sum of the squared logits of all classes outside the group (`complementary_weight`). Its
  curvature is twice the squared length of the expert's feature, some 300 at first; with a weight of 1 that is beyond
  what a learning rate of 0.0187 and momentum 0.9 bear (2 · 1.9 / 300 = 0.0127). Others who implemented it have the
  length itself, whose gradient is never longer than 1 by the number of classes (`complementary_form`);
- answer: `training.models.groups.Aggregation`.

The routers are not ACE's: they are RIDE's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from training.methods.individual import IndividualLoss
from training.methods.method import FitStage, Losses, Model, Stage, build_model, experts_stage
from training.methods.ride import later_stages
from training.models.groups import GroupNet, nested_groups
from training.models.multi_expert import Outputs
from training.recipe import Recipe


class AceLoss:
    """
    Σ over experts of the individual loss and the complementary one, each over the images of the expert's group.

    Args:
        groups: (E, C), bool.
    """

    def __init__(self, recipe: Recipe, class_counts: Sequence[int], groups: Tensor) -> None:
        self.recipe, self.groups = recipe, groups
        self.individual = IndividualLoss(recipe.loss, recipe, class_counts)

    def __call__(self, outputs: Outputs, labels: Tensor, epoch: int) -> Losses:
        """The loss and its two parts, in nats and squared logits, means over images, sums over experts."""
        assert outputs.own_logits is not None
        individual, complementary = [], []
        self.groups = self.groups.to(labels.device)
        for logits, group in zip(outputs.own_logits, self.groups, strict=True):
            chosen = group[labels]  # (B,)
            if not chosen.any():
                individual.append(0 * logits.sum())
                continue
            individual.append(self.individual(logits[chosen], labels[chosen], epoch))
            complementary.append(complementary_loss(logits[chosen], group, self.recipe.complementary_form))
        parts = {
            "individual": torch.stack(individual).sum(),
            "complementary": self.recipe.complementary_weight * sum(complementary, individual[0].new_zeros(())),
        }
        return {"loss": parts["individual"] + parts["complementary"], **parts}


def complementary_loss(logits: Tensor, group: Tensor, form: str) -> Tensor:
    """
    Σ of the squared logits (B, C) of classes outside the group (C,), mean over images.

    Under the form "length" the root of the sum over images and classes, divided by the number of those classes.

    Source: ACE, arXiv:2108.02385.
    """
    outside = logits * ~group
    if form == "length":
        return outside.norm() / (~group).sum().clamp_min(1)
    return outside.square().sum(dim=1).mean()


def lr_factors(groups: Tensor, class_counts: Sequence[int]) -> list[float]:
    """The share of the training images whose class is in each expert's group: the linear scaling rule."""
    counts = torch.tensor(class_counts, dtype=torch.float64)
    return [float(counts[group].sum() / counts.sum()) for group in groups]


def build(
    recipe: Recipe, class_counts: Sequence[int], mean: Sequence[float], std: Sequence[float]
) -> tuple[Model, list[Stage | FitStage]]:
    """A fresh model with its groups; the experts' stage, with a learning rate for each expert, and the routers'."""
    model = build_model(recipe, len(class_counts), mean, std)
    groups = nested_groups(class_counts, recipe.group_shares)
    cast(GroupNet, model.net).groups.copy_(groups)
    experts = experts_stage(recipe, model, AceLoss(recipe, class_counts, groups), len(class_counts))
    if recipe.group_lr_scaling:
        factors = list(zip(model.net.experts, lr_factors(groups, class_counts), strict=True))
        experts = dataclasses.replace(experts, lr_factors=factors)
    return model, [experts, *later_stages(recipe, model, class_counts)]
