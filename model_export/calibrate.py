"""What thresholds cost and give, on held-out images: the calibration table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from model_export.bundle import Accuracy, BundleError, Calibration, OperatingPoint
from training.evaluate import Predictions, accuracy_by_split, mean_logits, mean_macs, route
from training.methods.method import Model

GRID = 65  # thresholds that are tried for each router: quantiles of its scores
PRICES = np.concatenate([[0.0], np.geomspace(0.003, 3, 60)])  # accuracy points for a percent of the full cost
BUDGETS = 41  # from the cost of one expert to that of all
MOST_PASSES = 10

Costs = tuple[int, list[int], list[int]]


def spread_of_decisions(model: Model, pixels: Tensor) -> float:
    """
    Standard deviation of the routers' decisions on images (N, H, W, 3): the temperature at which scores fill [0, 1].

    1 where the decisions are all the same.
    """
    assert model.routers is not None
    with torch.no_grad():
        decisions = model.routers(model.net(pixels))
    return round(float(decisions.std()), 4) or 1.0


def calibrate(predictions: Predictions, class_counts: Sequence[int], macs: Costs, data: str) -> Calibration:
    """
    The operating points between one expert and all of them, each with thresholds of its own for every router.

    For a rising price of computation, the thresholds that maximise accuracy less cost are sought, one router after the
    other until none changes; of all that were tried, the most accurate within each of 41 budgets are kept. Besides
    them: every expert, 0.5 everywhere as RIDE was published, and one expert. Accuracies are means of per-class
    accuracies; the number of experts and the cost are means over the images.

    Args:
        predictions: on held-out images.
        macs: of the trunk, the experts, the routers.
        data: says which images these are.
    """
    n_routers = len(predictions.router_scores)
    candidates = [(fixed,) * n_routers for fixed in (0.0, 0.5, 1.0)]
    if n_routers:
        candidates += sorted(_frontier(predictions, class_counts, macs))
    points: dict[tuple[float, ...], OperatingPoint] = {}
    for thresholds in candidates:  # of those that send every image the same way, the first stay
        point = _point(predictions, thresholds, class_counts, macs)
        points.setdefault((*point.experts_share, point.accuracy.all), point)
    ordered = sorted(points.values(), key=lambda point: (point.mean_experts, point.mean_macs))
    return Calibration(data=data, images=len(predictions.labels), points=tuple(ordered))


def choose(calibration: Calibration, max_mean_experts: float | None, max_accuracy_loss: float) -> OperatingPoint:
    """
    The most accurate point of at most `max_mean_experts`, or, where that is None, the cheapest whose accuracy over all
    classes is within `max_accuracy_loss` points of running every expert.

    Raises:
        BundleError: for a wish that no point fulfils.
    """
    points = calibration.points
    if max_mean_experts is not None:
        affordable = [point for point in points if point.mean_experts <= max_mean_experts]
        if not affordable:
            raise BundleError(
                f"max_mean_experts is {max_mean_experts}; the thriftiest point needs {points[0].mean_experts}"
            )
        return max(affordable, key=lambda point: (point.accuracy.all, -point.mean_macs))
    if max_accuracy_loss < 0:
        raise BundleError(f"max_accuracy_loss is {max_accuracy_loss}; it must be 0 or more percentage points")
    full = max(points, key=lambda point: point.mean_experts)
    good = [point for point in points if point.accuracy.all >= full.accuracy.all - max_accuracy_loss]
    return min(good, key=lambda point: point.mean_macs)


def _frontier(predictions: Predictions, class_counts: Sequence[int], macs: Costs) -> set[tuple[float, ...]]:
    """Of the thresholds that are best at some price, and those tried on the way, the most accurate of each budget."""
    n_experts, n_images, _ = predictions.expert_logits.shape
    images = np.arange(n_images)
    in_class = np.bincount(predictions.labels, minlength=len(class_counts))
    weight = 100 / (in_class[predictions.labels] * np.count_nonzero(in_class))  # (N,): adds up to 100 percent
    right, cost = [], []
    for used in range(1, n_experts + 1):
        logits = mean_logits(predictions.expert_logits, np.full(n_images, used))
        right.append(weight * (logits.argmax(axis=1) == predictions.labels))
        cost.append(mean_macs(macs, [float(used == count) for count in range(1, n_experts + 1)]))
    gain = np.stack(right)  # (E, N)
    spent = 100 / cost[-1] / n_images * np.array(cost)  # (E,), percent of the full cost, one image's part

    grids = [
        sorted({0.0, 1.0, *(round(float(score), 6) for score in np.quantile(scores, np.linspace(0, 1, GRID)))})
        for scores in predictions.router_scores
    ]
    tried: dict[tuple[float, ...], tuple[float, float]] = {}  # accuracy and cost, both in percent

    def measure(thresholds: tuple[float, ...]) -> tuple[float, float]:
        if thresholds not in tried:
            row = route(predictions.router_scores, thresholds) - 1
            tried[thresholds] = float(gain[row, images].sum()), float(spent[row].sum())
        return tried[thresholds]

    thresholds = (0.0,) * len(grids)
    for price in PRICES:

        def net_gain(candidate: tuple[float, ...], price: float = price) -> float:
            accuracy, cost = measure(candidate)
            return accuracy - price * cost

        for _ in range(MOST_PASSES):
            before = thresholds
            for router in reversed(range(len(grids))):
                neighbours = [(*thresholds[:router], value, *thresholds[router + 1 :]) for value in grids[router]]
                thresholds = max(neighbours, key=net_gain)
            if thresholds == before:
                break
    budgets = np.linspace(min(spent) * n_images, 100, BUDGETS) + 1e-9
    affordable = [[key for key, (_, cost) in tried.items() if cost <= budget] for budget in budgets]
    return {max(keys, key=lambda key: tried[key]) for keys in affordable if keys}


def _point(
    predictions: Predictions, thresholds: tuple[float, ...], class_counts: Sequence[int], macs: Costs
) -> OperatingPoint:
    n_experts, n_images, _ = predictions.expert_logits.shape
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
