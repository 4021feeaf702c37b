"""
RIDE: experts that share a trunk and are paid for disagreeing, then routers that decide how many of them an image needs.

Source: Wang et al., "Long-tailed Recognition by Routing Diverse Distribution-Aware Experts", arXiv:2010.01809. Where
the paper and its public code differ we follow the code, unless the recipe says otherwise: diversity against the mean
logits, temperatures divided by their maximum. Losses are summed over experts. When it distils, the code also multiplies
the whole loss by E, which amounts to E times the learning rate; that is a switch of its own, and the recipe of the
published distilled row has it on. Its teacher stayed in training mode; ours is in evaluation mode.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from training.data.samplers import class_balanced
from training.methods.decoupled import retrain_stage
from training.methods.individual import ExpertLosses
from training.methods.losses import class_temperatures, distillation_loss, diversity_loss, pairwise_diversity_loss
from training.methods.method import FitStage, Losses, Model, Stage, build_model, cosine_lr, experts_stage
from training.methods.teacher import Teacher
from training.models.multi_expert import Outputs
from training.models.router import Routers
from training.recipe import Recipe


class RideLoss:
    """
    Σ over experts of the individual loss, plus λ times the diversity; neither is divided by the number of experts.
    With a teacher, its mean logits are distilled into the mean of the experts' besides, or into each of them.

    Before the deferred epoch class weights and temperatures are all 1.
    """

    def __init__(self, recipe: Recipe, class_counts: Sequence[int]) -> None:
        self.recipe = recipe
        self.individual = ExpertLosses(recipe, class_counts)
        self.diversity = diversity_loss if recipe.diversity_form == "mean" else pairwise_diversity_loss
        divided = recipe.diversity_form == "mean"
        self.temperatures = class_temperatures(class_counts, recipe.diversity_gamma, divided=divided)

    def __call__(self, outputs: Outputs, labels: Tensor, epoch: int, targets: Tensor | None = None) -> Losses:
        """The loss and its parts, in nats, mean over the batch, sum over experts."""
        recipe, expert_logits = self.recipe, outputs.expert_logits
        judged = expert_logits
        if recipe.collaborative:
            judged = expert_logits.mean(dim=0, keepdim=True).expand_as(expert_logits)
        individual = self.individual(judged, labels, epoch, targets)
        parts = {"individual": individual}
        if recipe.diversity_weight:
            self.temperatures = self.temperatures.to(expert_logits.device)
            deferred = self.individual.is_deferred(epoch)
            temperatures = self.temperatures if deferred else torch.ones_like(self.temperatures)
            diversity = recipe.diversity_weight * self.diversity(expert_logits, temperatures)
            parts["diversity"] = diversity / len(expert_logits) if recipe.diversity_mean else diversity
        if outputs.teacher_logits is not None:
            students = expert_logits if recipe.distill_each else expert_logits.mean(dim=0, keepdim=True)
            distilled = [
                distillation_loss(student, outputs.teacher_logits, recipe.distill_temperature) for student in students
            ]
            parts["distillation"] = recipe.distill_weight * torch.stack(distilled).sum()
        loss = torch.stack(list(parts.values())).sum()
        return {"loss": loss * len(expert_logits) if recipe.loss_times_experts else loss, **parts}


def another_expert_helps(expert_logits: Tensor, labels: Tensor) -> Tensor:
    """
    What the routers are to learn.

    Args:
        expert_logits: (E, B, C).
        labels: (B,).

    Returns:
        (E − 1, B), bool: experts 0..i together are wrong, and some longer prefix is right.
    """
    right = expert_logits.cumsum(dim=0).argmax(dim=2) == labels  # (E, B), of every prefix
    later = right.flip(0).cummax(dim=0).values.flip(0)  # (E, B), right here or at a longer prefix
    return ~right[:-1] & later[1:]


def router_losses(routers: Routers, positive_weight: float, outputs: Outputs, labels: Tensor, epoch: int) -> Losses:
    """Binary cross-entropy, positives weighted, mean over images and routers."""
    asked = routers(outputs)
    wanted = another_expert_helps(outputs.expert_logits, labels).to(asked.dtype)
    weight = torch.tensor(positive_weight, device=asked.device)
    return {"loss": F.binary_cross_entropy_with_logits(asked, wanted, pos_weight=weight)}


def router_stage(recipe: Recipe, routers: Routers) -> Stage:
    """The routers alone, on class-balanced draws; every expert runs on every image."""
    return Stage(
        name="routers", epochs=recipe.router_epochs, batch_size=recipe.router_batch_size, part=routers,
        losses=partial(router_losses, routers, recipe.router_positive_weight), sampler=class_balanced,
        lr=partial(cosine_lr, recipe.router_lr, recipe.router_epochs),
        momentum=0.9, nesterov=True, weight_decay=recipe.router_weight_decay, lr_field="router_lr",
    )  # fmt: skip


def later_stages(recipe: Recipe, model: Model, class_counts: Sequence[int]) -> list[Stage | FitStage]:
    """What follows the experts under any method: the classifiers' stage and the routers', where the recipe has them."""
    stages: list[Stage | FitStage] = [retrain_stage(recipe, model, class_counts)] if recipe.retrain_epochs else []
    if model.routers is not None and recipe.router_epochs:
        stages.append(router_stage(recipe, model.routers))
    return stages


def build(
    recipe: Recipe, class_counts: Sequence[int], mean: Sequence[float], std: Sequence[float]
) -> tuple[Model, list[Stage | FitStage]]:
    """A fresh model; the experts' stage, the classifiers' where the recipe retrains them, then the routers'."""
    model = build_model(recipe, len(class_counts), mean, std)
    experts = experts_stage(recipe, model, RideLoss(recipe, class_counts), len(class_counts))
    if recipe.teacher:
        experts = dataclasses.replace(experts, teacher=Teacher(recipe, class_counts))
    return model, [experts, *later_stages(recipe, model, class_counts)]
