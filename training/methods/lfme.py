"""
LFME: three teachers, each trained on the classes of one split, teach one student its own classes.

A teacher's voice fades once the student approaches its accuracy on held-out images; hard images of frequent classes
enter slowly, those of rare classes have their full weight from the beginning.

Source: Xiang et al., "Learning From Multiple Experts: Self-paced Knowledge Distillation for Long-tailed
Classification", arXiv:2001.01536, and its public code. There the accuracies come from a validation set, an image's
difficulty from one pass over the training images; here from the held-out images, and from the augmented image itself,
on the scale of its class in such a pass. The splits are RIDE's. In the code the curriculum's weights go on growing
after half of the epochs; here they stay at 1.
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
from training.data.sets import AnyImages
from training.methods.decoupled import class_mean_accuracy, logits_of
from training.methods.method import Losses, Model, Network, Stage, build_model, cosine_lr, scheduled_lr
from training.models.classifiers import LinearClassifier
from training.models.multi_expert import MultiExpertNet, Outputs
from training.recipe import Recipe

BATCH_SHARES = {"many": 1, "medium": 2, "few": 4}  # of which a teacher's batches are one: 128, 64 and 32 as published
SMALLEST_RANGE = 1e-6  # of a class's confidences: a class of one image has none


def classes_of_splits(class_counts: Sequence[int]) -> dict[str, list[int]]:
    """
    Labels of the many, medium and few classes.

    Raises:
        DataError: where a split has no class or a single image, so that its teacher would have nothing to learn.
    """
    classes = {name: [c for c, count in enumerate(class_counts) if split_of(count) == name] for name in SPLITS}
    for name, labels in classes.items():
        if not labels:
            raise DataError(
                f"method 'lfme' has a teacher for each split, and no class is {name}; many is more than {MANY_ABOVE} "
                f"training images, few fewer than {FEW_BELOW}"
            )
        if sum(class_counts[c] for c in labels) < 2:
            raise DataError(f"method 'lfme' has a teacher for each split, and the {name} classes have one image in all")
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


def least_weights(class_counts: Sequence[int], classes: dict[str, list[int]]) -> Tensor:
    """
    (C,): how little the hardest image of a class weighs at first: mean count of the few classes by that of its split.

    Args:
        classes: labels by split.
    """
    mean = {name: sum(class_counts[c] for c in labels) / len(labels) for name, labels in classes.items()}
    least = torch.ones(len(class_counts))
    for name, labels in classes.items():
        least[labels] = mean["few"] / mean[name]
    return least


def curriculum_weights(easiness: Tensor, epoch: int, epochs: int) -> Tensor:
    """
    What an image's logits are multiplied by: from how easy it is linearly to 1 at half of the epochs.

    Args:
        easiness: (B,), 0 to 1.
    """
    return easiness + (1 - easiness) * min(2 * epoch / epochs, 1.0)


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
        lowest, highest: (C,), confidence of its split's teacher in the true class, over a class's training images as
            they are; from the first `prepare` on, as the teachers learn nothing any more.
    """

    def __init__(self, recipe: Recipe, model: Model, class_counts: Sequence[int]) -> None:
        self.recipe, self.net, self.classes = recipe, model.net, classes_of_splits(class_counts)
        self.teachers = {name: cast(MultiExpertNet, model.teachers[name]) for name in self.classes}
        self.weights: dict[str, float] = {}
        self.lowest: Tensor | None = None
        self.highest: Tensor | None = None
        self._least = least_weights(class_counts, self.classes)
        self._teacher_accuracies: dict[str, float] = {}

    def prepare(self, train: AnyImages, heldout: AnyImages, epoch: int) -> None:
        """Weigh each teacher by how far the student's accuracy on its classes is below its own."""
        if self.lowest is None:
            seen = {name: logits_of(net, train)[0] for name, net in self.teachers.items()}
            confidence = self._confidence(seen, train.labels)
            self._least = self._least.to(confidence.device)
            self.lowest = torch.ones_like(self._least).scatter_reduce(0, train.labels, confidence, "amin")
            self.highest = torch.zeros_like(self._least).scatter_reduce(0, train.labels, confidence, "amax")
        logits = logits_of(self.net, heldout)[0]
        for name, classes in self.classes.items():
            of_split = torch.isin(heldout.labels, torch.tensor(classes, device=heldout.labels.device))
            if not of_split.any():  # nothing to judge by
                self.weights[name] = 1.0
                continue
            labels = heldout.labels[of_split]
            if name not in self._teacher_accuracies:
                taught = logits_of(self.teachers[name], heldout)[0][of_split]
                self._teacher_accuracies[name] = class_mean_accuracy(only(taught, classes), labels)
            accuracy = class_mean_accuracy(logits[of_split], labels)
            self.weights[name] = teacher_weight(accuracy, self._teacher_accuracies[name], self.recipe.lfme_threshold)

    def step(
        self, network: Network, images: Tensor, labels: Tensor, epoch: int, generator: torch.Generator
    ) -> tuple[Outputs, Losses]:
        """Cross-entropy and, weighted, each teacher's distillation, all on logits scaled by the curriculum."""
        with torch.no_grad():
            taught = {name: teacher(images).expert_logits[0] for name, teacher in self.teachers.items()}
            easiness = self._easiness(self._confidence(taught, labels), labels)
        outputs = network(images)
        weights = curriculum_weights(easiness, epoch, self.recipe.epochs)
        logits = weights.unsqueeze(1) * outputs.expert_logits[0]
        losses = {"cross_entropy": F.cross_entropy(logits, labels)}
        for name, classes in self.classes.items():
            divergence = distillation(logits[:, classes], taught[name][:, classes], self.recipe.lfme_temperature)
            losses[name] = self.weights[name] * divergence
        return outputs, {"loss": torch.stack(list(losses.values())).sum(), **losses}

    def _confidence(self, taught: dict[str, Tensor], labels: Tensor) -> Tensor:
        """(B,): the probability that its split's teacher gives an image's class, from the teachers' logits."""
        confidence = torch.zeros(len(labels), device=labels.device)
        for name, classes in self.classes.items():
            probabilities = F.softmax(only(taught[name], classes), dim=1)  # 0 for classes of other splits
            confidence += probabilities.gather(1, labels.unsqueeze(1)).squeeze(1)
        return confidence

    def _easiness(self, confidence: Tensor, labels: Tensor) -> Tensor:
        """(B,): a class's lowest confidence becomes the least weight of its split, its highest 1."""
        assert self.lowest is not None
        assert self.highest is not None
        lowest, highest, least = self.lowest[labels], self.highest[labels], self._least[labels]
        scaled = (confidence - lowest) / (highest - lowest).clamp_min(SMALLEST_RANGE)
        return least + (1 - least) * scaled.clamp(0, 1)


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
    for net in (student.net, *teachers.values()):
        cast(LinearClassifier, net.experts[0].classifier).reset_parameters()
    stages = [
        Stage(
            name=name, epochs=recipe.lfme_epochs, batch_size=max(recipe.lfme_batch_size // BATCH_SHARES[name], 1),
            part=teachers[name],
            losses=None, step=partial(teacher_step, classes[name]), network=teachers[name],
            sampler=of_classes(classes[name]), lr=partial(cosine_lr, recipe.lfme_lr, recipe.lfme_epochs),
            momentum=recipe.momentum, nesterov=recipe.nesterov, weight_decay=recipe.lfme_weight_decay,
            lr_field="lfme_lr",
        )
        for name in classes
    ]  # fmt: skip
    lessons = Student(recipe, model, class_counts)
    stages.append(
        Stage(
            name="experts", epochs=recipe.epochs, batch_size=recipe.batch_size, part=model.net,
            losses=None, step=lessons.step, prepare=lessons.prepare,
            sampler=class_aware, lr=partial(scheduled_lr, recipe),
            momentum=recipe.momentum, nesterov=recipe.nesterov, weight_decay=recipe.weight_decay,
        )
    )  # fmt: skip
    return model, stages
