"""From which score the next expert runs: thresholds for the routers, chosen on held-out images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from training.data.sets import AnyImages
from training.evaluate import EVALUATION_BATCH, Costs, Predictions, mean_macs, prefix_right, route
from training.methods.method import Model

SPREAD_IMAGES = 1000  # for the spread of the routers' decisions
BUDGETS = 41  # from the cost of one expert to that of all
GRID = 65  # thresholds that are tried after each expert: quantiles of the scores there
STEPS = 10**6  # of a threshold, from 0 to 1
PRICES = np.concatenate([[0.0], np.geomspace(0.003, 3, 60)])  # accuracy points for a percent of the full cost
MOST_PASSES = 10


def fit_temperature(model: Model, heldout: AnyImages) -> float:
    """
    Set the temperature of the model's routers to the standard deviation of their decisions on held-out images.

    Their scores then fill [0, 1], and no decision crosses 0.5.

    Returns:
        The temperature; 1 where all decisions are the same, or there is but one.
    """
    assert model.routers is not None
    pixels = heldout.even_sample(SPREAD_IMAGES).to(next(model.parameters()).device)
    with torch.no_grad():
        decisions = torch.cat([model.routers(model.net(part)) for part in pixels.split(EVALUATION_BATCH)], dim=1)
    spread = float(decisions.std()) if decisions.numel() > 1 else 0.0
    model.routers.temperature = round(spread, 4) or 1.0
    return model.routers.temperature


def frontier(
    predictions: Predictions, class_counts: Sequence[int], macs: Costs, n_budgets: int = BUDGETS
) -> set[tuple[float, ...]]:
    """
    The most accurate thresholds that were found for each of `n_budgets`, from the cost of one expert to that of all.

    For a rising price of computation, the thresholds that maximise accuracy less cost are sought, after one expert
    after the other until none changes; all that were tried on the way compete. Accuracy is the mean of per-class
    accuracies, cost the mean over the images.

    Args:
        predictions: on held-out images, with the scores of whoever decides as `router_scores`.
        macs: as they are paid for these decisions.

    Returns:
        Thresholds, (E − 1,) each, in [0, 1].
    """
    right = prefix_right(predictions)  # (E, N)
    n_experts, n_images = right.shape
    images = np.arange(n_images)
    in_class = np.bincount(predictions.labels, minlength=len(class_counts))
    gain = right * (100 / (in_class[predictions.labels] * np.count_nonzero(in_class)))  # adds up to 100 percent
    cost = [mean_macs(macs, row) for row in np.eye(n_experts).tolist()]
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
    """Thresholds worth trying: 0, 1, and right below quantiles of the scores (N,)."""
    return sorted({0.0, 1.0, *right_below(scores, np.linspace(0, 1, GRID))})


def right_below(scores: np.ndarray, shares: np.ndarray) -> list[float]:
    """
    Thresholds between quantiles of the scores (N,) and whatever score comes next below each.

    Halfway, so that another precision's rounding changes no decision; cut so that none lies above its score.

    Args:
        shares: of the scores that are to lie below a threshold, in [0, 1].
    """
    distinct = np.unique(scores.astype(np.float64))
    quantiles = np.quantile(scores, shares, method="lower").astype(np.float64)
    below = np.concatenate([[0.0], distinct])[np.searchsorted(distinct, quantiles)]
    thresholds: list[float] = (np.floor((below + quantiles) / 2 * STEPS) / STEPS).tolist()
    return thresholds
