"""Thresholds whose loss is bounded: how much accuracy early exit costs at most, with a given confidence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from model_export.bundle import SPLITS, BundleError, Risk, Rule
from model_export.calibrate import by_rule
from training.data.longtail import split_of
from training.evaluate import Costs, Predictions, answers_right, experts_share, mean_macs, route
from training.thresholds import frontier, right_below

SEED = 0
SAFE_STEPS = 20  # from all experts to the most accurate thresholds of the frontier, with which it begins
LARGEST_BET = 0.9  # below 1, so that no single image can lose all
DECIMALS = 4  # of percentage points, in what is written


def certify(
    predictions: Predictions,
    class_counts: Sequence[int],
    macs: Costs,
    rule: Rule,
    max_risk: float,
    confidence: float,
    variants: Mapping[str, Predictions] | None = None,
) -> tuple[tuple[float, ...], Risk]:
    """
    The cheapest thresholds that lose, with `confidence`, at most `max_risk` percentage points against all experts.

    That holds for the checkpoint, and for each of `variants` by itself which passes with all of its experts; the others
    do not count, and have a bound above `max_risk`.

    One half of the held-out images makes a sequence of thresholds from the safest (all experts, where nothing can be
    lost) to the cheapest; the other half, which had no part in that, tests them in this order and stops at the first
    whose loss cannot be bounded. As the order is fixed beforehand, the confidence holds for the last that passed,
    however many were tested. Every held-out image counts alike: the bound is one for images that come as these did, as
    often of each class and independently of each other.

    Args:
        max_risk: percentage points of accuracy.
        confidence: in (0, 1).
        variants: the same images as other precisions of the model see them, without labels; their loss counts against
            all experts of the checkpoint.

    Raises:
        BundleError: for a single image, which cannot both choose and test.

    Source: Learn then Test, Angelopoulos et al., arXiv:2110.01052, fixed-sequence testing.
    """
    if len(predictions.labels) < 2:
        raise BundleError("max_risk needs two held-out images or more, half of which choose and half test; there is 1")
    for_choosing, for_testing = halves(predictions.labels)
    scored, paid = by_rule(predictions, macs, rule)
    choosing, testing = (_part(scored, rows) for rows in (for_choosing, for_testing))
    chosen = (0.0,) * len(scored.router_scores)
    right = _right(testing, chosen)

    def bound(part: Predictions, thresholds: tuple[float, ...]) -> float:
        return 100 * upper_bound(right.astype(np.float64) - _right(part, thresholds), 1 - confidence)

    parts = {
        name: _part(by_rule(replace(found, labels=predictions.labels), macs, rule)[0], for_testing)
        for name, found in (variants or {}).items()
    }
    of_variants = {name: bound(part, chosen) for name, part in parts.items()}
    hopeless = {name: value for name, value in of_variants.items() if value > max_risk}
    of_checkpoint = 0.0
    for thresholds in _from_safest(choosing, class_counts, paid):
        upper = bound(testing, thresholds)
        others = {name: bound(part, thresholds) for name, part in parts.items() if name not in hopeless}
        if max([upper, *others.values()]) > max_risk:
            break
        chosen, of_checkpoint, of_variants = thresholds, upper, others | hopeless
    losses = 100 * (right.astype(np.float64) - _right(testing, chosen))
    of_split = np.array([split_of(class_counts[label]) for label in testing.labels])
    risk = Risk(
        max_risk=max_risk, confidence=confidence, images=len(losses), loss=round(float(losses.mean()), DECIMALS),
        upper_bound=_rounded_up(of_checkpoint, max_risk),
        loss_by_split={
            name: round(float(losses[of_split == name].mean()), DECIMALS) if (of_split == name).any() else None
            for name in SPLITS
        },
        variants={name: _rounded_up(value, max_risk) for name, value in of_variants.items()},
    )  # fmt: skip
    return chosen, risk


def _rounded_up(bound: float, max_risk: float) -> float:
    """To DECIMALS, but not beyond `max_risk` where it keeps that."""
    rounded = math.ceil(bound * 10**DECIMALS) / 10**DECIMALS
    return min(rounded, max_risk) if bound <= max_risk else rounded


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
    """
    From the dearest thresholds to the cheapest, without those that never exit.

    The frontier on these images begins where accuracy is highest, which may be far below all experts; so it is led up
    to in steps, each of which lets a larger share of the images stop at every router.
    """
    n_experts = len(predictions.expert_logits)
    if n_experts == 1:
        return []

    def cost(thresholds: tuple[float, ...]) -> float:
        used = route(predictions.router_scores, thresholds)
        return mean_macs(macs, experts_share(used, n_experts))

    costs = {thresholds: cost(thresholds) for thresholds in frontier(predictions, class_counts, macs)}
    full = cost((0.0,) * (n_experts - 1))
    exits = [key for key in costs if costs[key] < full]
    if exits:
        first = max(exits, key=lambda key: (costs[key], key))
        stops = [(scores < limit).mean() for scores, limit in zip(predictions.router_scores, first, strict=True)]
        steps = np.arange(1, SAFE_STEPS) / SAFE_STEPS
        pairs = zip(predictions.router_scores, stops, strict=True)
        for key in zip(*(right_below(scores, share * steps) for scores, share in pairs), strict=True):
            costs[key] = cost(key)
    return sorted((key for key in costs if costs[key] < full), key=lambda key: (-costs[key], key))


def _right(predictions: Predictions, thresholds: tuple[float, ...]) -> np.ndarray:
    """(N,), bool: whether the answer with early exit is right."""
    return answers_right(predictions, route(predictions.router_scores, thresholds))
