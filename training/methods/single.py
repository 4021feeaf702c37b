"""Baselines with one expert under any individual loss: CE, focal, LDAM with deferred re-weighting, balanced softmax."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from training.methods.individual import IndividualLoss
from training.methods.method import FitStage, Losses, Model, Stage, build_model, experts_stage
from training.methods.ride import later_stages
from training.models.multi_expert import Outputs
from training.recipe import Recipe


class SingleLoss:
    """The individual loss of the only expert."""

    def __init__(self, recipe: Recipe, class_counts: Sequence[int]) -> None:
        self.individual = IndividualLoss(recipe.loss, recipe, class_counts)

    def __call__(self, outputs: Outputs, labels: Tensor, epoch: int, targets: Tensor | None = None) -> Losses:
        """The loss, in nats, mean over the batch."""
        return {"loss": self.individual(outputs.expert_logits[0], labels, epoch, targets)}


def build(
    recipe: Recipe, class_counts: Sequence[int], mean: Sequence[float], std: Sequence[float]
) -> tuple[Model, list[Stage | FitStage]]:
    """A fresh model of one expert; its stage, and the classifier's where the recipe retrains it."""
    model = build_model(recipe, len(class_counts), mean, std)
    return model, [single_stage(recipe, model, class_counts), *later_stages(recipe, model, class_counts)]


def single_stage(recipe: Recipe, model: Model, class_counts: Sequence[int]) -> Stage:
    """The whole network under `recipe.loss`."""
    return experts_stage(recipe, model, SingleLoss(recipe, class_counts), len(class_counts))
