"""
Baselines with one expert: plain cross-entropy, and LDAM with deferred re-weighting (DRW).

Source: Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss", arXiv:1906.07413.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor
from torch.nn import functional as F

from training.data.samplers import shuffled
from training.methods.losses import effective_number_weights, ldam_loss, ldam_margins
from training.methods.method import Losses, Model, Stage, build_model, stepped_lr
from training.models.multi_expert import Outputs
from training.recipe import Recipe


class SingleLoss:
    """Cross-entropy or LDAM of the only expert; class weights from the deferred epoch on, where the recipe has one."""

    def __init__(self, recipe: Recipe, class_counts: Sequence[int]) -> None:
        self.recipe = recipe
        self.margins = ldam_margins(class_counts, recipe.max_margin)
        self.class_weights = effective_number_weights(class_counts, recipe.effective_beta)

    def __call__(self, outputs: Outputs, labels: Tensor, epoch: int) -> Losses:
        """The loss, in nats, mean over the batch."""
        recipe, logits = self.recipe, outputs.expert_logits[0]
        deferred = recipe.deferred_from is not None and epoch >= recipe.epoch_of(recipe.deferred_from)
        class_weights = self.class_weights.to(logits.device) if deferred else None
        if recipe.method == "ce":
            return {"loss": F.cross_entropy(logits, labels, weight=class_weights)}
        return {"loss": ldam_loss(logits, labels, self.margins.to(logits.device), recipe.cosine_scale, class_weights)}


def build(
    recipe: Recipe, class_counts: Sequence[int], mean: Sequence[float], std: Sequence[float]
) -> tuple[Model, list[Stage]]:
    """A fresh model of one expert and its only stage."""
    model = build_model(recipe, len(class_counts), mean, std)
    stage = Stage(
        name="experts", epochs=recipe.epochs, batch_size=recipe.batch_size, part=model.net,
        losses=SingleLoss(recipe, class_counts), sampler=shuffled, lr=partial(stepped_lr, recipe),
        momentum=recipe.momentum, nesterov=recipe.nesterov, weight_decay=recipe.weight_decay,
    )  # fmt: skip
    return model, [stage]
