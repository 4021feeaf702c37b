"""Routing and figures, on hand-worked cases."""

import dataclasses

import numpy as np
import pytest
import torch

from tests.training.test_losses import golden_logits
from training.data.sets import Images
from training.evaluate import (
    Costs,
    Predictions,
    accuracy_by_split,
    by_class,
    calibration_error,
    macs_of,
    mean_logits,
    mean_macs,
    predict,
    prefix_right,
    route,
    summarise,
)
from training.methods.method import build_model
from training.recipes import RECIPES


def test_the_next_expert_runs_where_the_score_reaches_the_threshold():
    """And only where all routers before it said so too."""
    scores = np.array([[0.2, 0.5, 0.9, 0.1], [0.9, 0.4, 0.6, 0.9]], np.float32)

    assert route(scores, [0.5, 0.6]).tolist() == [1, 2, 3, 1]
    assert route(scores, [0.0, 0.0]).tolist() == [3, 3, 3, 3]
    assert route(np.empty((0, 2), np.float32), []).tolist() == [1, 1]


def test_a_threshold_is_compared_exactly():
    """As the service does; the nearest 32-bit number to a threshold just above the score is the score."""
    assert route(np.array([[0.5]], np.float32), [np.nextafter(0.5, 1)]).tolist() == [1]


def test_an_image_is_judged_by_the_mean_of_the_experts_it_used():
    """Not by those that did not run."""
    logits = np.array([[[1.0, 0.0], [1.0, 0.0]], [[0.0, 3.0], [0.0, 3.0]]])
    assert mean_logits(logits, np.array([1, 2])).tolist() == [[1.0, 0.0], [0.5, 1.5]]


def test_split_accuracy_is_the_mean_of_class_accuracies():
    """A class of many test images weighs no more than one of few; a split without images is None."""
    labels = np.array([0, 0, 0, 0, 1, 2])
    correct = np.array([1, 1, 0, 0, 1, 0], bool)

    assert accuracy_by_split(correct, labels, [500, 500, 50, 7]) == {
        "all": 50.0,
        "many": 75.0,
        "medium": 0.0,
        "few": None,
    }


def test_calibration_error_of_a_known_case():
    """Confidence 0.75 with 1 of 2 right: 25 points off. Certainty shares the last bin: (0 - 1 + 1 - 0.95) / 2."""
    logits = np.log(np.array([[0.75, 0.25], [0.75, 0.25]]))
    assert calibration_error(logits, np.array([0, 1])) == pytest.approx(25)
    assert calibration_error(np.array([[1e4, 0.0]]), np.array([0])) == 0
    assert calibration_error(np.array([[1e4, 0.0], [np.log(19), 0.0]]), np.array([1, 0])) == pytest.approx(47.5)


@pytest.mark.parametrize(("confidences", "error"), [((0.62, 0.68), 47), ((0.61, 0.65), 13)])
def test_calibration_error_does_not_cancel_between_its_15_bins(confidences, error):
    """Wrong at the first, right at the second: (62 + 32) / 2 in two bins; |126 - 100| / 2 in one, 0.60 to 0.67."""
    logits = np.log(np.array([[share, 1 - share] for share in confidences]))
    assert calibration_error(logits, np.array([1, 0])) == pytest.approx(error)


def test_cost_counts_what_ran():
    """Trunk always, each expert and router for the share that reached it."""
    assert mean_macs(Costs(100, [10, 20, 30], [1, 2]), [0.5, 0.25, 0.25]) == pytest.approx(
        100 + 11 + 0.5 * 22 + 0.25 * 30
    )


