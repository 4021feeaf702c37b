"""What exit rules and their thresholds cost and give, on held-out images: the calibration table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast, get_args

import numpy as np

from model_export.bundle import Accuracy, BundleError, Calibration, OperatingPoint, Risk, Rule
from training.evaluate import (
    Costs,
    Predictions,
    accuracy_by_split,
    answers_right,
    experts_share,
    mean_macs,
    route,
)
from training.thresholds import BUDGETS, frontier

RULES: tuple[Rule, ...] = get_args(Rule)
OTHER_BUDGETS = 17  # of rules other than the router


def rule_scores(rule: Rule, expert_logits: np.ndarray, router_scores: np.ndarray) -> np.ndarray:
    """
    How much the next expert is needed, by one rule: it runs where the score reaches the threshold.

    Args:
        expert_logits: (E, N, C).
        router_scores: (E - 1, N).

    Returns:
        (E - 1, N), float32, in [0, 1]; row i is known once experts 0..i have run. "router": `router_scores`;
        "confidence": 1 - the highest probability of the mean of their logits; "margin": 1 - the difference of the two
        highest; "agreement": the share of them whose own best class is not that of the mean, and 1 after the first,
        which has nobody to agree with; "depth": 0.5, so that thresholds of 0 and 1 fix the number of experts.
    """
    n_experts, n_images, _ = expert_logits.shape
    if rule == "router":
        return router_scores
    if rule == "depth":
        return np.full((n_experts - 1, n_images), 0.5, np.float32)
    if rule == "agreement":
        return _disagreement(expert_logits)
    counts = np.arange(1, n_experts)[:, None, None]
    mean = np.cumsum(expert_logits[:-1], axis=0, dtype=np.float64) / counts  # (E - 1, N, C)
    exponentials = np.exp(mean - mean.max(axis=2, keepdims=True))
    best_two = np.sort(exponentials, axis=2)[:, :, -2:] / exponentials.sum(axis=2, keepdims=True)
    second = best_two[:, :, 0] if rule == "margin" else 0.0
    return (1 - (best_two[:, :, 1] - second)).astype(np.float32)


def _disagreement(expert_logits: np.ndarray) -> np.ndarray:
    own = expert_logits.argmax(axis=2)  # (E, N)
    together = np.cumsum(expert_logits, axis=0).argmax(axis=2)  # (E, N)
    scores = [(own[: index + 1] != together[index]).mean(axis=0) for index in range(len(own) - 1)]
    if scores:
        scores[0][:] = 1.0
    return np.array(scores, np.float32).reshape(len(own) - 1, own.shape[1])


def by_rule(predictions: Predictions, macs: Costs, rule: Rule) -> tuple[Predictions, Costs]:
    """The predictions with the rule's scores as `router_scores`, and the costs without routers that it never asks."""
    scores = rule_scores(rule, predictions.expert_logits, predictions.router_scores)
    paid = macs if rule == "router" else macs._replace(routers=[0] * len(macs.routers))
    return Predictions(predictions.expert_logits, scores, predictions.labels), paid


def calibrate(
    predictions: Predictions,
    class_counts: Sequence[int],
    macs: Costs,
    data: str,
    chosen: tuple[Rule, tuple[float, ...]] | None = None,
    risk: Risk | None = None,
) -> Calibration:
    """
    For every rule the operating points between one expert and all of them, each with thresholds of its own.

    The most accurate within each of 41 budgets (17 for rules other than the router), and besides them: every expert,
    one expert, and for the router 0.5 everywhere, as RIDE was published. Accuracies are means of per-class accuracies;
    the number of experts and the cost are means over the images.

    Args:
        predictions: on held-out images.
        macs: of the trunk, the experts, the routers; only the rule "router" pays the last.
        data: says which images these are.
        chosen, risk: a rule and its thresholds that must have a point, and how they were chosen, where it was by risk.
    """
    points = []
    n_routed = len(predictions.expert_logits) - 1
    for rule in RULES:
        if rule == "router" and len(predictions.router_scores) < n_routed:
            continue  # a model without routers
        wanted = [chosen[1]] if chosen is not None and chosen[0] == rule else []
        points += _points(predictions, class_counts, macs, rule, wanted)
    points.sort(key=lambda point: (point.mean_experts, point.mean_macs))
    return Calibration(data=data, images=len(predictions.labels), points=tuple(points), risk=risk)


def _points(
    predictions: Predictions, class_counts: Sequence[int], macs: Costs, rule: Rule, wanted: list[tuple[float, ...]]
) -> list[OperatingPoint]:
    predictions, macs = by_rule(predictions, macs, rule)
    n_routers = len(predictions.router_scores)
    fixed = (0.5, 1.0) if rule == "router" else (1.0,)
    budgets = BUDGETS if rule == "router" else OTHER_BUDGETS
    candidates = [(0.0,) * n_routers, *wanted, *((value,) * n_routers for value in fixed)]
    if n_routers:
        candidates += sorted(frontier(predictions, class_counts, macs, budgets))
    points: dict[tuple[float, ...], OperatingPoint] = {}
    for thresholds in candidates:  # of those that send every image the same way, the first stay, and the wanted ones
        point = _point(predictions, rule, thresholds, class_counts, macs)
        points.setdefault((*point.experts_share, point.accuracy.all, float(thresholds in wanted)), point)
    return list(points.values())


def choose(
    calibration: Calibration, rule: Rule, max_mean_experts: float | None, max_accuracy_loss: float
) -> OperatingPoint:
    """
    The rule's most accurate point of at most `max_mean_experts`, or, where that is None, its cheapest whose accuracy
    over all classes is within `max_accuracy_loss` points of running every expert.

    Raises:
        BundleError: for a wish that no point fulfils.
    """
    if max_mean_experts is None:
        return calibration.cheapest(rule, max_accuracy_loss)
    point = calibration.most_accurate(rule, max_mean_experts)
    if point is None:
        least = calibration.of(rule)[0].mean_experts
        raise BundleError(f"max_mean_experts is {max_mean_experts}; the thriftiest point needs {least}")
    return point


def accuracy_of(predictions: Predictions, experts_used: np.ndarray, class_counts: Sequence[int]) -> Accuracy:
    """Of the mean logits of the first `experts_used` (N,) experts of each image."""
    right = answers_right(predictions, experts_used)
    return Accuracy(**cast(dict[str, Any], accuracy_by_split(right, predictions.labels, class_counts)))


def _point(
    predictions: Predictions, rule: Rule, thresholds: tuple[float, ...], class_counts: Sequence[int], macs: Costs
) -> OperatingPoint:
    used = route(predictions.router_scores, thresholds)
    shares = experts_share(used, len(predictions.expert_logits))
    return OperatingPoint(
        rule=rule,
        thresholds=thresholds,
        accuracy=accuracy_of(predictions, used, class_counts),
        mean_experts=round(float(used.mean()), 5),
        mean_macs=round(mean_macs(macs, shares), 1),
        experts_share=tuple(round(share, 6) for share in shares),
    )
