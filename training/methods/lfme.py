"""
LFME: three teachers, each trained on the classes of one split, teach one student its own classes.

A teacher's voice fades once the student approaches its accuracy on held-out images; hard images enter slowly.

Source: Xiang et al., "Learning From Multiple Experts: Self-paced Knowledge Distillation for Long-tailed
Classification", arXiv:2001.01536, and its public code. There the accuracies come from a validation set, an image's
difficulty from one pass over the training images; here from the held-out images, and from the augmented image itself.
The splits are RIDE's. In the code the curriculum's weights go on growing after half of the epochs; here they stay at 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from training.data.longtail import FEW_BELOW, MANY_ABOVE, SPLITS, split_of
from training.data.report import DataError
from training.data.samplers import class_aware, of_classes
from training.data.sets import AnyImages, Images
from training.methods.decoupled import class_mean_accuracy, features_and_logits
from training.methods.method import Losses, Model, Network, Stage, build_model, cosine_lr, scheduled_lr
from training.models.multi_expert import MultiExpertNet, Outputs
from training.recipe import Recipe


def classes_of_splits(class_counts: Sequence[int]) -> dict[str, list[int]]:
    """
    Labels of the many, medium and few classes.

    Raises:
        DataError: where a split has no class, so that its teacher would have nothing to learn.
    """
    classes = {name: [c for c, count in enumerate(class_counts) if split_of(count) == name] for name in SPLITS}
    for name, labels in classes.items():
        if not labels:
            raise DataError(
                f"method 'lfme' has a teacher for each split, and no class is {name}; many is more than {MANY_ABOVE} "
                f"training images, few fewer than {FEW_BELOW}"
            )
    return classes


def only(logits: Tensor, classes: Sequence[int]) -> Tensor:
    """(..., C): the logits with −∞ in place of those of all other classes."""
    others = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device)
    others[list(classes)] = False
    return logits.masked_fill(others, float("-inf"))


def teacher_weight(accuracy: float, teacher_accuracy: float, threshold: float) -> float:
    """
    1 until the student's accuracy reaches `threshold` of the teacher's, then falling to 0 where it has caught up.

    A teacher that is never right weighs nothing.
    """
    if teacher_accuracy <= 0:
        return 0.0
    if accuracy < threshold * teacher_accuracy:
        return 1.0
    return max((teacher_accuracy - accuracy) / teacher_accuracy / (1 - threshold), 0.0)


def curriculum_weights(confidence: Tensor, epoch: int, epochs: int) -> Tensor:
    """
    What an image's logits are multiplied by: from the teacher's confidence linearly to 1 at half of the epochs.

    Args:
        confidence: (B,), probability that its split's teacher gives the true class.
    """
    return confidence + (1 - confidence) * min(2 * epoch / epochs, 1.0)


def distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """
    (): KL(softmax(teacher/T) ‖ softmax(student/T)) over the classes of a slice, mean over images, without a factor T².

    Args:
        student, teacher: (B, S), logits of the slice.
    """
    return F.kl_div(
        F.log_softmax(student / temperature, dim=1), F.softmax(teacher / temperature, dim=1), reduction="batchmean"
    )


class Student:
    """
    What the student's stage does beyond a forward pass.

    Attributes:
        weights: of the teachers, by split, for the epoch that `prepare` was called for.
    """

    def __init__(self, recipe: Recipe, model: Model, classes: dict[str, list[int]]) -> None:
        self.recipe, self.net, self.classes = recipe, model.net, classes
        self.teachers = {name: cast(MultiExpertNet, model.teachers[name]) for name in classes}
        self.weights: dict[str, float] = {}
        self._teacher_accuracies: dict[str, float] = {}  # they learn nothing any more

    def prepare(self, train: AnyImages, heldout: AnyImages, epoch: int) -> None:
        """Weigh each teacher by how far the student's accuracy on its classes is below its own."""
        logits = features_and_logits(self.net, heldout).expert_logits[0]
        for name, classes in self.classes.items():
            of_split = torch.isin(heldout.labels, torch.tensor(classes, device=heldout.labels.device))
            if not of_split.any():  # nothing to judge by
                self.weights[name] = 1.0
                continue
            images = Images(heldout.pixels[of_split], heldout.labels[of_split])
            if name not in self._teacher_accuracies:
                taught = only(features_and_logits(self.teachers[name], images).expert_logits[0], classes)
                self._teacher_accuracies[name] = class_mean_accuracy(taught, images.labels)
            self.weights[name] = teacher_weight(
                class_mean_accuracy(logits[of_split], images.labels), self._teacher_accuracies[name],
                self.recipe.lfme_threshold,
            )  # fmt: skip

    def step(
        self, network: Network, images: Tensor, labels: Tensor, epoch: int, generator: torch.Generator
    ) -> tuple[Outputs, Losses]:
        """Cross-entropy and, weighted, each teacher's distillation, all on logits scaled by the curriculum."""
        with torch.no_grad():
            taught = {name: teacher(images).expert_logits[0] for name, teacher in self.teachers.items()}
            confidence = torch.zeros(len(labels), device=labels.device)
            for name, classes in self.classes.items():
                probabilities = F.softmax(only(taught[name], classes), dim=1)  # 0 for classes of other splits
                confidence += probabilities.gather(1, labels.unsqueeze(1)).squeeze(1)
        outputs = network(images)
        weights = curriculum_weights(confidence, epoch, self.recipe.epochs)
        logits = weights.unsqueeze(1) * outputs.expert_logits[0]
        losses = {"cross_entropy": F.cross_entropy(logits, labels)}
        for name, classes in self.classes.items():
            divergence = distillation(logits[:, classes], taught[name][:, classes], self.recipe.lfme_temperature)
            losses[name] = self.weights[name] * divergence
        return outputs, {"loss": torch.stack(list(losses.values())).sum(), **losses}


