"""Thresholds against brute force, and the temperature that spreads scores."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from training.data.sets import Images, load_data
from training.evaluate import Costs, Predictions, mean_macs, predict, prefix_right, route
from training.methods.method import build_model
from training.recipes import RECIPES
from training.thresholds import BUDGETS, fit_temperature, frontier
from training.train import trained_model


def random_predictions(n_experts, n_images, n_scores, seed):
    """Of two classes, the second with a fifth of the images."""
    generator = np.random.default_rng(seed)
    scores = generator.integers(0, n_scores, (n_experts - 1, n_images)) / n_scores
    logits = generator.normal(size=(n_experts, n_images, 2))
    return Predictions(logits, scores.astype(np.float32), (np.arange(n_images) % 5 == 0).astype(np.int64))


def measured(predictions, macs, thresholds):
    """Cost and mean of the classes' accuracies at thresholds."""
    used = route(predictions.router_scores, thresholds)
    right = prefix_right(predictions)[used - 1, np.arange(len(used))]
    shares = [(used == count + 1).mean() for count in range(len(macs.experts))]
    by_class = [right[predictions.labels == label].mean() for label in (0, 1)]
    return mean_macs(macs, shares), round(float(np.mean(by_class)), 9)


@pytest.mark.parametrize("seed", range(5))
def test_one_router_s_thresholds_are_the_best_within_every_budget(seed):
    """No cut anywhere does better."""
    predictions, macs = random_predictions(2, 60, 12, seed), Costs(10, [20, 30], [1])
    cuts = [*np.unique(predictions.router_scores).astype(float), 1.0]
    anywhere = [measured(predictions, macs, (value,)) for value in cuts]
    found = [measured(predictions, macs, thresholds) for thresholds in frontier(predictions, [9, 9], macs)]
    for budget in np.linspace(31, 61, BUDGETS) + 1e-9:
        best = max(right for cost, right in anywhere if cost <= budget)
        assert max(right for cost, right in found if cost <= budget) == best


@pytest.mark.parametrize("seed", range(3))
def test_several_routers_leave_no_single_threshold_to_improve(seed):
    """Whatever it costs: no other value of any one threshold is better than the most accurate."""
    predictions, macs = random_predictions(4, 80, 30, seed), Costs(10, [20, 20, 20, 20], [1, 1, 1])
    best = max(frontier(predictions, [9, 9], macs), key=lambda thresholds: measured(predictions, macs, thresholds)[1])
    for router, value in itertools.product(range(3), [*np.unique(predictions.router_scores).astype(float), 1.0]):
        changed = (*best[:router], value, *best[router + 1 :])
        assert measured(predictions, macs, changed)[1] <= measured(predictions, macs, best)[1]


def of_kinds(*kinds, labels=None):
    """
    Predictions of images of several kinds: (how many, their score after each expert but the last, whether each number
    of experts is right about them). Two classes, which take turns unless `labels` says otherwise.
    """
    scores = np.array([scores for count, scores, _ in kinds for _ in range(count)], np.float32).T
    right = np.array([right for count, _, right in kinds for _ in range(count)]).T  # (E, N)
    labels = np.arange(right.shape[1]) % 2 if labels is None else np.array(labels)
    sums = np.where(right, 1.0, -1.0)[:, :, None] * np.where(np.arange(2) == labels[:, None], 1.0, -1.0)
    return Predictions(np.diff(sums, axis=0, prepend=0), scores, labels)


def test_several_routers_stop_every_image_where_it_is_right():
    """40 images after one expert, 10 after two, 10 after three: all right, and nobody paid for more."""
    predictions = of_kinds(
        (40, (0.1, 0.5), (True, True, True)),
        (10, (0.9, 0.1), (False, True, True)),
        (10, (0.9, 0.9), (False, False, True)),
    )
    macs = Costs(10, [20, 30, 40], [1, 1])
    found = {measured(predictions, macs, thresholds) for thresholds in frontier(predictions, [9, 9], macs)}

    assert max(found) == (10 + 21 + 20 / 60 * 31 + 10 / 60 * 40, 1.0)
    assert min(found) == (31, round(40 / 60, 9))


def test_accuracy_is_that_of_classes_not_of_images():
    """More experts are right about both images of the small class, and wrong about three of ten of the large one."""
    predictions = of_kinds(
        (7, (0.5,), (True, True)), (3, (0.5,), (True, False)), (2, (0.5,), (False, True)), labels=[0] * 10 + [1] * 2
    )
    found = frontier(predictions, [50, 5], Costs(10, [20, 20], [1]))

    assert {route(predictions.router_scores, thresholds).mean() for thresholds in found} == {1, 2}


def test_what_an_expert_costs_counts_not_that_it_is_one():
    """A hundred times cheaper than the third, the second expert may run for more images, for a little less accuracy."""
    predictions = of_kinds(
        (40, (0.1, 0.1), (True, True, True)),
        (20, (0.6, 0.1), (False, False, False)),
        (10, (0.6, 0.1), (False, True, True)),
        (12, (0.9, 0.9), (False, False, True)),
    )
    macs = Costs(10, [10, 1, 100], [0, 0])
    found = {measured(predictions, macs, thresholds) for thresholds in frontier(predictions, [9, 9], macs)}

    assert (20 + 42 / 82, round(50 / 82, 9)) in found


def test_thresholds_lie_between_scores():
    """A score that another precision rounds otherwise decides the same."""
    predictions = random_predictions(3, 200, 20, 0)
    for thresholds in frontier(predictions, [9, 9], Costs(10, [20, 20, 20], [1, 1])):
        for value in set(thresholds) - {0.0, 1.0}:
            assert np.abs(predictions.router_scores - value).min() > 0.02


def test_scores_are_spread_without_moving_a_decision(swept):
    """Decisions have a standard deviation of 1 afterwards; what was below 0.5 still is."""
    checkpoint, model = trained_model(swept / "ride-own-seed0")
    heldout = load_data(checkpoint.recipe).heldout
    before = predict(model, heldout).router_scores
    temperature = fit_temperature(model, heldout)
    after = predict(model, heldout).router_scores.astype(np.float64)

    assert temperature == model.routers.temperature
    assert np.log(after / (1 - after)).std(ddof=1) == pytest.approx(1, abs=0.01)
    assert ((before < 0.5) == (after < 0.5)).all()


def test_routers_that_always_say_the_same_are_left_alone(swept):
    """Rather than divided by 0."""
    checkpoint, model = trained_model(swept / "ride-own-seed0")
    heldout = load_data(checkpoint.recipe).heldout
    for parameter in model.routers.parameters():
        parameter.data.zero_()
    assert fit_temperature(model, heldout) == 1.0


def test_a_single_decision_has_no_spread_and_is_left_alone():
    """One held-out image, two experts: its standard deviation is not a number, nor would its score be."""
    recipe = dataclasses.replace(RECIPES["ride-own"], n_experts=2, image_size=16)
    model = build_model(recipe, 3, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    heldout = Images(torch.zeros(1, 16, 16, 3, dtype=torch.uint8), torch.tensor([0]))
    assert fit_temperature(model.eval(), heldout) == 1.0
    assert np.isfinite(predict(model, heldout).router_scores).all()
