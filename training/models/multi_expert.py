"""A trunk that all experts share, and experts that each give features and logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Outputs(NamedTuple):
    """
    What all experts say of a batch.

    Attributes:
        expert_logits: (E, B, C), scaled as the classifier scales them.
        expert_features: (E, B, D), what the classifier saw: the pooled last feature map.
        own_logits: (E, B, C), where `expert_logits` are not what each expert says but what it adds to the answer.
        teacher_logits: (B, C), where the stage has a teacher.
    """

    expert_logits: Tensor
    expert_features: Tensor
    own_logits: Tensor | None = None
    teacher_logits: Tensor | None = None


class Trunk(nn.Module):
    """Bytes to features; scaling and normalisation live here, so that training and serving cannot differ."""

    mean: Tensor
    std: Tensor

    def __init__(self, layers: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.layers = layers

    def forward(self, images: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 -> features (B, ...)."""
        return self.layers((images.permute(0, 3, 1, 2).float() - self.mean) / self.std)


class Expert(nn.Module):
    """One expert: its own layers and its own classifier."""

    def __init__(self, layers: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.layers = layers
        self.classifier = classifier

    def forward(self, trunk_features: Tensor) -> tuple[Tensor, Tensor]:
        """(B, ...) -> logits (B, C), expert feature (B, D), both fp32."""
        feature = self.layers(trunk_features).float()
        return self.classifier(feature), feature


class Addition(nn.Module):
    """How an expert joins those before it: its logits are added to theirs."""

    def forward(self, logits_sum: Tensor, logits: Tensor) -> Tensor:
        """(B, C) of the experts before, (B, C) of this one -> (B, C) of all."""
        return logits_sum + logits


class MultiExpertNet(nn.Module):
    """Trunk and E experts; the prediction is the argmax of the mean of the experts' logits."""

    def __init__(self, trunk: Trunk, experts: Sequence[Expert]) -> None:
        super().__init__()
        self.trunk = trunk
        self.experts = nn.ModuleList(experts)

    def addition(self, index: int) -> nn.Module:
        """How expert `index`, from 0, joins the sum of those before it: (logits_sum, logits) -> logits_sum."""
        return Addition()

    def forward(self, images: Tensor) -> Outputs:
        """(B, H, W, 3) uint8 -> logits and features of all experts."""
        trunk_features = self.trunk(images)
        logits, features = zip(*(expert(trunk_features) for expert in self.experts), strict=True)
        return Outputs(torch.stack(logits), torch.stack(features))
