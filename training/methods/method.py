"""What the loop needs to know of a method: a model and the stages that train it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from training.data.samplers import shuffled
from training.models.classifiers import CosineClassifier, LinearClassifier
from training.models.depth_fusion import TwoLevelTrunk, fusion_layers
from training.models.groups import Aggregation, GroupNet
from training.models.multi_expert import Expert, MultiExpertNet, Outputs, Trunk
from training.models.resnet_cifar import expert_layers, trunk
from training.models.router import Routers
from training.recipe import Recipe

Sampler = Callable[[Tensor, torch.Generator], Tensor]
Losses = dict[str, Tensor]


class Model(nn.Module):
    """What a checkpoint holds: the network, and its routers where there are several experts."""

    def __init__(self, net: MultiExpertNet, routers: Routers | None) -> None:
        super().__init__()
        self.net = net
        self.routers = routers


@dataclass(frozen=True)
class Stage:
    """
    One stretch of training under one loss, one optimiser and one schedule.

    Attributes:
        name: "experts", "routers"; names checkpoints and log lines.
        epochs, batch_size: of this stage.
        part: what learns. It alone is in training mode; everything else is frozen, in evaluation mode.
        losses: (outputs of the network, labels, epoch) -> "loss", which is minimised, and the parts it is made of.
        sampler: which images an epoch visits.
        lr: learning rate of an epoch, from 0.
        begin: called once, before the first epoch, with torch's global generator seeded; sets weights afresh.
        norms_follow: the batch norms of the frozen parts, too, follow the batches.
        lr_factors: modules within `part`, and what `lr` is multiplied by for their parameters.
        teacher: sees the augmented images too; its logits (B, C) are the outputs' `teacher_logits`.
    """

    name: str
    epochs: int
    batch_size: int
    part: nn.Module
    losses: Callable[[Outputs, Tensor, int], Losses]
    sampler: Sampler
    lr: Callable[[int], float]
    momentum: float
    nesterov: bool
    weight_decay: float
    begin: Callable[[], None] | None = None
    norms_follow: bool = False
    lr_factors: Sequence[tuple[nn.Module, float]] = ()
    teacher: Callable[[Tensor], Tensor] | None = None


class Method(Protocol):
    """From a recipe to a model with fresh weights and its stages, in order."""

    def __call__(
        self, recipe: Recipe, class_counts: Sequence[int], mean: Sequence[float], std: Sequence[float]
    ) -> tuple[Model, list[Stage]]: ...


def build_model(recipe: Recipe, n_classes: int, mean: Sequence[float], std: Sequence[float]) -> Model:
    """The network that `recipe` describes, with fresh weights from torch's global generator."""

    def layers_of(index: int) -> tuple[nn.Module, int]:
        if recipe.depth_fusion:
            return fusion_layers(index, recipe.reduced, recipe.image_size)
        return expert_layers(recipe.reduced)

    def expert(index: int) -> Expert:
        layers, width = layers_of(index)
        if recipe.classifier == "cosine":
            return Expert(layers, CosineClassifier(width, n_classes, recipe.cosine_scale))
        return Expert(layers, LinearClassifier(width, n_classes))

    trunk_layers = TwoLevelTrunk() if recipe.depth_fusion else trunk()
    parts = Trunk(trunk_layers, mean, std), [expert(index) for index in range(recipe.n_experts)]
    if recipe.group_shares:
        every = torch.ones(recipe.n_experts, n_classes, dtype=torch.bool)  # until the method or a checkpoint says which
        how = Aggregation(recipe.group_norm_power, recipe.group_norm_rows, recipe.group_answer)
        net: MultiExpertNet = GroupNet(*parts, every, how, recipe.group_stop_gradient)
    else:
        net = MultiExpertNet(*parts)
    routers = None
    if recipe.n_experts > 1:
        width = layers_of(0)[1]
        routers = Routers(
            recipe.n_experts, width, n_classes, recipe.router_top_k, recipe.router_hidden, recipe.router_shared
        )
    return Model(net, routers)


def experts_stage(recipe: Recipe, model: Model, losses: Callable[[Outputs, Tensor, int], Losses]) -> Stage:
    """The first stage of a method: the whole network, every image once an epoch, optimiser and schedule as given."""
    return Stage(
        name="experts", epochs=recipe.epochs, batch_size=recipe.batch_size, part=model.net,
        losses=losses, sampler=shuffled, lr=partial(scheduled_lr, recipe),
        momentum=recipe.momentum, nesterov=recipe.nesterov, weight_decay=recipe.weight_decay,
    )  # fmt: skip


def scheduled_lr(recipe: Recipe, epoch: int) -> float:
    """Linear warm-up, then `lr_drop_factor` at each of `lr_drops`, or the cosine; constant within an epoch."""
    if recipe.schedule == "cosine":
        return warm_cosine_lr(recipe.lr, recipe.epochs, recipe.warmup_epochs, epoch)
    if epoch < recipe.warmup_epochs:
        return recipe.lr * (1 + epoch) / recipe.warmup_epochs
    drops = sum(epoch >= recipe.epoch_of(share) for share in recipe.lr_drops)
    return recipe.lr * recipe.lr_drop_factor**drops


def warm_cosine_lr(base: float, epochs: int, warmup: int, epoch: int) -> float:
    """Linear up to `base` over `warmup` epochs, then the cosine over those that are left."""
    if epoch < warmup:
        return base * (1 + epoch) / warmup
    return cosine_lr(base, epochs - warmup, epoch - warmup)


def cosine_lr(base: float, epochs: int, epoch: int) -> float:
    """From `base` at epoch 0 towards 0 after the last."""
    return base * (1 + math.cos(math.pi * epoch / epochs)) / 2
