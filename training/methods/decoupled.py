"""
Decoupled training: when the features are learnt, the classifiers are trained anew on a balanced footing.

Source: Kang et al., "Decoupling Representation and Classifier", arXiv:1910.09217; with balanced softmax and batch norms
that follow the batches as in SHIKE's public code, arXiv:2304.01279.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from training.data.samplers import SAMPLERS
from training.methods.individual import IndividualLoss
from training.methods.method import Losses, Model, Stage, warm_cosine_lr
from training.models.multi_expert import Outputs
from training.recipe import Recipe


def retrain_stage(recipe: Recipe, model: Model, class_counts: Sequence[int]) -> Stage:
    """Fresh classifiers alone, one loss for each; all else is frozen but the running statistics of batch norms."""
    classifiers = nn.ModuleList(cast(nn.Module, expert.classifier) for expert in model.net.experts)
    individual = IndividualLoss(recipe.retrain_loss, recipe, class_counts)

    def begin() -> None:
        for classifier in classifiers:
            classifier.reset_parameters()  # type: ignore[operator]

    def losses(outputs: Outputs, labels: Tensor, epoch: int) -> Losses:
        each = [individual(logits, labels, recipe.epochs + epoch) for logits in outputs.expert_logits]
        return {"loss": torch.stack(each).sum()}

    return Stage(
        name="classifiers", epochs=recipe.retrain_epochs, batch_size=recipe.batch_size, part=classifiers,
        losses=losses, sampler=SAMPLERS[recipe.retrain_sampler],
        lr=partial(warm_cosine_lr, recipe.retrain_lr, recipe.retrain_epochs, recipe.warmup_epochs),
        momentum=recipe.momentum, nesterov=recipe.nesterov, weight_decay=recipe.weight_decay,
        begin=begin, norms_follow=True,
    )  # fmt: skip
