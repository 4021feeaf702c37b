"""Exit rules and their operating points: the scores, the table, and the choice of a default."""

import dataclasses

import numpy as np
import pytest

from model_export.bundle import BundleError
from model_export.calibrate import OTHER_BUDGETS, RULES, calibrate, choose, rule_scores
from training.evaluate import Costs, mean_logits, route
from training.thresholds import BUDGETS

COUNTS = [500, 200, 50, 5]
MACS = Costs(100, [10, 10, 10], [1, 1])


def plain_score(rule, logits, router_score):
    """Of one image after the experts whose logits (E, C) are given, as the bundle's contract says it."""
    mean = logits.mean(axis=0)
    probabilities = np.exp(mean) / np.exp(mean).sum()
    first, second = sorted(probabilities, reverse=True)[:2]
    dissenters = sum(expert.argmax() != mean.argmax() for expert in logits)
    return {
        "router": router_score, "confidence": 1 - first, "margin": 1 - (first - second), "depth": 0.5,
        "agreement": 1.0 if len(logits) == 1 else dissenters / len(logits),
    }[rule]  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("n_experts", [1, 2, 3, 5])
def test_scores_of_a_rule_are_those_of_its_definition(rule, n_experts, predictions):
    """Image by image, after every expert but the last, in [0, 1]."""
    data = predictions(n_images=50, n_experts=n_experts)
    scores = rule_scores(rule, data.expert_logits, data.router_scores)

    assert (scores.shape, scores.dtype) == ((n_experts - 1, 50), np.float32)
    for after in range(n_experts - 1):
        for image in range(50):
            known = data.expert_logits[: after + 1, image]
            assert scores[after, image] == pytest.approx(
                plain_score(rule, known, data.router_scores[after, image]), abs=1e-6
            )
    assert n_experts == 1 or (scores.min() >= 0 and scores.max() <= 1)


def test_huge_logits_give_scores_all_the_same():
    """Softmax without overflow: the sure image scores 0, the torn one 1/2 and, without a margin, 1."""
    logits = np.array([[[1e4, 0.0, 0.0], [1e4, 1e4, 0.0]], [[0.0] * 3] * 2], np.float32)
    unused = np.zeros((1, 2), np.float32)
    assert rule_scores("confidence", logits, unused).tolist() == [[0.0, 0.5]]
    assert rule_scores("margin", logits, unused).tolist() == [[0.0, 1.0]]


def test_a_model_without_routers_has_no_points_of_theirs(predictions):
    """Of all other rules it has."""
    data = predictions(seed=1)
    table = calibrate(dataclasses.replace(data, router_scores=data.router_scores[:0]), COUNTS, MACS, "noise")
    assert {point.rule for point in table.points} == set(RULES) - {"router"}


def test_calibration_points_are_what_routing_at_their_thresholds_gives(predictions):
    """Every figure of every rule's every point, computed anew; routers are paid by their own rule alone."""
    data = predictions(seed=1)
    table = calibrate(data, COUNTS, MACS, "noise")

    assert (table.images, table.risk) == (400, None)
    assert [point.mean_experts for point in table.points] == sorted(point.mean_experts for point in table.points)
    assert {point.rule for point in table.points if point.thresholds == (0.0, 0.0)} == set(RULES)
    assert {point.rule for point in table.points if point.thresholds == (0.5, 0.5)} == {"router"}  # as published
    for point in table.points:
        used = route(rule_scores(point.rule, data.expert_logits, data.router_scores), point.thresholds)
        right = mean_logits(data.expert_logits, used).argmax(axis=1) == data.labels
        per_class = [100 * right[data.labels == label].mean() for label in range(4)]
        assert point.mean_experts == pytest.approx(used.mean(), abs=1e-4)
        assert point.accuracy.all == pytest.approx(np.mean(per_class), abs=1e-3)
        assert point.accuracy.few == pytest.approx(per_class[3], abs=1e-3)
        routers = np.minimum(used, 2).mean() if point.rule == "router" else 0
        assert point.mean_macs == pytest.approx(100 + 10 * used.mean() + routers, abs=0.1)


def test_the_table_is_fine_enough_and_no_longer_than_it_must_be(predictions):
    """Some forty points for the router, some twenty for the rules that have no weights of their own."""
    points = calibrate(predictions(seed=1, n_images=2000), COUNTS, MACS, "noise").points
    sizes = {rule: sum(point.rule == rule for point in points) for rule in RULES}

    assert 20 < sizes["router"] <= BUDGETS + 3
    for rule in ("confidence", "margin"):
        assert 10 < sizes[rule] <= OTHER_BUDGETS + 3


def test_the_rule_depth_is_a_fixed_number_of_experts(predictions):
    """1, 2 and 3, by thresholds of 0 and 1."""
    points = [point for point in calibrate(predictions(), COUNTS, MACS, "noise").points if point.rule == "depth"]

    assert [point.mean_experts for point in points] == [1, 2, 3]
    assert [point.thresholds for point in points] == [(1.0, 1.0), (0.0, 1.0), (0.0, 0.0)]


def test_after_one_expert_there_is_nobody_to_agree_with(predictions):
    """The rule agreement never stops at the first; where all agree at the second it may."""
    points = [point for point in calibrate(predictions(), COUNTS, MACS, "noise").points if point.rule == "agreement"]

    assert len(points) >= 2
    assert all(point.experts_share[0] == 0 for point in points)
    assert points[0].experts_share[1] > 0


def test_thresholds_that_were_chosen_elsewhere_have_their_point(predictions):
    """Under their rule, measured like all others; also those that send every image the same way as others do."""
    for thresholds in ((0.123456, 0.654321), (1e-12, 1e-12)):
        table = calibrate(predictions(), COUNTS, MACS, "noise", chosen=("margin", thresholds))
        assert [point.rule for point in table.points if point.thresholds == thresholds] == ["margin"]


@pytest.mark.parametrize("rule", ["router", "confidence"])
def test_the_default_is_the_cheapest_point_within_the_allowed_loss(rule, predictions):
    """Allow nothing, and it is as good as all experts; allow all, and one expert remains. Other rules do not count."""
    table = calibrate(predictions(seed=2), COUNTS, MACS, "noise")
    points = [point for point in table.points if point.rule == rule]
    full = points[-1].accuracy.all

    for loss in (0.0, 1.0, 5.0):
        point = choose(table, rule, None, loss)
        assert point in points
        assert point.accuracy.all >= full - loss
        assert all(other.accuracy.all < full - loss for other in points if other.mean_macs < point.mean_macs)
    assert choose(table, rule, None, 100).mean_experts == 1
    assert choose(table, rule, 1.5, 0.0) == max(
        (point for point in points if point.mean_experts <= 1.5), key=lambda point: point.accuracy.all
    )
    with pytest.raises(BundleError, match=r"max_mean_experts is 0\.5; the thriftiest point needs 1"):
        choose(table, rule, 0.5, 0.0)
