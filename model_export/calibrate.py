"""What thresholds cost and give, on held-out images: the calibration table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from model_export.bundle import Accuracy, BundleError, Calibration, OperatingPoint
from training.evaluate import Predictions, accuracy_by_split, mean_logits, mean_macs, route

MOST_POINTS = 41


def calibrate(
    predictions: Predictions, class_counts: Sequence[int], macs: tuple[int, list[int], list[int]], data: str
) -> Calibration:
    """
    One threshold for all routers, swept over the scores that occur.

    Accuracies are means of per-class accuracies; the number of experts and the cost are means over the images.

    Args:
        predictions: on held-out images.
        macs: of the trunk, the experts, the routers.
        data: says which images these are.
    """
    shares = np.linspace(0, 1, MOST_POINTS)
    thresholds = {0.0, 0.5, 1.0}
    if predictions.router_scores.size:
        thresholds |= {round(float(score), 6) for score in np.quantile(predictions.router_scores, shares)}
    points: dict[tuple[float, ...], OperatingPoint] = {}
    for threshold in sorted(thresholds):  # of neighbours that send every image the same way, the lowest stays
        point = _point(predictions, threshold, class_counts, macs)
        points.setdefault((*point.experts_share, point.accuracy.all), point)
    ordered = sorted(points.values(), key=lambda point: (point.mean_experts, point.mean_macs))
    return Calibration(data=data, images=len(predictions.labels), points=tuple(ordered))


def choose(calibration: Calibration, max_accuracy_loss: float) -> OperatingPoint:
    """
    The cheapest point whose accuracy over all classes is within `max_accuracy_loss` points of running every expert.

    Raises:
        BundleError: for a negative loss, which nothing can meet.
    """
    if max_accuracy_loss < 0:
        raise BundleError(f"max_accuracy_loss is {max_accuracy_loss}; it must be 0 or more percentage points")
    full = max(calibration.points, key=lambda point: point.mean_experts)
    good = [point for point in calibration.points if point.accuracy.all >= full.accuracy.all - max_accuracy_loss]
    return min(good, key=lambda point: point.mean_macs)


def _point(
    predictions: Predictions, threshold: float, class_counts: Sequence[int], macs: tuple[int, list[int], list[int]]
) -> OperatingPoint:
    n_experts, n_images, _ = predictions.expert_logits.shape
    thresholds = (threshold,) * (n_experts - 1)
    used = route(predictions.router_scores, thresholds)
    correct = mean_logits(predictions.expert_logits, used).argmax(axis=1) == predictions.labels
    share = (np.bincount(used, minlength=n_experts + 1)[1:] / n_images).tolist()
    return OperatingPoint(
        thresholds=thresholds,
        accuracy=Accuracy(**cast(dict[str, Any], accuracy_by_split(correct, predictions.labels, class_counts))),
        mean_experts=round(float(used.mean()), 5),
        mean_macs=round(mean_macs(macs, share), 1),
        experts_share=tuple(round(value, 6) for value in share),
    )
