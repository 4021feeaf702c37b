"""What the loop needs to know of a method: a model and the stages that train it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn

from training.data.mixing import Mixing
from training.data.samplers import shuffled
from training.data.sets import AnyImages
from training.models.backbones import BACKBONES
from training.models.classifiers import CosineClassifier, LinearClassifier
from training.models.depth_fusion import FusionLayers, TwoLevelTrunk
from training.models.groups import Aggregation, GroupNet
from training.models.multi_expert import Expert, MultiExpertNet, Outputs, Trunk
from training.models.router import Routers
from training.recipe import Recipe

Sampler = Callable[[Tensor, torch.Generator], Tensor]
Losses = dict[str, Tensor]
Network = Callable[[Tensor], Any]


class Model(nn.Module):
    """What a checkpoint holds: the network, its routers where there are several experts, networks that teach it."""

    def __init__(
        self, net: MultiExpertNet, routers: Routers | None, teachers: dict[str, MultiExpertNet] | None = None
    ) -> None:
        super().__init__()
        self.net = net
        self.routers = routers
        self.teachers = nn.ModuleDict(teachers)


@dataclass(frozen=True)
class Stage:
    """
    One stretch of training under one loss, one optimiser and one schedule.

    Attributes:
        name: "experts", "classifiers", "routers" and what single methods call theirs; names checkpoints and log lines.
        epochs, batch_size: of this stage.
        part: what learns. It alone is in training mode; everything else is frozen, in evaluation mode.
        losses: (outputs of the network, labels, epoch) -> "loss", which is minimised, and the parts it is made of; None
            where `step` gives them. Where `mixing` is set, a fourth argument says what is in each image: targets
            (B, C), rows that sum to 1.
        sampler: which images an epoch visits.
        lr: learning rate of an epoch, from 0.
        begin: called once, before the first epoch, with torch's global generator seeded; sets weights afresh.
        norms_follow: the batch norms of the frozen parts, too, follow the batches.
        lr_factors: modules within `part`, and what `lr` is multiplied by for their parameters.
        teacher: sees the augmented images too; its logits (B, C) are the outputs' `teacher_logits`.
        network: what runs on the images and is evaluated; None: the model's `net`.
        arrange: called before the stage's weights are loaded or set; exchanges modules of the model for those that
            this stage trains. What earlier stages trained stays in place.
        prepare: (training images, held-out images, epoch), called before every epoch, all in evaluation mode and
            without gradients.
        step: (network, images, labels, epoch, generator) -> outputs, losses; in place of one forward pass and `losses`
            where a method does more with a batch. Images are (B, H, W, 3), uint8 or float, in [0, 255]; the generator
            is the epoch's, on the CPU.
        alone: the recipe of which this stage is the whole training; a finished run of it may stand in for the stage
            (`Recipe.first_stage`).
        optimiser: "sgd" or "adamw"; the latter has no use for `momentum` and `nesterov`.
        clip_norm: gradients of `part` are scaled down to this length, all together; None: never.
        mixing: what happens to the images of a batch and their labels; None: nothing.
        lr_field: of the recipe, that `lr` begins with.
    """

    name: str
    epochs: int
    batch_size: int
    part: nn.Module
    losses: Callable[..., Losses] | None
    sampler: Sampler
    lr: Callable[[int], float]
    momentum: float
    nesterov: bool
    weight_decay: float
    begin: Callable[[], None] | None = None
    norms_follow: bool = False
    lr_factors: Sequence[tuple[nn.Module, float]] = ()
    teacher: Callable[[Tensor], Tensor] | None = None
    network: MultiExpertNet | None = None
    arrange: Callable[[], None] | None = None
    prepare: Callable[[AnyImages, AnyImages, int], None] | None = None
    step: Callable[[Network, Tensor, Tensor, int, torch.Generator], tuple[Outputs, Losses]] | None = None
    alone: Recipe | None = None
    optimiser: Literal["sgd", "adamw"] = "sgd"
    clip_norm: float | None = None
    mixing: Mixing | None = None
    lr_field: str = "lr"


@dataclass(frozen=True)
class FitStage:
    """
    A stage without gradients: weights in closed form.

    Attributes:
        name: names its checkpoint and log line.
        fit: (training images, held-out images) -> what the log is to say; sets weights, in evaluation mode.
        arrange: as of `Stage`.
    """

    name: str
    fit: Callable[[AnyImages, AnyImages], dict[str, Any]]
    arrange: Callable[[], None] | None = None
    epochs: int = 1


class Method(Protocol):
    """From a recipe to a model with fresh weights and its stages, in order."""

    def __call__(
        self, recipe: Recipe, class_counts: Sequence[int], mean: Sequence[float], std: Sequence[float]
    ) -> tuple[Model, Sequence[Stage | FitStage]]: ...


def build_model(recipe: Recipe, n_classes: int, mean: Sequence[float], std: Sequence[float]) -> Model:
    """The network that `recipe` describes, with fresh weights from torch's global generator."""
    backbone = BACKBONES[recipe.backbone]
    width = backbone.n_features(recipe.reduced)

    def expert(index: int) -> Expert:
        layers = backbone.expert(recipe)
        if recipe.depth_fusion:
            layers = FusionLayers(index, width, recipe.image_size)
        if recipe.classifier == "cosine":
            return Expert(layers, CosineClassifier(width, n_classes, recipe.cosine_scale))
        classifier = LinearClassifier(width, n_classes)
        if not recipe.backbone.endswith("_cifar"):
            classifier.reset_parameters()
        return Expert(layers, classifier)

    trunk_layers = TwoLevelTrunk() if recipe.depth_fusion else backbone.trunk(recipe)
    parts = Trunk(trunk_layers, mean, std), [expert(index) for index in range(recipe.n_experts)]
    if recipe.group_shares:
        every = torch.ones(recipe.n_experts, n_classes, dtype=torch.bool)  # until the method or a checkpoint says which
        how = Aggregation(recipe.group_norm_power, recipe.group_norm_rows, recipe.group_answer)
        net: MultiExpertNet = GroupNet(*parts, every, how, recipe.group_stop_gradient)
    else:
        net = MultiExpertNet(*parts)
    backbone.share_layers([cast(Expert, each) for each in net.experts])
    if recipe.loss == "sigmoid_focal":  # each class is the right one for one image in C
        for each in net.experts:
            bias = cast(LinearClassifier, cast(Expert, each).classifier).bias
            nn.init.constant_(bias, -math.log(max(n_classes - 1, 1)))
    routers = None
    if recipe.n_experts > 1:
        routers = Routers(
            recipe.n_experts, width, n_classes, recipe.router_top_k, recipe.router_hidden, recipe.router_shared
        )
        if recipe.backbone.endswith("_cifar"):  # as in RIDE's public code, which for ImageNet leaves torch's weights
            for layer in routers.modules():
                if isinstance(layer, nn.Linear):
                    nn.init.kaiming_normal_(layer.weight)
    return Model(net, routers)