def teacher_step(
    classes: Sequence[int],
    network: Network, images: Tensor, labels: Tensor, epoch: int, generator: torch.Generator,
) -> tuple[Outputs, Losses]:  # fmt: skip
    """Cross-entropy over the teacher's own classes."""
    outputs = network(images)
    logits = only(outputs.expert_logits, classes)
    return Outputs(logits, outputs.expert_features), {"loss": F.cross_entropy(logits[0], labels)}


def build(
    recipe: Recipe, class_counts: Sequence[int], mean: Sequence[float], std: Sequence[float]
) -> tuple[Model, list[Stage]]:
    """A fresh model with a teacher for each split; the teachers' stages, then the student's, on class-aware draws."""
    classes = classes_of_splits(class_counts)
    student = build_model(recipe, len(class_counts), mean, std)
    teachers = {name: build_model(recipe, len(class_counts), mean, std).net for name in classes}
    model = Model(student.net, None, teachers)
    stages = [
        Stage(
            name=name, epochs=recipe.lfme_epochs, batch_size=recipe.batch_size, part=teachers[name],
            losses=None, step=partial(teacher_step, classes[name]), network=teachers[name],
            sampler=of_classes(classes[name]), lr=partial(cosine_lr, recipe.lfme_lr, recipe.lfme_epochs),
            momentum=recipe.momentum, nesterov=recipe.nesterov, weight_decay=recipe.lfme_weight_decay,
            lr_field="lfme_lr",
        )
        for name in classes
    ]  # fmt: skip
    lessons = Student(recipe, model, classes)
    stages.append(
        Stage(
            name="experts", epochs=recipe.epochs, batch_size=recipe.batch_size, part=model.net,
            losses=None, step=lessons.step, prepare=lessons.prepare,
            sampler=class_aware, lr=partial(scheduled_lr, recipe),
            momentum=recipe.momentum, nesterov=recipe.nesterov, weight_decay=recipe.weight_decay,
        )
    )  # fmt: skip
    return model, stages
