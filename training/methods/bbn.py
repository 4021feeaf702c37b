"""
BBN: two branches at the end of one network, one fed uniformly, the other mostly with rare classes; what is learnt moves
from the first to the second as the epochs go by.

The last block of the last stage is doubled, and the classifier sees both branches' features side by side. A batch is
first half uniform, second half drawn with frequencies reversed. In training each branch sees its own half only, and the
shared layers' batch norms see one half after the other; in evaluation both branches see every image, at equal weight.

Source: Zhou et al., "BBN: Bilateral-Branch Network with Cumulative Learning", arXiv:1912.02413, and its public code.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.data.samplers import uniform_and_reversed
from training.methods.method import Losses, Model, Network, Stage, build_model, scheduled_lr
from training.models.backbones import BACKBONES
from training.models.classifiers import LinearClassifier
from training.models.multi_expert import Expert, Outputs
from training.recipe import Recipe


class HalvesBatchNorm2d(nn.BatchNorm2d):
    """Normalises, in training, each half of a batch by its own statistics, and counts both."""

    def forward(self, maps: Tensor) -> Tensor:
        """(2B, C, H, W) to the same."""
        if not self.training:
            return super().forward(maps)
        uniform, rare = maps.chunk(2)
        return torch.cat([super().forward(uniform), super().forward(rare)])


class Branches(nn.Module):
    """
    Shared layers, then the conventional and the re-balancing branch.

    Args:
        layers: of an expert: stages, pooling, flattening. The last block of the last stage becomes two.
        initialise: gives the second of them weights of its own.
    """

    def __init__(self, layers: nn.Sequential, initialise: Callable[[nn.Module], None]) -> None:
        super().__init__()
        *stages, last, pool, flatten = layers
        blocks = list(cast(nn.Sequential, last))
        self.shared = nn.Sequential(*stages, *blocks[:-1])
        self.conventional = blocks[-1]
        self.rebalancing = copy.deepcopy(blocks[-1])
        initialise(self.rebalancing)
        self.pool = nn.Sequential(pool, flatten)

    def forward(self, trunk_features: Tensor) -> Tensor:
        """
        (B, ...) -> (B, 2D), both branches' features of every image; in training (2B, ...) -> (B, 2D), the conventional
        branch's features of the first half beside the other's of the second.
        """
        maps = self.shared(trunk_features)
        uniform, rare = maps.chunk(2) if self.training else (maps, maps)
        return torch.cat([self.pool(self.conventional(uniform)), self.pool(self.rebalancing(rare))], dim=1)


def uniform_share(epoch: int, epochs: int) -> float:
    """α, the weight of the conventional branch: from 1 in epoch 0 down along a parabola."""
    return 1 - (epoch / epochs) ** 2


def mix(features: Tensor, alpha: float) -> Tensor:
    """(B, 2D): the conventional half times 2α, the other times 2(1 − α); α = ½ changes nothing."""
    uniform, rare = features.chunk(2, dim=1)
    return torch.cat([2 * alpha * uniform, 2 * (1 - alpha) * rare], dim=1)


def step(
    classifier: nn.Module, epochs: int,
    network: Network, images: Tensor, labels: Tensor, epoch: int, generator: torch.Generator,
) -> tuple[Outputs, Losses]:  # fmt: skip
    """
    One batch of 2B images, the uniform half first.

    Returns:
        For all 2B images the logits of the mixed features, (1, 2B, C), each twice; and α · CE against the labels of the
        first half + (1 − α) · CE against those of the second.
    """
    alpha = uniform_share(epoch, epochs)
    features = network(images).expert_features[0]  # (B, 2D)
    logits = classifier(mix(features, alpha))
    uniform, rare = (F.cross_entropy(logits, half) for half in labels.chunk(2))
    losses = {"loss": alpha * uniform + (1 - alpha) * rare, "uniform": uniform, "reversed": rare}
    return Outputs(torch.cat([logits, logits]).unsqueeze(0), torch.cat([features, features]).unsqueeze(0)), losses


def build(
    recipe: Recipe, class_counts: Sequence[int], mean: Sequence[float], std: Sequence[float]
) -> tuple[Model, list[Stage]]:
    """A fresh model of one expert with two branches, and its one stage."""
    model = build_model(recipe, len(class_counts), mean, std)
    expert = cast(Expert, model.net.experts[0])
    initialise = cast(Callable[[nn.Module], None], BACKBONES[recipe.backbone].initialise)
    branches = Branches(cast(nn.Sequential, expert.layers), initialise)
    expert.layers = branches
    for shared in (model.net.trunk, branches.shared):
        _norm_halves_apart(shared)
    plain = cast(LinearClassifier, expert.classifier)
    expert.classifier = LinearClassifier(2 * plain.in_features, plain.out_features)
    expert.classifier.reset_parameters()
    batch_size = 2 * recipe.batch_size
    stage = Stage(
        name="experts", epochs=recipe.epochs, batch_size=batch_size, part=model.net,
        losses=None, step=partial(step, expert.classifier, recipe.epochs),
        sampler=uniform_and_reversed(batch_size), lr=partial(scheduled_lr, recipe),
        momentum=recipe.momentum, nesterov=recipe.nesterov, weight_decay=recipe.weight_decay,
    )  # fmt: skip
    return model, [stage]


def _norm_halves_apart(layers: nn.Module) -> None:
    for module in list(layers.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, HalvesBatchNorm2d(child.num_features))