def test_summary_of_a_routed_model():
    """One image stops right after expert one, the other is repaired by expert two."""
    logits = np.array([[[9.0, 0.0], [9.0, 0.0]], [[0.0, 1.0], [0.0, 99.0]]], np.float32)
    predictions = Predictions(logits, np.array([[0.1, 0.8]], np.float32), np.array([0, 1]))

    result = summarise(predictions, [500, 5], Costs(100, [10, 20], [1]), [0.5])

    assert [row["all"] for row in result["experts"]] == [50.0, 100.0]
    assert [row["macs"] for row in result["experts"]] == [110, 130]
    sure, mean = 1 / (1 + np.exp(-9)), 1 / (1 + np.exp(-4))  # of image 0: expert one, and with expert two
    assert [row["ece"] for row in result["experts"]] == pytest.approx([100 * (sure - 0.5), 50 * (1 - mean)], abs=1e-3)
    assert result["routed"]["ece"] == pytest.approx(50 * (1 - sure), abs=1e-3)
    assert result["routed"]["all"] == 100.0
    assert result["routed"]["mean_experts"] == {"all": 1.5, "many": 1.0, "medium": None, "few": 2.0}
    assert result["routed"]["experts_share"] == [0.5, 0.5]


def test_figures_per_class_are_those_at_the_thresholds():
    """Not those of other ones."""
    logits = np.array([[[9.0, 0.0]] * 2, [[0.0, 99.0]] * 2], np.float32)
    predictions = Predictions(logits, np.array([[0.1, 0.8]], np.float32), np.array([0, 1]))

    result = summarise(predictions, [500, 5], Costs(100, [10, 20], [1]), [0.9], per_class=True)

    assert result["per_class"] == by_class(predictions, 2, [0.9])
    assert result["per_class"]["mean_experts"] == [1.0, 1.0]
    assert result["routed"]["experts_share"] == [1.0, 0.0]


def test_predicting_leaves_the_model_as_it_was(monkeypatch):
    """
    An image's logits do not depend on its batch, nor do the running statistics move; then training goes on. The scores
    are the routers' at their temperature.
    """
    recipe = dataclasses.replace(RECIPES["ride-cifar100"], image_size=8)
    model = build_model(recipe, 3, (0.5,) * 3, (0.25,) * 3).train()
    images = Images(torch.randint(0, 256, (6, 8, 8, 3), dtype=torch.uint8), torch.zeros(6, dtype=torch.long))
    model.routers.temperature = 3.0
    monkeypatch.setattr("training.evaluate.EVALUATION_BATCH", 4)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    together = predict(model, images)
    alone = predict(model, Images(images.pixels[:1], images.labels[:1]))

    np.testing.assert_allclose(together.expert_logits[:, :1], alone.expert_logits, atol=1e-4)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert model.training
    with torch.no_grad():
        decisions = model.eval().routers(model.net(images.pixels))
    np.testing.assert_allclose(together.router_scores, torch.sigmoid(decisions / 3), atol=1e-5)


@pytest.mark.parametrize(("experts", "classes"), [(1, [86, 95, 87, 96]), (2, [88, 96, 89, 97]), (3, [89, 97, 90, 98])])
def test_the_mean_of_the_first_experts_has_its_golden_classes(experts, classes):
    """Its best class for the four images of the golden logits."""
    logits = golden_logits().numpy()

    assert mean_logits(logits, np.full(4, experts)).argmax(axis=1).tolist() == classes
    assert prefix_right(Predictions(logits, np.zeros((2, 4)), np.array(classes)))[experts - 1].all()


def test_a_router_costs_its_products():
    """48 features to 16 hidden numbers, those and the 30 largest logits to one decision; in each of two."""
    model = build_model(RECIPES["ride-cifar100"], 100, (0.5,) * 3, (0.25,) * 3)
    assert macs_of(model, 32).routers == [48 * 16 + 16 + 30] * 2


def test_experts_and_cost_are_means_over_images_whatever_the_classes():
    """Three images of one class stop after one expert, one of another does not; accuracies count classes alike."""
    logits = np.array([[[9.0, 0.0]] * 4, [[0.0, 1.0]] * 4], np.float32)
    predictions = Predictions(logits, np.array([[0.1, 0.8, 0.1, 0.1]], np.float32), np.array([0, 1, 0, 0]))

    routed = summarise(predictions, [500, 5], Costs(100, [10, 20], [0]), [0.5])["routed"]

    assert (routed["all"], routed["experts_share"]) == (50.0, [0.75, 0.25])
    assert routed["mean_experts"] == {"all": 1.25, "many": 1.0, "medium": None, "few": 2.0}
    assert routed["macs"] == 115
