"""What the loop needs to know of a method: a model and the stages that train it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, cast

import torch
from torch import Tensor, nn

from training.data.mixing import Mixing
from training.models.backbones import BACKBONES
from training.models.classifiers import CosineClassifier, LinearClassifier
from training.models.multi_expert import Expert, MultiExpertNet, Trunk
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
            Where `mixing` is set, a fourth argument says what is in each image: targets (B, C), rows that sum to 1.
        sampler: which images an epoch visits.
        lr: learning rate of an epoch, from 0.
        begin: called once, before the first epoch, with torch's global generator seeded; sets weights afresh.
        norms_follow: the batch norms of the frozen parts, too, follow the batches.
        optimiser: "sgd" or "adamw"; the latter has no use for `momentum` and `nesterov`.
        clip_norm: gradients of `part` are scaled down to this length, all together; None: never.
        mixing: what happens to the images of a batch and their labels; None: nothing.
    """

    name: str
    epochs: int
    batch_size: int
    part: nn.Module
    losses: Callable[..., Losses]
    sampler: Sampler
    lr: Callable[[int], float]
    momentum: float
    nesterov: bool
    weight_decay: float
    begin: Callable[[], None] | None = None
    norms_follow: bool = False
    optimiser: Literal["sgd", "adamw"] = "sgd"
    clip_norm: float | None = None
    mixing: Mixing | None = None


class Method(Protocol):
    """From a recipe to a model with fresh weights and its stages, in order."""

    def __call__(
        self, recipe: Recipe, class_counts: Sequence[int], mean: Sequence[float], std: Sequence[float]
    ) -> tuple[Model, list[Stage]]: ...


def build_model(recipe: Recipe, n_classes: int, mean: Sequence[float], std: Sequence[float]) -> Model:
    """The network that `recipe` describes, with fresh weights from torch's global generator."""
    backbone = BACKBONES[recipe.backbone]
    width = backbone.n_features(recipe.reduced)

    def expert() -> Expert:
        layers = backbone.expert(recipe)
        if recipe.classifier == "cosine":
            return Expert(layers, CosineClassifier(width, n_classes, recipe.cosine_scale))
        return Expert(layers, LinearClassifier(width, n_classes))

    net = MultiExpertNet(Trunk(backbone.trunk(recipe), mean, std), [expert() for _ in range(recipe.n_experts)])
    backbone.share_layers([cast(Expert, each) for each in net.experts])
    routers = None
    if recipe.n_experts > 1:
        routers = Routers(recipe.n_experts, width, n_classes, recipe.router_top_k, recipe.router_hidden)
    return Model(net, routers)


def mixing_of(recipe: Recipe, n_classes: int) -> Mixing | None:
    """What the recipe does to the images and labels of a batch; None: nothing."""
    if not (recipe.mixup or recipe.cutmix or recipe.label_smoothing):
        return None
    return Mixing(n_classes, recipe.mixup, recipe.cutmix, recipe.label_smoothing)


def scheduled_lr(recipe: Recipe, epoch: int) -> float:
    """Linear warm-up, then `lr_drop_factor` at each of `lr_drops`, or the cosine; constant within an epoch."""
    if recipe.schedule == "cosine":
        return warm_cosine_lr(recipe.lr, recipe.epochs, recipe.warmup_epochs, epoch, recipe.lr_min)
    if epoch < recipe.warmup_epochs:
        return recipe.lr * (1 + epoch) / recipe.warmup_epochs
    drops = sum(epoch >= recipe.epoch_of(share) for share in recipe.lr_drops)
    return recipe.lr * recipe.lr_drop_factor**drops


def warm_cosine_lr(base: float, epochs: int, warmup: int, epoch: int, lowest: float = 0.0) -> float:
    """Linear up to `base` over `warmup` epochs, then the cosine over those that are left, towards `lowest`."""
    if epoch < warmup:
        return base * (1 + epoch) / warmup
    return lowest + cosine_lr(base - lowest, epochs - warmup, epoch - warmup)


def cosine_lr(base: float, epochs: int, epoch: int) -> float:
    """From `base` at epoch 0 towards 0 after the last."""
    return base * (1 + math.cos(math.pi * epoch / epochs)) / 2
