"""
SHIKE: experts that fuse features of several depths and teach each other, then balanced classifiers, then routers.

Source: Jin et al., "Long-Tailed Visual Recognition via Self-Heterogeneous Integration with Knowledge Excavation",
arXiv:2304.01279. Where its public code departs from the paper we follow the code: nothing is detached, divergences are
averaged over classes as well as over images, and the true class has logit 0 in the teacher, −30 in the student. The
routers are not SHIKE's: they are RIDE's, so that its models too can stop early.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from itertools import permutations

import torch
from torch import Tensor
from torch.nn import functional as F

from training.methods.individual import ExpertLosses
from training.methods.method import (
    FitStage,
    Losses,
    Model,
    Stage,
    build_model,
    cosine_lr,
    experts_stage,
    retrain_warmup,
    shortened,
)
from training.methods.ride import later_stages
from training.models.multi_expert import Outputs
from training.recipe import Recipe

MASKED = -30.0  # the logit of the true class where only the others count: the lowest that a cosine of scale 30 gives
RETRAINING_BEGINS_AT = 0.25  # of the highest learning rate


def transfer_loss(expert_logits: Tensor, labels: Tensor) -> Tensor:
    """
    Dynamic knowledge transfer: each expert learns the best of all experts about the classes that are not the true one.

    The teacher has, for every wrong class, the largest logit that any expert gives it; but for the hardest, the one
    with the largest mean logit, it has that mean, which lowers it.

    Args:
        expert_logits: (E, B, C).
        labels: (B,).

    Returns:
        (), in nats, mean over images and classes, sum over experts.
    """
    true = F.one_hot(labels, expert_logits.shape[2]).bool()  # (B, C)
    mean = expert_logits.mean(dim=0)
    hardest = F.one_hot(mean.masked_fill(true, MASKED).argmax(dim=1), mean.shape[1]).bool()
    teacher = torch.where(hardest, mean, expert_logits.amax(dim=0)).masked_fill(true, 0.0)
    students = expert_logits.masked_fill(true, MASKED)
    return torch.stack([_divergence(teacher, student) for student in students]).sum()


def mutual_loss(expert_logits: Tensor) -> Tensor:
    """
    KL of every expert from every other, in nats, mean over images and classes, sum over ordered pairs.

    Args:
        expert_logits: (E, B, C).
    """
    pairs = permutations(expert_logits, 2)
    return torch.stack([_divergence(teacher, student) for teacher, student in pairs]).sum()


def _divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(softmax(teacher) ‖ softmax(student)) of (B, C) logits, with gradients to both, divided by B·C."""
    log_teacher, log_student = F.log_softmax(teacher, dim=1), F.log_softmax(student, dim=1)
    return (log_teacher.exp() * (log_teacher - log_student)).mean()


class ShikeLoss:
    """Σ over experts of the individual loss, plus the two ways in which experts learn from each other."""

    def __init__(self, recipe: Recipe, class_counts: Sequence[int]) -> None:
        self.recipe = recipe
        self.individual = ExpertLosses(recipe, class_counts)

    def __call__(self, outputs: Outputs, labels: Tensor, epoch: int) -> Losses:
        """The loss and its three parts, in nats, mean over the batch, sum over experts."""
        logits = outputs.expert_logits
        individual = self.individual(logits, labels, epoch)
        transfer = self.recipe.transfer_weight * transfer_loss(logits, labels)
        mutual = self.recipe.mutual_weight * mutual_loss(logits)
        total = individual + transfer + mutual
        return {"loss": total, "individual": individual, "transfer": transfer, "mutual": mutual}


def peak_lr(peak: float, begins_at: float, epochs: int, warmup: int, epoch: int) -> float:
    """
    Linear towards `peak`, which is reached in the first epoch after the warm-up, then the cosine towards 0.

    Args:
        begins_at: share of `peak` that lies one step before epoch 0.
    """
    warmup = shortened(warmup, epochs)
    if epoch < warmup:
        return peak * (begins_at + (1 - begins_at) * (1 + epoch) / (warmup + 1))
    return cosine_lr(peak, epochs - warmup, epoch - warmup)


def build(
    recipe: Recipe, class_counts: Sequence[int], mean: Sequence[float], std: Sequence[float]
) -> tuple[Model, list[Stage | FitStage]]:
    """A fresh model; the experts' stage, the classifiers', the routers'."""
    model = build_model(recipe, len(class_counts), mean, std)
    stages: list[Stage | FitStage] = [experts_stage(recipe, model, ShikeLoss(recipe, class_counts), len(class_counts))]
    stages += later_stages(recipe, model, class_counts)
    warmup = retrain_warmup(recipe)
    schedules: dict[str, Callable[[int], float]] = {
        "classifiers": partial(peak_lr, recipe.retrain_lr, RETRAINING_BEGINS_AT, recipe.retrain_epochs, warmup)
    }
    if recipe.schedule == "cosine":
        schedules["experts"] = partial(peak_lr, recipe.lr, 0.0, recipe.epochs, recipe.warmup_epochs)
    return model, [
        dataclasses.replace(stage, lr=schedules[stage.name])
        if isinstance(stage, Stage) and stage.name in schedules
        else stage
        for stage in stages
    ]
