"""How good a model is: accuracy by split for every number of experts and routed, calibration error, cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from training.data.longtail import SPLITS, split_of
from training.data.sets import AnyImages
from training.methods.method import Model
from training.models.macs import count_macs

EVALUATION_BATCH = 250
CALIBRATION_BINS = 15


@dataclass(frozen=True)
class Predictions:
    """
    Everything that routing and accuracy depend on, for N images.

    Attributes:
        expert_logits: (E, N, C), float32.
        router_scores: (E − 1, N), in [0, 1]; what each router says if it is asked.
        labels: (N,), int64.
    """

    expert_logits: np.ndarray
    router_scores: np.ndarray
    labels: np.ndarray


class Costs(NamedTuple):
    """Multiply-accumulates of the trunk, of each expert and of each router, for one image."""

    trunk: int
    experts: Sequence[int]
    routers: Sequence[int]


def predict(model: Model, images: AnyImages) -> Predictions:
    """All experts and all routers on all images, in fp32."""
    was_training = model.training
    model.eval()
    logits, scores = [], []
    with torch.no_grad():
        for pixels in images.in_order(EVALUATION_BATCH):
            outputs = model.net(pixels)
            logits.append(outputs.expert_logits.cpu())
            if model.routers is not None:
                scores.append(torch.sigmoid(model.routers(outputs) / model.routers.temperature).cpu())
    model.train(was_training)
    routed = torch.cat(scores, dim=1).numpy() if scores else np.empty((0, len(images)), np.float32)
    return Predictions(torch.cat(logits, dim=1).numpy(), routed, images.labels.cpu().numpy())


def route(router_scores: np.ndarray, thresholds: Sequence[float]) -> np.ndarray:
    """
    How many experts each image gets: expert i + 1 runs where score i reaches threshold i.

    Args:
        router_scores: (E − 1, N).
        thresholds: (E − 1,).

    Returns:
        (N,), from 1 to E.
    """
    goes_on = router_scores >= np.asarray(thresholds, dtype=np.float64)[:, None]  # exactly, as the service does it
    return 1 + np.cumprod(goes_on, axis=0, dtype=np.int64).sum(axis=0)


def mean_logits(expert_logits: np.ndarray, experts_used: np.ndarray) -> np.ndarray:
    """(N, C): the mean of the logits of the first `experts_used` (N,) experts of each image."""
    sums = np.cumsum(expert_logits, axis=0)
    return sums[experts_used - 1, np.arange(len(experts_used))] / experts_used[:, None]


def answers_right(predictions: Predictions, experts_used: np.ndarray) -> np.ndarray:
    """(N,), bool: whether the mean logits of the first `experts_used` (N,) experts are right."""
    found = mean_logits(predictions.expert_logits, experts_used).argmax(axis=1)
    return np.asarray(found == predictions.labels)


def prefix_right(predictions: Predictions) -> np.ndarray:
    """(E, N), bool: whether the mean logits of the first 1 to E experts are right."""
    sums = np.cumsum(predictions.expert_logits, axis=0)
    return np.asarray(sums.argmax(axis=2) == predictions.labels)


def experts_share(experts_used: np.ndarray, n_experts: int) -> list[float]:
    """Which shares of the images, whose experts are (N,), use 1 to E of them; empty without images."""
    if not len(experts_used):
        return []
    shares: list[float] = (np.bincount(experts_used, minlength=n_experts + 1)[1:] / len(experts_used)).tolist()
    return shares


def accuracy_by_split(correct: np.ndarray, labels: np.ndarray, class_counts: Sequence[int]) -> dict[str, float | None]:
    """
    Percent right: "all", "many", "medium", "few".

    Each is the unweighted mean of the accuracies of its classes. Classes without images here are left out; a split
    without any is None.
    """
    values = mean_by_split(100.0 * correct, labels, class_counts)
    return {name: None if value is None else round(value, 3) for name, value in values.items()}


def mean_by_class(values: np.ndarray, labels: np.ndarray, n_classes: int) -> np.ndarray:
    """(C,): means of `values` (N,); NaN for a class without images."""
    images = np.bincount(labels, minlength=n_classes)
    sums = np.bincount(labels, weights=values, minlength=n_classes)
    return np.divide(sums, images, out=np.full(n_classes, np.nan), where=images > 0)


def mean_by_split(values: np.ndarray, labels: np.ndarray, class_counts: Sequence[int]) -> dict[str, float | None]:
    """Means of `values` (N,) per class, then over the classes of each split and over all."""
    means = mean_by_class(values, labels, len(class_counts))
    split = np.array([split_of(count) for count in class_counts])
    present = np.bincount(labels, minlength=len(class_counts)) > 0
    chosen = {"all": present} | {name: present & (split == name) for name in SPLITS}
    return {name: float(means[rows].mean()) if rows.any() else None for name, rows in chosen.items()}


def rows_by_split(labels: np.ndarray, class_counts: Sequence[int]) -> dict[str, np.ndarray]:
    """Which of the images with `labels` (N,) are in "all", "many", "medium", "few": (N,), bool each."""
    split = np.array([split_of(count) for count in class_counts])[labels]
    return {"all": np.ones(len(labels), bool)} | {name: split == name for name in SPLITS}


def count_not_finite(predictions: Predictions) -> int:
    """Images for which a logit or a score is NaN or infinite."""
    usable = np.isfinite(predictions.expert_logits).all(axis=(0, 2))
    usable &= np.isfinite(predictions.router_scores).all(axis=0)
    return int((~usable).sum())


def calibration_error(logits: np.ndarray, labels: np.ndarray) -> float:
    """
    Expected calibration error in percent: 15 equal bins of the highest probability, |accuracy − confidence| by share.

    Source: Guo et al., arXiv:1706.04599.
    """
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    confidence = (shifted.max(axis=1) / shifted.sum(axis=1)).astype(np.float64)
    correct = logits.argmax(axis=1) == labels
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    gaps = np.abs(np.bincount(bins, weights=correct - confidence, minlength=CALIBRATION_BINS))
    return round(100 * float(gaps.sum()) / len(labels), 3)


def macs_of(model: Model, image_size: int) -> Costs:
    """Of one image of `image_size` pixels in height and width."""
    device = next(model.parameters()).device
    image = torch.zeros(1, image_size, image_size, 3, dtype=torch.uint8, device=device)
    with torch.no_grad():
        features = model.net.eval().trunk(image)
    experts = [count_macs(expert, features) for expert in model.net.experts]
    routers = []
    if model.routers is not None:
        each = model.routers.output_of(0).weight.numel()
        routers = [cast(Tensor, hidden.weight).numel() + each for hidden in model.routers.hidden]
    return Costs(count_macs(model.net.trunk, image), experts, routers)


def mean_macs(macs: Costs, shares: Sequence[float]) -> float:
    """Mean multiply-accumulates of an image, where `shares[k]` of the images use k + 1 experts."""
    total = float(macs.trunk)
    for index, expert in enumerate(macs.experts):
        total += sum(shares[index:]) * (expert + (macs.routers[index] if index < len(macs.routers) else 0))
    return total


def summarise(predictions: Predictions, class_counts: Sequence[int], macs: Costs,
              thresholds: Sequence[float], per_class: bool = False) -> dict[str, Any]:  # fmt: skip
    """
    The figures of a table.

    Returns:
        "images"; "experts": one entry per number of experts (accuracies, "ece", "macs"); "routed", where there are
        routers: the same at `thresholds`, with "mean_experts" (per split too) and "experts_share", both of images,
        not of classes, as the cost is; "per_class", where it is asked for: what `by_class` gives.
    """
    n_experts, n_images, _ = predictions.expert_logits.shape
    labels = predictions.labels

    def judge(used: np.ndarray) -> dict[str, Any]:
        logits = mean_logits(predictions.expert_logits, used)
        accuracy = accuracy_by_split(logits.argmax(axis=1) == labels, labels, class_counts)
        return accuracy | {"ece": calibration_error(logits, labels)}

    result: dict[str, Any] = {"images": n_images, "experts": []}
    for count in range(1, n_experts + 1):
        used = np.full(n_images, count)
        result["experts"].append(judge(used) | {"macs": macs.trunk + sum(macs.experts[:count])})
    if len(predictions.router_scores):
        used = route(predictions.router_scores, thresholds)
        shares = experts_share(used, n_experts)
        by_split = {name: used[rows] for name, rows in rows_by_split(labels, class_counts).items()}
        result["routed"] = judge(used) | {
            "thresholds": list(thresholds),
            "mean_experts": {name: round(float(x.mean()), 4) if len(x) else None for name, x in by_split.items()},
            "experts_share": [round(share, 5) for share in shares],
            "macs": round(mean_macs(macs, shares)),
        }
    if per_class:
        result["per_class"] = by_class(predictions, len(class_counts), thresholds)
    return result


def by_class(predictions: Predictions, n_classes: int, thresholds: Sequence[float]) -> dict[str, list[float | None]]:
    """
    Per class, in the order of the logits; None for a class without images.

    Returns:
        "accuracy" with all experts, percent; where there are routers, at `thresholds`: "routed_accuracy", percent, and
        "mean_experts".
    """
    n_experts, n_images, _ = predictions.expert_logits.shape
    labels = predictions.labels

    def means(values: np.ndarray) -> list[float | None]:
        found = mean_by_class(values, labels, n_classes).tolist()
        return [None if math.isnan(value) else round(value, 4) for value in found]

    def accuracy(used: np.ndarray) -> list[float | None]:
        return means(100.0 * answers_right(predictions, used))

    result = {"accuracy": accuracy(np.full(n_images, n_experts))}
    if len(predictions.router_scores):
        used = route(predictions.router_scores, thresholds)
        result |= {"routed_accuracy": accuracy(used), "mean_experts": means(used.astype(float))}
    return result
