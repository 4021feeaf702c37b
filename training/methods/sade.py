"""
SADE: three experts, one each for the training frequencies, for balanced ones, and for reversed ones.

Source: Zhang et al., "Self-Supervised Aggregation of Diverse Experts for Test-Agnostic Long-Tailed Recognition",
arXiv:2107.09249: its experts, tested by the mean of their logits. What it does at test time for unknown test
frequencies is not here. For an exponential profile the third expert's prior is that of weight 1 + τ, so other numbers
of experts with priors of their own are RIDE's with `expert_taus`. The routers are not SADE's: they are RIDE's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from training.data.longtail import rarest_first
from training.methods.individual import IndividualLoss
from training.methods.method import FitStage, Losses, Model, Stage, build_model, experts_stage
from training.methods.ride import later_stages
from training.models.multi_expert import Outputs
from training.recipe import Recipe


def sade_priors(class_counts: Sequence[int], reversed_tau: float) -> Tensor:
    """
    (3, C): what is added to each expert's logits before its loss: 0, log p, log p − τ · log p̃.

    p is the share of each class in the training set; p̃ has the same values in reversed order, so that the rarest class
    has the share of the most frequent one.
    """
    counts = torch.tensor(class_counts, dtype=torch.float64)
    shares = counts / counts.sum()
    order = rarest_first(class_counts)
    reversed_shares = torch.empty_like(shares)
    reversed_shares[order] = shares[order].flip(0)
    log_shares = torch.log(shares)
    third = log_shares - reversed_tau * torch.log(reversed_shares)
    return torch.stack([torch.zeros_like(shares), log_shares, third]).float()


class SadeLoss:
    """Σ over the three experts of the individual loss of logits plus prior."""

    def __init__(self, recipe: Recipe, class_counts: Sequence[int]) -> None:
        self.individual = IndividualLoss(recipe.loss, recipe, class_counts)
        self.priors = sade_priors(class_counts, recipe.reversed_tau)

    def __call__(self, outputs: Outputs, labels: Tensor, epoch: int) -> Losses:
        """The loss and each expert's part, in nats, mean over the batch, sum over experts."""
        self.priors = self.priors.to(outputs.expert_logits.device)
        adjusted = outputs.expert_logits + self.priors.unsqueeze(1)  # (3, B, C)
        parts = [self.individual(logits, labels, epoch) for logits in adjusted]
        return {"loss": torch.stack(parts).sum()} | {f"expert_{index}": part for index, part in enumerate(parts)}


def build(
    recipe: Recipe, class_counts: Sequence[int], mean: Sequence[float], std: Sequence[float]
) -> tuple[Model, list[Stage | FitStage]]:
    """A fresh model; the experts' stage, the classifiers' where the recipe retrains them, then the routers'."""
    model = build_model(recipe, len(class_counts), mean, std)
    experts = experts_stage(recipe, model, SadeLoss(recipe, class_counts), len(class_counts))
    return model, [experts, *later_stages(recipe, model, class_counts)]
