"""
OLTR: a memory of class centroids lends rare classes what frequent ones taught, and attention sharpens the features.

Stage 1 is plain cross-entropy. Then the memory is filled with the class means of the training images, and stage 2
trains everything on class-aware samples.

The authors' ResNet-10 has one more linear layer in stage 2, of as many numbers as the features have. So have all our
networks for large images. Adapted to CIFAR: the features are the pooled last feature map itself, of 64 numbers, and the
attention works on the 8x8 map in place of 7x7. Stage 1 follows the recipe's own schedule.

Source: Liu et al., "Large-Scale Long-Tailed Recognition in an Open World", arXiv:1904.05160, and its public code.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.data.samplers import class_aware
from training.data.sets import AnyImages
from training.methods.decoupled import class_means, features_of
from training.methods.method import FitStage, Losses, Model, Stage, build_model
from training.methods.single import single_stage
from training.models.classifiers import LinearClassifier
from training.models.multi_expert import Expert, Outputs
from training.recipe import Recipe

SMALLEST_SQUARED_DISTANCE = 1e-6


class ModulatedAttention(nn.Module):
    """
    x + spatial attention · self-attention of x.

    It acts from the beginning: the authors' code sets the last projection to 0, and then draws all convolutions anew.

    Args:
        width: channels of the feature map, even.
        pixels: H·W, of the feature map.
    """

    def __init__(self, width: int, pixels: int) -> None:
        super().__init__()
        inner = width // 2
        self.value, self.query, self.key = (nn.Conv2d(width, inner, 1) for _ in range(3))
        self.out = nn.Conv2d(inner, width, 1, bias=False)
        for projection in (self.value, self.query, self.key, self.out):
            nn.init.kaiming_normal_(projection.weight, mode="fan_out")
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
        self.spatial = nn.Linear(width * pixels, pixels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, H, W) -> (B, width, H, W)."""
        batch, _, height, width = x.shape
        value, query, key = (projection(x).flatten(2) for projection in (self.value, self.query, self.key))
        attention = F.softmax(query.transpose(1, 2) @ key, dim=-1)  # (B, H·W, H·W)
        attended = (attention @ value.transpose(1, 2)).transpose(1, 2)  # (B, width/2, H·W)
        mask = self.out(attended.reshape(batch, -1, height, width))
        places = F.softmax(self.spatial(x.flatten(1)), dim=1).reshape(batch, 1, height, width)
        return x + places * mask


