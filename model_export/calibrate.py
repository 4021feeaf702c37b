"""What exit rules and their thresholds cost and give, on held-out images: the calibration table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast, get_args

import numpy as np
import torch
from torch import Tensor

from model_export.bundle import Accuracy, BundleError, Calibration, OperatingPoint, Risk, Rule
from training.evaluate import Predictions, accuracy_by_split, mean_logits, mean_macs, route
from training.methods.method import Model

RULES: tuple[Rule, ...] = get_args(Rule)
GRID = 65  # thresholds that are tried after each expert: quantiles of the scores there
DIGITS = 10**6  # of a threshold
PRICES = np.concatenate([[0.0], np.geomspace(0.003, 3, 60)])  # accuracy points for a percent of the full cost
ROUTER_BUDGETS, OTHER_BUDGETS = 41, 17  # from the cost of one expert to that of all
MOST_PASSES = 10

Costs = tuple[int, list[int], list[int]]


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
    trunk, experts, routers = macs
    scores = rule_scores(rule, predictions.expert_logits, predictions.router_scores)
    asked = routers if rule == "router" else [0] * len(routers)
    return Predictions(predictions.expert_logits, scores, predictions.labels), (trunk, experts, asked)


def spread_of_decisions(model: Model, pixels: Tensor) -> float:
    """
    Standard deviation of the routers' decisions on images (N, H, W, 3): the temperature at which scores fill [0, 1].

    1 where the decisions are all the same.
    """
    assert model.routers is not None
    with torch.no_grad():
        decisions = model.routers(model.net(pixels))
    return round(float(decisions.std()), 4) or 1.0


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

    For a rising price of computation, the thresholds that maximise accuracy less cost are sought, after one expert
    after the other until none changes; of all that were tried, the most accurate within each of 41 budgets (17 for
    rules other than the router) are kept. Besides them: every expert, one expert, and for the router 0.5 everywhere, as
    RIDE was published. Accuracies are means of per-class accuracies; the number of experts and the cost are means over
    the images.

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
    budgets = ROUTER_BUDGETS if rule == "router" else OTHER_BUDGETS
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


def frontier(
    predictions: Predictions, class_counts: Sequence[int], macs: Costs, n_budgets: int
) -> set[tuple[float, ...]]:
    """
    Of the thresholds that are best at some price, and those tried on the way, the most accurate of each budget.

    Args:
        predictions: with the scores of the rule as `router_scores`.
        macs: as that rule pays them.
    """
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

    grids = [_grid(scores) for scores in predictions.router_scores]
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
    budgets = np.linspace(min(spent) * n_images, 100, n_budgets) + 1e-9
    affordable = [[key for key, (_, cost) in tried.items() if cost <= budget] for budget in budgets]
    return {max(keys, key=lambda key: (tried[key][0], -tried[key][1])) for keys in affordable if keys}


def _grid(scores: np.ndarray) -> list[float]:
    """
    Thresholds worth trying: 0, 1, and between quantiles of the scores (N,) and whatever score comes next below them.

    Halfway, so that another precision's rounding changes no decision; cut so that none lies above its score.
    """
    distinct = np.unique(scores.astype(np.float64))
    quantiles = np.quantile(scores, np.linspace(0, 1, GRID), method="lower").astype(np.float64)
    below = np.concatenate([[0.0], distinct])[np.searchsorted(distinct, quantiles)]
    return sorted({0.0, 1.0, *(np.floor((below + quantiles) / 2 * DIGITS) / DIGITS).tolist()})


def _point(
    predictions: Predictions, rule: Rule, thresholds: tuple[float, ...], class_counts: Sequence[int], macs: Costs
) -> OperatingPoint:
    n_experts, n_images, _ = predictions.expert_logits.shape
    used = route(predictions.router_scores, thresholds)
    correct = mean_logits(predictions.expert_logits, used).argmax(axis=1) == predictions.labels
    share = (np.bincount(used, minlength=n_experts + 1)[1:] / n_images).tolist()
    return OperatingPoint(
        rule=rule,
        thresholds=thresholds,
        accuracy=Accuracy(**cast(dict[str, Any], accuracy_by_split(correct, predictions.labels, class_counts))),
        mean_experts=round(float(used.mean()), 5),
        mean_macs=round(mean_macs(macs, share), 1),
        experts_share=tuple(round(value, 6) for value in share),
    )