def experts_stage(recipe: Recipe, model: Model, losses: Callable[..., Losses], n_classes: int) -> Stage:
    """The first stage of a method: the whole network, every image once an epoch, optimiser and schedule as given."""
    slower = recipe.features_lr_factor != 1
    return Stage(
        name="experts", epochs=recipe.epochs, batch_size=recipe.batch_size, part=model.net,
        losses=losses, sampler=shuffled, lr=partial(scheduled_lr, recipe),
        momentum=recipe.momentum, nesterov=recipe.nesterov, weight_decay=recipe.weight_decay, alone=recipe,
        optimiser=recipe.optimiser, clip_norm=recipe.clip_norm, mixing=mixing_of(recipe, n_classes),
        lr_factors=[(_all_but_classifiers(model.net), recipe.features_lr_factor)] if slower else (),
    )  # fmt: skip


def _all_but_classifiers(net: MultiExpertNet) -> nn.ModuleList:
    return nn.ModuleList([net.trunk, *(cast(Expert, expert).layers for expert in net.experts)])


def mixing_of(recipe: Recipe, n_classes: int) -> Mixing | None:
    """What the recipe does to the images and labels of a batch; None: nothing."""
    if not (recipe.mixup or recipe.cutmix or recipe.label_smoothing):
        return None
    return Mixing(n_classes, recipe.mixup, recipe.cutmix, recipe.label_smoothing)


def scheduled_lr(recipe: Recipe, epoch: int) -> float:
    """Linear warm-up, then `lr_drop_factor` at each of `lr_drops`, or the cosine; constant within an epoch."""
    if recipe.schedule == "cosine":
        length = recipe.epochs // recipe.cycles
        warmup = recipe.warmup_epochs if epoch < length else 0
        return warm_cosine_lr(recipe.lr, length, warmup, epoch % length, recipe.lr_min)
    drops = sum(epoch >= recipe.epoch_of(share) for share in recipe.lr_drops)
    lr = recipe.lr * recipe.lr_drop_factor**drops
    warmup = shortened(recipe.warmup_epochs, recipe.epochs)
    if epoch >= warmup:
        return lr
    if recipe.warmup_start is not None:
        return lr * (recipe.warmup_start + (1 - recipe.warmup_start) * epoch / warmup)
    return lr * (1 + epoch) / warmup


def shortened(warmup: int, epochs: int) -> int:
    """The epochs of a warm-up in a stage of `epochs`: half of them at most, so that a short training arrives, too."""
    return min(warmup, epochs // 2)


def retrain_warmup(recipe: Recipe) -> int:
    """The epochs of the warm-up in the stage that retrains classifiers."""
    return recipe.warmup_epochs if recipe.retrain_warmup_epochs is None else recipe.retrain_warmup_epochs


def warm_cosine_lr(base: float, epochs: int, warmup: int, epoch: int, lowest: float = 0.0) -> float:
    """Linear up to `base` over the (`shortened`) warm-up, then the cosine over the epochs left, towards `lowest`."""
    warmup = shortened(warmup, epochs)
    if epoch < warmup:
        return base * (1 + epoch) / warmup
    return lowest + cosine_lr(base - lowest, epochs - warmup, epoch - warmup)


def cosine_lr(base: float, epochs: int, epoch: int) -> float:
    """From `base` at epoch 0 towards 0 after the last."""
    return base * (1 + math.cos(math.pi * epoch / epochs)) / 2
