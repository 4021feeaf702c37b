"""
Decoupled training: when the features are learnt, only the classifiers change, on a balanced footing.

cRT trains fresh classifiers, LWS one scale per class, on class-aware samples; tau-norm and the nearest class mean have
closed forms, whose one choice is made on held-out images. Batch norms follow the batches while cRT and LWS train, as in
the authors' public code.

Source: Kang et al., "Decoupling Representation and Classifier", arXiv:1910.09217; with balanced softmax SHIKE's,
arXiv:2304.01279.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.data.samplers import SAMPLERS
from training.data.sets import AnyImages
from training.methods.individual import IndividualLoss
from training.methods.method import FitStage, Losses, Model, Stage, retrain_warmup, warm_cosine_lr
from training.models.classifiers import LinearClassifier
from training.models.multi_expert import Expert, MultiExpertNet, Outputs
from training.recipe import Recipe

FEATURE_BATCH = 250
SGD_WEIGHT_DECAY = 5e-4  # of a stage that comes after AdamW
TAUS = tuple(step / 10 for step in range(21))


class ScaledClassifier(nn.Module):
    """logits_c = s_c · (⟨w_c, f⟩ + b_c), of which LWS trains the scales s alone."""

    def __init__(self, linear: LinearClassifier) -> None:
        super().__init__()
        self.linear = linear
        self.scales = nn.ParameterList([torch.ones(linear.out_features)])

    def forward(self, features: Tensor) -> Tensor:
        """(B, D) -> (B, C)."""
        return self.scales[0] * self.linear(features)


class NearestMeanClassifier(LinearClassifier):
    """
    logits_c = −‖g − m_c‖² + ‖g‖², linear in g: 2⟨g, m_c⟩ − ‖m_c‖². The largest is that of the nearest class mean m_c.

    g is the feature f itself ("un"), f/‖f‖ ("l2n"), or (f − μ)/‖f − μ‖ with the mean feature μ ("cl2n").
    """

    centre: Tensor
    unit_length: Tensor

    def __init__(self, n_features: int, n_classes: int) -> None:
        super().__init__(n_features, n_classes)
        self.register_buffer("centre", torch.zeros(n_features))
        self.register_buffer("unit_length", torch.tensor(False))

    def fit(self, features: Tensor, labels: Tensor, kind: str) -> None:
        """
        Set the means.

        Args:
            features: (N, D), of the training images.
            labels: (N,); every class has an image.
            kind: "un", "l2n" or "cl2n".
        """
        self.centre.copy_(features.mean(dim=0) if kind == "cl2n" else torch.zeros_like(self.centre))
        self.unit_length.fill_(kind != "un")
        means = class_means(self.transform(features), labels, self.out_features)
        self.weight.copy_(2 * means)
        self.bias.copy_(-means.square().sum(dim=1))

    def transform(self, features: Tensor) -> Tensor:
        """f (B, D) -> g (B, D)."""
        centred = features - self.centre
        length = centred.norm(dim=1, keepdim=True).clamp_min(1e-12)
        return centred / torch.where(self.unit_length, length, torch.ones_like(length))

    def forward(self, features: Tensor) -> Tensor:
        """(B, D) -> (B, C)."""
        return super().forward(self.transform(features.float()))


def tau_normalised(weight: Tensor, tau: float) -> Tensor:
    """(C, D): each class's weights divided by their Euclidean length to the power of `tau`."""
    return weight / weight.norm(dim=1, keepdim=True) ** tau


def class_mean_accuracy(logits: Tensor, labels: Tensor) -> float:
    """
    Percent right, mean over the classes that have images.

    Args:
        logits: (N, C).
        labels: (N,).
    """
    images = torch.bincount(labels, minlength=logits.shape[1])
    right = torch.bincount(labels[logits.argmax(dim=1) == labels], minlength=logits.shape[1])
    return 100 * float((right / images)[images > 0].double().mean())


def class_means(features: Tensor, labels: Tensor, n_classes: int) -> Tensor:
    """Mean feature of each class: (N, D), (N,) -> (C, D); every class has an image."""
    sums = features.new_zeros(n_classes, features.shape[1]).index_add_(0, labels, features)
    return sums / torch.bincount(labels, minlength=n_classes).unsqueeze(1)


def features_of(net: MultiExpertNet, images: AnyImages) -> Tensor:
    """Of all experts for the images as they are, in fp32: (E, N, D)."""
    return torch.cat([net(pixels).expert_features for pixels in images.in_order(FEATURE_BATCH)], dim=1)


def logits_of(net: MultiExpertNet, images: AnyImages) -> Tensor:
    """Of all experts for the images as they are, in fp32: (E, N, C)."""
    return torch.cat([net(pixels).expert_logits for pixels in images.in_order(FEATURE_BATCH)], dim=1)


