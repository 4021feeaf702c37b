"""Baselines with one expert under any individual loss: CE, focal, LDAM with deferred re-weighting, balanced softmax."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from training.data.samplers import shuffled
from training.methods.decoupled import retrain_stage
from training.methods.individual import IndividualLoss
from training.methods.method import Losses, Model, Stage, build_model, mixing_of, scheduled_lr
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
) -> tuple[Model, list[Stage]]:
    """A fresh model of one expert; its stage, and the classifier's where the recipe retrains it."""
    model = build_model(recipe, len(class_counts), mean, std)
    stage = Stage(
        name="experts", epochs=recipe.epochs, batch_size=recipe.batch_size, part=model.net,
        losses=SingleLoss(recipe, class_counts), sampler=shuffled, lr=partial(scheduled_lr, recipe),
        momentum=recipe.momentum, nesterov=recipe.nesterov, weight_decay=recipe.weight_decay,
        optimiser=recipe.optimiser, clip_norm=recipe.clip_norm, mixing=mixing_of(recipe, len(class_counts)),
    )  # fmt: skip
    return model, [stage, retrain_stage(recipe, model, class_counts)] if recipe.retrain_epochs else [stage]
