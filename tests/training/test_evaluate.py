"""Routing and figures, on hand-worked cases."""

import numpy as np
import pytest

from training.evaluate import (
    Costs,
    Predictions,
    accuracy_by_split,
    calibration_error,
    mean_logits,
    mean_macs,
    route,
    summarise,
)


def test_the_next_expert_runs_where_the_score_reaches_the_threshold():
    """And only where all routers before it said so too."""
    scores = np.array([[0.2, 0.5, 0.9, 0.1], [0.9, 0.4, 0.6, 0.9]], np.float32)

    assert route(scores, [0.5, 0.6]).tolist() == [1, 2, 3, 1]
    assert route(scores, [0.0, 0.0]).tolist() == [3, 3, 3, 3]
    assert route(np.empty((0, 2), np.float32), []).tolist() == [1, 1]


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
    """Confidence 0.75 with 1 of 2 right: 25 points off."""
    logits = np.log(np.array([[0.75, 0.25], [0.75, 0.25]]))
    assert calibration_error(logits, np.array([0, 1])) == pytest.approx(25)


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
    assert result["routed"]["all"] == 100.0
    assert result["routed"]["mean_experts"] == {"all": 1.5, "many": 1.0, "medium": None, "few": 2.0}
    assert result["routed"]["experts_share"] == [0.5, 0.5]


def test_experts_and_cost_are_means_over_images_whatever_the_classes():
    """Three images of one class stop after one expert, one of another does not; accuracies count classes alike."""
    logits = np.array([[[9.0, 0.0]] * 4, [[0.0, 1.0]] * 4], np.float32)
    predictions = Predictions(logits, np.array([[0.1, 0.1, 0.1, 0.8]], np.float32), np.array([0, 0, 0, 1]))

    routed = summarise(predictions, [500, 5], Costs(100, [10, 20], [0]), [0.5])["routed"]

    assert (routed["all"], routed["experts_share"]) == (50.0, [0.75, 0.25])
    assert routed["mean_experts"] == {"all": 1.25, "many": 1.0, "medium": None, "few": 2.0}
    assert routed["macs"] == 115


def test_the_calibration_error_has_fifteen_bins():
    """Probabilities of 0.62 (right) and 0.69 (wrong) lie in different ones: the mean of 0.38 and 0.69."""
    logits = np.log(np.array([[0.62, 0.38], [0.69, 0.31]]))
    assert calibration_error(logits, np.array([0, 1])) == pytest.approx(53.5)
    assert calibration_error(1000 + logits, np.array([0, 1])) == pytest.approx(53.5)
