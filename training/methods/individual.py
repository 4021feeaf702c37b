"""The loss of each expert on its own, by name; every method that trains experts can take any of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from training.methods.losses import (
    effective_number_weights,
    focal_loss,
    ldam_loss,
    ldam_margins,
    sigmoid_focal_loss,
    weighted_cross_entropy,
)
from training.recipe import Recipe


class IndividualLoss:
    """
    One of the losses that `Recipe.loss` names, with class weights from the deferred epoch on.

    Args:
        name: of the loss.
    """

    def __init__(self, name: str, recipe: Recipe, class_counts: Sequence[int]) -> None:
        self.name, self.recipe = name, recipe
        self.margins = ldam_margins(class_counts, recipe.max_margin)
        self.class_weights = effective_number_weights(class_counts, recipe.effective_beta)
        counts = torch.tensor(class_counts, dtype=torch.float64)
        self.log_prior = torch.log(counts / counts.sum()).float()
        if name == "logit_adjusted":
            self.log_prior *= recipe.logit_tau

    def is_deferred(self, epoch: int) -> bool:
        """Whether class weights apply at `epoch`, from 0."""
        return self.recipe.deferred_from is not None and epoch >= self.recipe.epoch_of(self.recipe.deferred_from)

    def __call__(self, logits: Tensor, labels: Tensor, epoch: int, targets: Tensor | None = None) -> Tensor:
        """
        The loss of one expert.

        Args:
            logits: (B, C), as the classifier scales them.
            labels: (B,).
            epoch: from 0.
            targets: (B, C), rows that sum to 1, of mixed images; margins and class weights follow `labels`. None: the
                labels themselves. The focal losses have no such form.

        Returns:
            (), in nats, mean over images, weighted by class where weights apply.
        """
        self._move_to(logits.device)
        weights = self.class_weights if self.is_deferred(epoch) else None
        if self.name == "ldam":
            return ldam_loss(logits, labels, self.margins, self.recipe.cosine_scale, weights, targets)
        if self.name == "focal":
            return focal_loss(logits, labels, self.recipe.focal_gamma, weights)
        if self.name == "sigmoid_focal":
            return sigmoid_focal_loss(logits, labels, self.recipe.focal_gamma, weights)
        if self.name in ("balanced_softmax", "logit_adjusted"):
            logits = logits + self.log_prior
        return weighted_cross_entropy(logits, labels, weights, targets)

    def _move_to(self, device: torch.device) -> None:
        """Once: a copy in every step would have a GPU wait for each."""
        if self.margins.device != device:
            self.margins, self.class_weights, self.log_prior = (
                tensor.to(device) for tensor in (self.margins, self.class_weights, self.log_prior)
            )


class ExpertLosses:
    """The individual loss of every expert: the same for all, or each with the prior that `expert_taus` gives it."""

    def __init__(self, recipe: Recipe, class_counts: Sequence[int]) -> None:
        taus = recipe.expert_taus or (recipe.logit_tau,) * recipe.n_experts
        own = [dataclasses.replace(recipe, logit_tau=tau) for tau in taus]
        self.each = [IndividualLoss(recipe.loss, expert, class_counts) for expert in own]

    def is_deferred(self, epoch: int) -> bool:
        """Whether class weights apply at `epoch`, from 0."""
        return self.each[0].is_deferred(epoch)

    def __call__(self, expert_logits: Tensor, labels: Tensor, epoch: int, targets: Tensor | None = None) -> Tensor:
        """
        (E, B, C), (B,), and (B, C) where images are mixed -> (), in nats, mean over images, sum over experts.

        The sum ties the learning rate to E.
        """
        losses = [loss(logits, labels, epoch, targets) for loss, logits in zip(self.each, expert_logits, strict=True)]
        return torch.stack(losses).sum()
