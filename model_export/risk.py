"""Thresholds whose loss is bounded: how much accuracy early exit costs at most, with a given confidence."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from model_export.bundle import SPLITS, BundleError, Risk, Rule
from model_export.calibrate import ROUTER_BUDGETS, Costs, by_rule, frontier
from training.data.longtail import split_of
from training.evaluate import Predictions, mean_logits, mean_macs, route

SEED = 0
LARGEST_BET = 0.9  # below 1, so that no single image can lose all
DECIMALS = 10**4  # of percentage points, in what is written


def certify(
    predictions: Predictions,
    class_counts: Sequence[int],
    macs: Costs,
    rule: Rule,
    max_risk: float,
    confidence: float,
) -> tuple[tuple[float, ...], Risk]:
    """
    The cheapest thresholds that lose, with `confidence`, at most `max_risk` percentage points against all experts.

    One half of the held-out images makes a sequence of thresholds from the safest (all experts, where nothing can be
    lost) to the cheapest; the other half, which had no part in that, tests them in this order and stops at the first
    whose loss cannot be bounded. As the order is fixed beforehand, the confidence holds for the last that passed,
    however many were tested. Every held-out image counts alike: the bound is one for images that come as these did, as
    often of each class and independently of each other.

    Args:
        max_risk: percentage points of accuracy.
        confidence: in (0, 1).

    Raises:
        BundleError: for a risk or a confidence that cannot be.

    Source: Learn then Test, Angelopoulos et al., arXiv:2110.01052, fixed-sequence testing.
    """
    if not 0 <= max_risk <= 100:
        raise BundleError(f"max_risk is {max_risk}; it must be 0 to 100 percentage points")
    if not 0 < confidence < 1:
        raise BundleError(f"risk_confidence is {confidence}; it must be between 0 and 1, such as 0.95")
    scored, macs = by_rule(predictions, macs, rule)
    choosing, testing = (_part(scored, rows) for rows in halves(predictions.labels))
    chosen, bound = (0.0,) * len(scored.router_scores), 0.0
    for thresholds in _from_safest(choosing, class_counts, macs):
        upper = upper_bound(_losses(testing, thresholds), 1 - confidence)
        if 100 * upper > max_risk:
            break
        chosen, bound = thresholds, upper
    losses = 100 * _losses(testing, chosen)
    of_split = np.array([split_of(class_counts[label]) for label in testing.labels])
    risk = Risk(
        max_risk=max_risk, confidence=confidence, images=len(losses), loss=round(float(losses.mean()), 4),
        upper_bound=min(math.ceil(100 * bound * DECIMALS) / DECIMALS, max_risk),
        loss_by_split={
            name: round(float(losses[of_split == name].mean()), 4) if (of_split == name).any() else None
            for name in SPLITS
        },
    )  # fmt: skip
    return chosen, risk


def upper_bound(losses: np.ndarray, error: float) -> float:
    """
    A bound that the mean of the distribution of `losses` exceeds with probability `error` at most.

    A bet against every mean r: a stake of 1 is multiplied, image by image, by 1 + b (r - loss), where b ≥ 0 depends on
    earlier images only. Were the mean r or more, the expected stake would never grow, so the chance that it ever
    reaches 1 / error is at most `error` (Ville's inequality); the bound is the smallest r refuted so. The bets follow
    the variance seen so far: rare losses are bounded far closer than by Hoeffding's inequality.

    Args:
        losses: (N,), independent draws in [-1, 1], in an order that says nothing about them.
        error: in (0, 1).

    Returns:
        In [0, 1]: a mean below 0 is bounded by 0.

    Source: Waudby-Smith and Ramdas, arXiv:2010.09686, betting with the predictable plug-in for a known N; as the bound
    of a risk in Bates et al., arXiv:2101.02703. Theirs is for [0, 1]; here losses reach down to -1, where the stake
    grows the more.
    """
    n_images = len(losses)
    seen = np.arange(1, n_images + 1)
    means = np.cumsum(losses) / (seen + 1)
    variances = (1 + np.cumsum((losses - means) ** 2)) / (seen + 1)
    before = np.concatenate([[1.0], variances[:-1]])
    bets = np.minimum(LARGEST_BET, np.sqrt(2 * math.log(1 / error) / (n_images * before)))

    def refuted(mean: float) -> bool:
        return float(np.cumsum(np.log1p(bets * (mean - losses))).max()) >= math.log(1 / error)

    low, high = 0.0, 1.0  # `refuted` is monotone: every factor grows with the mean
    if refuted(low):
        return low
    if not refuted(high):
        return high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if refuted(middle) else (middle, high)
    return high


def halves(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions of two halves with equally many images of each class, to one; in random order, the same every time."""
    order = np.random.default_rng(SEED).permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    even = np.zeros(len(labels), bool)
    even[by_class[::2]] = True
    return order[even[order]], order[~even[order]]


def _part(predictions: Predictions, rows: np.ndarray) -> Predictions:
    return Predictions(predictions.expert_logits[:, rows], predictions.router_scores[:, rows], predictions.labels[rows])


def _from_safest(predictions: Predictions, class_counts: Sequence[int], macs: Costs) -> list[tuple[float, ...]]:
    """The frontier on these images, from the dearest thresholds to the cheapest, without those that never exit."""
    n_experts, n_images, _ = predictions.expert_logits.shape
    if n_experts == 1:
        return []

    def cost(thresholds: tuple[float, ...]) -> float:
        used = route(predictions.router_scores, thresholds)
        return mean_macs(macs, (np.bincount(used, minlength=n_experts + 1)[1:] / n_images).tolist())

    costs = {thresholds: cost(thresholds) for thresholds in frontier(predictions, class_counts, macs, ROUTER_BUDGETS)}
    full = cost((0.0,) * (n_experts - 1))
    return sorted((key for key in costs if costs[key] < full), key=lambda key: (-costs[key], key))


def _losses(predictions: Predictions, thresholds: tuple[float, ...]) -> np.ndarray:
    """(N,), 1 where all experts are right and early exit is wrong, -1 where it is the other way round, else 0."""
    n_experts, n_images, _ = predictions.expert_logits.shape
    early, full = (
        mean_logits(predictions.expert_logits, used).argmax(axis=1) == predictions.labels
        for used in (route(predictions.router_scores, thresholds), np.full(n_images, n_experts))
    )
    return full.astype(np.float64) - early
