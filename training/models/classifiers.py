"""From features to logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class CosineClassifier(nn.Module):
    """
    logits_c = scale · ⟨f/‖f‖, w_c/‖w_c‖⟩, without bias. The scale sits here, so that every loss sees scaled logits.

    Runs in fp32 under autocast: cosines near 1 need more digits than bf16 has.

    Source: LDAM, arXiv:1906.07413; RIDE, arXiv:2010.01809.
    """

    def __init__(self, n_features: int, n_classes: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(n_classes, n_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fresh weights: uniform directions of unit length."""
        with torch.no_grad():
            self.weight.copy_(F.normalize(torch.empty_like(self.weight).uniform_(-1, 1), dim=1))

    def forward(self, features: Tensor) -> Tensor:
        """(B, D) -> (B, C)."""
        with torch.autocast(features.device.type, enabled=False):
            return self.scale * F.linear(F.normalize(features.float(), dim=1), F.normalize(self.weight, dim=1))


class LinearClassifier(nn.Linear):
    """
    An ordinary classifier with bias; fp32 under autocast, like the cosine one.

    It begins as in LDAM's network, with normal weights after Kaiming; `reset_parameters` draws torch's own, less than
    half as wide, for networks for large images and those that are no part of LDAM's.
    """

    def __init__(self, n_features: int, n_classes: int) -> None:
        super().__init__(n_features, n_classes)
        nn.init.kaiming_normal_(self.weight)

    def forward(self, features: Tensor) -> Tensor:
        """(B, D) -> (B, C)."""
        with torch.autocast(features.device.type, enabled=False):
            return super().forward(features.float())