def fit_tau_norm(net: MultiExpertNet, tau: float | None, train: AnyImages, heldout: AnyImages) -> dict[str, Any]:
    """
    Normalise the weights of every expert's linear classifier, without bias.

    Args:
        tau: None: for each expert the best of 0, 0.1 .. 2 on the held-out images, the smallest of equals.

    Returns:
        {"tau", "heldout_accuracy"}: by expert.
    """
    features = features_of(net, heldout)
    found: dict[str, Any] = {"tau": {}, "heldout_accuracy": {}}
    for index, expert in enumerate(net.experts):
        classifier = cast(LinearClassifier, expert.classifier)
        accuracy = {
            each: class_mean_accuracy(
                F.linear(features[index], tau_normalised(classifier.weight, each)), heldout.labels
            )
            for each in (TAUS if tau is None else (tau,))
        }
        best = max(accuracy, key=lambda each: accuracy[each])
        classifier.weight.copy_(tau_normalised(classifier.weight, best))
        classifier.bias.zero_()
        found["tau"][str(index)], found["heldout_accuracy"][str(index)] = best, accuracy[best]
    return found


def fit_nearest_means(net: MultiExpertNet, kind: str, train: AnyImages, heldout: AnyImages) -> dict[str, Any]:
    """
    Set the class means of every expert's nearest-mean classifier from the training images.

    Args:
        kind: "un", "l2n", "cl2n", or "best": for each expert the best of the three on the held-out images.

    Returns:
        {"features", "heldout_accuracy"}: by expert.
    """
    seen, unseen = (features_of(net, images) for images in (train, heldout))
    found: dict[str, Any] = {"features": {}, "heldout_accuracy": {}}
    for index, expert in enumerate(net.experts):
        classifier = cast(NearestMeanClassifier, expert.classifier)
        accuracy = {}
        for each in ("un", "l2n", "cl2n") if kind == "best" else (kind,):
            classifier.fit(seen[index], train.labels, each)
            accuracy[each] = class_mean_accuracy(classifier(unseen[index]), heldout.labels)
        best = max(accuracy, key=lambda each: accuracy[each])
        classifier.fit(seen[index], train.labels, best)
        found["features"][str(index)], found["heldout_accuracy"][str(index)] = best, accuracy[best]
    return found


def retrain_stage(recipe: Recipe, model: Model, class_counts: Sequence[int]) -> Stage | FitStage:
    """The stage "classifiers", as `recipe.retrain` says; all but the classifiers is frozen."""
    experts = [cast(Expert, expert) for expert in model.net.experts]
    if recipe.retrain == "tau_norm":
        return FitStage("classifiers", partial(fit_tau_norm, model.net, recipe.tau))
    if recipe.retrain == "ncm":

        def nearest_means() -> None:
            for expert in experts:
                linear = cast(LinearClassifier, expert.classifier)
                expert.classifier = NearestMeanClassifier(linear.in_features, linear.out_features)

        return FitStage("classifiers", partial(fit_nearest_means, model.net, recipe.ncm_features), nearest_means)

    # Class weights that were deferred to the experts' last epochs would balance a second time here.
    individual = IndividualLoss(recipe.retrain_loss, dataclasses.replace(recipe, deferred_from=None), class_counts)
    classifiers = nn.ModuleList(expert.classifier for expert in experts)

    def losses(outputs: Outputs, labels: Tensor, epoch: int) -> Losses:
        each = [individual(logits, labels, epoch) for logits in outputs.expert_logits]
        return {"loss": torch.stack(each).sum()}

    def begin() -> None:
        for classifier in classifiers:
            classifier.reset_parameters()  # type: ignore[operator]

    scaled = recipe.retrain == "lws"
    scaled_classifiers = [ScaledClassifier(cast(LinearClassifier, each)) for each in classifiers] if scaled else []

    def scale() -> None:
        for expert, classifier in zip(experts, scaled_classifiers, strict=True):
            expert.classifier = classifier

    warmup = retrain_warmup(recipe)
    decay = recipe.retrain_weight_decay
    if decay is None:  # AdamW's is another quantity, hundreds of times as large
        decay = recipe.weight_decay if recipe.optimiser == "sgd" else SGD_WEIGHT_DECAY
    return Stage(
        name="classifiers", epochs=recipe.retrain_epochs, batch_size=recipe.retrain_batch_size or recipe.batch_size,
        part=nn.ModuleList(each.scales for each in scaled_classifiers) if scaled else classifiers,
        losses=losses, sampler=SAMPLERS[recipe.retrain_sampler],
        lr=partial(warm_cosine_lr, recipe.retrain_lr, recipe.retrain_epochs, warmup),
        momentum=recipe.momentum, nesterov=recipe.nesterov, weight_decay=decay,
        begin=None if scaled else begin, norms_follow=True, arrange=scale if scaled else None,
        lr_field="retrain_lr",
    )  # fmt: skip