class SquashedCosineClassifier(nn.Module):
    """
    logits_c = scale · ‖v‖/(1 + ‖v‖) · cos(v, w_c): unlike a plain cosine it lets the length of v count.

    The paper squashes with ‖v‖²/(1 + ‖v‖²); the authors' code, which we follow, with ‖v‖/(1 + ‖v‖).
    """

    def __init__(self, n_features: int, n_classes: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        bound = 1 / math.sqrt(n_features)
        self.weight = nn.Parameter(torch.empty(n_classes, n_features).uniform_(-bound, bound))

    def forward(self, features: Tensor) -> Tensor:
        """(B, D) -> (B, C)."""
        squashed = features / (1 + features.norm(dim=1, keepdim=True))
        return self.scale * F.linear(squashed, F.normalize(self.weight, dim=1))


def squared_distances(features: Tensor, centroids: Tensor) -> Tensor:
    """(B, D), (C, D) -> (B, C)."""
    lengths = features.square().sum(dim=1, keepdim=True) + centroids.square().sum(dim=1)
    return (lengths - 2 * F.linear(features, centroids)).clamp_min(SMALLEST_SQUARED_DISTANCE)


class Memory(nn.Module):
    """One centroid for each class."""

    def __init__(self, n_features: int, n_classes: int) -> None:
        super().__init__()
        self.centroids = nn.Parameter(torch.zeros(n_classes, n_features))

    def forward(self, features: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
        """
        What the memory holds for these features.

        Args:
            features: (B, D).
            shares: (B, C), of the classes.

        Returns:
            Distance to the nearest centroid (B, 1), mean of the centroids (B, D); without gradient for the centroids.
        """
        centroids = self.centroids.detach()
        nearest = squared_distances(features, centroids).min(dim=1, keepdim=True).values.sqrt()
        return nearest, shares @ centroids


class MemoryClassifier(nn.Module):
    """
    Cosine classifier of v = r·(f + tanh(W_g f) ⊙ softmax(W_h f) M), r = reach / distance to the nearest centroid of M.

    Gradients of the logits do not reach the centroids; those of `centroid_loss` do.

    Args:
        concepts: W_h, the first stage's classifier.
        reach: numerator of r.
        scale: of the cosine.
    """

    def __init__(self, concepts: LinearClassifier, reach: float, scale: float) -> None:
        super().__init__()
        n_features, n_classes = concepts.in_features, concepts.out_features
        self.reach = reach
        self.concepts = concepts
        self.selector = nn.Linear(n_features, n_features)
        self.cosine = SquashedCosineClassifier(n_features, n_classes, scale)
        self.memory = Memory(n_features, n_classes)

    def enriched(self, features: Tensor) -> Tensor:
        """f (B, D) -> v (B, D)."""
        nearest, remembered = self.memory(features, F.softmax(self.concepts(features), dim=1))
        return self.reach / nearest * (features + torch.tanh(self.selector(features)) * remembered)

    def forward(self, features: Tensor) -> Tensor:
        """(B, D) -> (B, C); fp32 under autocast."""
        with torch.autocast(features.device.type, enabled=False):
            return self.cosine(self.enriched(features.float()))


def centroid_loss(
    memory: Memory, features: Tensor, labels: Tensor, *, weight: float, margin: float, repel_weight: float
) -> Tensor:
    """
    weight · (½ ‖f − M_y‖² + repel_weight · max(0, margin − the others' squared distances, summed and divided by C)).

    Both terms are means over the batch, the second before its maximum. It divides by C, as the authors' code does,
    although there are C − 1 others. As there, a centroid follows the features of its n images in the batch faster than
    this loss says: the gradient of its first term is Σ (M − f) / (1 + n) / B, without the weight.

    Args:
        features: (B, D).
        labels: (B,).

    Returns:
        ().
    """
    own = memory.centroids[labels]
    attract = (features - own.detach()).square().sum(dim=1).mean() / 2
    others = squared_distances(features, memory.centroids).scatter(1, labels.unsqueeze(1), 0)
    loss = weight * (attract + repel_weight * (margin - others.mean()).clamp_min(0))
    images = F.one_hot(labels, len(memory.centroids)).sum(dim=0)[labels]  # (B,), n of each image's class
    follow = ((features.detach() - own).square().sum(dim=1) / (1 + images)).mean() / 2
    return loss + follow - follow.detach()


class MemoryLoss:
    """Cross-entropy of the only expert, plus the weighted centroid loss of its features."""

    def __init__(self, recipe: Recipe, memory: Memory) -> None:
        self.recipe, self.memory = recipe, memory

    def __call__(self, outputs: Outputs, labels: Tensor, epoch: int) -> Losses:
        """The loss and its two parts, mean over the batch."""
        recipe = self.recipe
        entropy = F.cross_entropy(outputs.expert_logits[0], labels)
        centroid = centroid_loss(
            self.memory, outputs.expert_features[0], labels,
            weight=recipe.oltr_centroid_weight, margin=recipe.oltr_margin, repel_weight=recipe.oltr_repel_weight,
        )  # fmt: skip
        return {"loss": entropy + centroid, "cross_entropy": entropy, "centroid": centroid}


def fill(model: Model, memory: Memory, train: AnyImages, heldout: AnyImages) -> dict[str, Any]:
    """Set the centroids to the class means of the training images' features."""
    features = features_of(model.net, train)[0]
    memory.centroids.copy_(class_means(features, train.labels, len(memory.centroids)))
    return {"mean_length": float(memory.centroids.norm(dim=1).mean())}


def build(
    recipe: Recipe, class_counts: Sequence[int], mean: Sequence[float], std: Sequence[float]
) -> tuple[Model, list[Stage | FitStage]]:
    """A fresh plain model; its stage, the memory's filling, and the stage that trains with attention and memory."""
    model = build_model(recipe, len(class_counts), mean, std)
    expert = cast(Expert, model.net.experts[0])
    *stages, pool, flatten = cast(nn.Sequential, expert.layers)
    with torch.no_grad():
        image = torch.zeros(1, recipe.image_size, recipe.image_size, 3, dtype=torch.uint8)
        _, width, height, columns = nn.Sequential(*stages).eval()(model.net.trunk.eval()(image)).shape
    layers = nn.Sequential(*stages, ModulatedAttention(width, height * columns), pool, flatten)
    if not recipe.backbone.endswith("_cifar"):
        layers.extend([nn.Linear(width, width), nn.ReLU()])
    classifier = MemoryClassifier(cast(LinearClassifier, expert.classifier), recipe.oltr_reach, recipe.oltr_scale)

    def arrange() -> None:
        expert.layers, expert.classifier = layers, classifier

    plain = dataclasses.replace(recipe, method="single")
    first = dataclasses.replace(single_stage(plain, model, class_counts), alone=plain)
    filling = FitStage("centroids", partial(fill, model, classifier.memory), arrange)
    faster = recipe.oltr_classifier_lr / recipe.oltr_lr
    second = Stage(
        name="memory", epochs=recipe.oltr_epochs, batch_size=recipe.batch_size, part=model.net,
        losses=MemoryLoss(recipe, classifier.memory), sampler=class_aware,
        lr=lambda epoch: recipe.oltr_lr * 0.1 ** (3 * epoch // recipe.oltr_epochs),
        momentum=recipe.momentum, nesterov=recipe.nesterov, weight_decay=recipe.oltr_weight_decay,
        lr_factors=[(module, faster) for module in (classifier.concepts, classifier.selector, classifier.cosine)],
        lr_field="oltr_lr",
    )  # fmt: skip
    return model, [first, filling, second]
