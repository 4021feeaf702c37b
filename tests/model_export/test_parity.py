"""Whether two sides say the same: what is counted, what is a tie, what is refused."""

import dataclasses

import numpy as np
import pytest

from model_export.bundle import BundleError
from model_export.parity import compare, require, tolerance
from tests.tiny import parity

COUNTS = [500, 200, 50, 5]


@pytest.mark.parametrize(
    ("expert", "by", "difference"),
    [(0, 0.3, 0.3), (0, -0.3, 0.3), (1, 0.3, 0.15), (2, -0.3, 0.1)],
    ids=["after one", "downwards", "after two", "after all"],
)
def test_the_difference_is_the_largest_after_any_number_of_experts(predictions, expert, by, difference):
    """Of one class of one image: what an expert says is shared among all that have spoken."""
    data = predictions()
    logits = data.expert_logits.copy()
    logits[expert, 5, 2] += by

    found = compare(data, dataclasses.replace(data, expert_logits=logits), "router", (0.5, 0.5), COUNTS, "fp32")
    assert found.max_abs_logit_difference == pytest.approx(difference, rel=1e-2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_abs_logit_difference": 1e-3}, None),
        ({"max_abs_logit_difference": 1.1e-3}, "logits differ from the checkpoint's by up to 0.0011 on 100 images"),
        ({"top1_agreement": 0.99}, "top1_agreement fails on 1 of 100"),
        ({"experts_used_agreement": 0.98}, "experts_used_agreement fails on 2 of 100"),
    ],
)
def test_a_variant_must_be_the_same_model(changes, message):
    """In its logits, its classes and its exits."""
    found = dataclasses.replace(parity(0.0), **changes)
    if message is None:
        require(found, "fp32")
    else:
        with pytest.raises(BundleError, match=f"variant fp32: {message}"):
            require(found, "fp32")


@pytest.mark.parametrize(("largest", "limit"), [(30, 1e-3), (100, 1e-3), (300_000, 3)])
def test_huge_logits_may_differ_by_what_fp32_rounds(predictions, largest, limit):
    """Of a network that was trained for a few steps, whose batch norms know nothing yet."""
    data = predictions()
    logits = data.expert_logits * (largest / np.abs(data.expert_logits).max())
    huge = dataclasses.replace(data, expert_logits=logits)
    for share in (0.5, 2):
        off = logits.copy()
        off[0, 7] += np.float32(share * limit)
        found = compare(huge, dataclasses.replace(data, expert_logits=off), "router", (0.5, 0.5), COUNTS, "fp32")
        if share < 1:
            require(found, "fp32", tolerance(huge))
        else:
            with pytest.raises(BundleError, match=f"the limit is {limit:g}"):
                require(found, "fp32", tolerance(huge))


@pytest.mark.parametrize(("lead", "agreement"), [(0.0005, 1), (0.01, 1 - 1 / 400)])
def test_classes_are_compared_where_the_checkpoint_exits(predictions, lead, agreement):
    """Another best class counts, unless the checkpoint itself was torn between the two."""
    data = predictions()
    data.router_scores[0, 7] = 0.0  # after one expert
    theirs, ours = data.expert_logits.copy(), data.expert_logits.copy()
    theirs[0, 7], ours[0, 7] = [1 + lead, 1, -9, -9], [1, 1 + lead, -9, -9]
    pair = [dataclasses.replace(data, expert_logits=logits) for logits in (theirs, ours)]

    assert compare(*pair, "router", (0.5, 0.5), COUNTS, "fp32").top1_agreement == agreement


@pytest.mark.parametrize(
    ("theirs", "ours", "agreement"),
    [
        ((0.5005, 0.9), (0.4995, 0.9), 1),
        ((0.51, 0.9), (0.49, 0.9), 1 - 1 / 400),
        ((0.5005, 0.9), (0.47, 0.9), 1),  # it is the checkpoint that decides just so
        ((0.53, 0.9), (0.4995, 0.9), 1 - 1 / 400),
        ((0.5005, 0.9), (0.4995, 0.1), 1),  # the first decision parts them, the second is not even taken
        ((0.9, 0.5005), (0.1, 0.4995), 1 - 1 / 400),
    ],
)
def test_the_first_decision_that_parts_them_may_be_a_tie(predictions, theirs, ours, agreement):
    """A score within 0.001 of its threshold may fall either way."""
    data = predictions()
    pair = []
    for scores in (theirs, ours):
        changed = data.router_scores.copy()
        changed[:, 7] = scores
        pair.append(dataclasses.replace(data, router_scores=changed))

    assert compare(*pair, "router", (0.5, 0.5), COUNTS, "fp32").experts_used_agreement == agreement


def test_decisions_parted_elsewhere_are_no_ties(predictions):
    """A router that always sends on, or that both obey, says nothing of where the two part."""
    data = predictions(seed=3)
    scores = data.router_scores.copy()
    scores[:, 7] = 0.0005, 0.9
    data = dataclasses.replace(data, router_scores=scores)
    other = scores.copy()
    other[1, 7] = 0.1
    parted = compare(data, dataclasses.replace(data, router_scores=other), "router", (0.0, 0.5), COUNTS, "fp32")
    assert parted.experts_used_agreement == 1 - 1 / len(data.labels)

    scores[0, 7] = other[0, 7] = 0.5001
    parted = compare(data, dataclasses.replace(data, router_scores=other), "router", (0.5, 0.5), COUNTS, "fp32")
    assert parted.experts_used_agreement == 1 - 1 / len(data.labels)


def test_another_decision_is_counted(predictions):
    """And what it does to the experts per image; without one, the two sides have the same figures."""
    data = predictions(seed=3)
    same = compare(data, data, "router", (0.5, 0.5), COUNTS, "fp32")
    assert (same.top1_agreement, same.experts_used_agreement, same.accuracy) == (1, 1, same.checkpoint_accuracy)

    scores = data.router_scores.copy()
    scores[0, 7] = 0.9 if scores[0, 7] < 0.5 else 0.1
    wrong = compare(data, dataclasses.replace(data, router_scores=scores), "router", (0.5, 0.5), COUNTS, "fp32")
    assert wrong.experts_used_agreement == pytest.approx(1 - 1 / 400)
    assert abs(wrong.mean_experts - wrong.checkpoint_mean_experts) in (pytest.approx(1 / 400), pytest.approx(2 / 400))
    with pytest.raises(BundleError, match="experts_used_agreement fails on 1 of 400"):
        require(wrong, "fp32")


def test_another_exit_is_not_another_class(predictions):
    """Classes are those after as many experts as the checkpoint asks, on both sides."""
    data = predictions()
    turned = dataclasses.replace(data, router_scores=1 - data.router_scores)
    found = compare(data, turned, "router", (0.5, 0.5), COUNTS, "fp32")

    assert found.experts_used_agreement < 0.1
    assert found.top1_agreement == 1


@pytest.mark.parametrize("broken", ["expert_logits", "router_scores"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_graphs_that_give_nan_or_infinity_are_refused(predictions, broken, value):
    """NaN is greater than nothing: it would pass for no difference at all."""
    data = predictions(n_images=3)
    numbers = getattr(data, broken).copy()
    numbers[:, 1] = value

    with pytest.raises(BundleError, match="variant fp16: NaN or infinity for 1 of 3"):
        compare(data, dataclasses.replace(data, **{broken: numbers}), "router", (0.5, 0.5), COUNTS, "fp16")


def test_parity_is_that_of_the_rule_in_force(predictions):
    """Other logits move the exits of a rule that reads them; the router's scores are not asked then."""
    data = predictions(seed=4)
    louder = dataclasses.replace(data, expert_logits=2 * data.expert_logits)

    assert compare(data, louder, "router", (0.5, 0.5), COUNTS, "fp32").experts_used_agreement == 1
    found = compare(data, louder, "confidence", (0.3, 0.3), COUNTS, "fp32")
    assert found.experts_used_agreement < 1
    assert found.mean_experts < found.checkpoint_mean_experts
    with_other_routers = dataclasses.replace(data, router_scores=1 - data.router_scores)
    assert compare(data, with_other_routers, "confidence", (0.3, 0.3), COUNTS, "fp32").experts_used_agreement == 1


def test_experts_that_agree_by_a_hair_may_be_counted_either_way(predictions):
    """The score of the rule agreement jumps there, by more than any tolerance."""
    data = predictions(seed=5)
    theirs = data.expert_logits.copy()
    theirs[1, 7] = [1.0, 1.0004, -9, -9]
    theirs[0, 8], theirs[1, 8] = [3, 0, 2, -9], [0, 2.5, 1.0004, -9]  # the third class is best of both together
    ours = theirs.copy()
    ours[1, 7] = [1.0004, 1.0, -9, -9]
    ours[1, 8, 2] = 0.9996  # the first is
    pair = [dataclasses.replace(data, expert_logits=logits) for logits in (theirs, ours)]

    assert compare(*pair, "agreement", (0.5, 0.4), COUNTS, "fp32").experts_used_agreement == 1
    assert compare(*pair, "agreement", (0.5, 0.7), COUNTS, "fp32").experts_used_agreement == 1
    scores = data.router_scores.copy()
    scores[0, 7] = 0.9 if scores[0, 7] < 0.5 else 0.1
    other = dataclasses.replace(pair[1], router_scores=scores)  # of another rule that tie is no excuse
    assert compare(pair[0], other, "router", (0.5, 0.5), COUNTS, "fp32").experts_used_agreement == 1 - 1 / 400


def test_accuracies_of_parity_are_each_side_s_own(predictions):
    """By split, at the exits that each side takes itself."""
    data = predictions(seed=6)
    shuffled = dataclasses.replace(data, expert_logits=np.roll(data.expert_logits, 1, axis=1))
    found = compare(data, shuffled, "depth", (1, 1), COUNTS, "fp32")

    for side, accuracy in ((data, found.checkpoint_accuracy), (shuffled, found.accuracy)):
        right = side.expert_logits[0].argmax(axis=1) == data.labels
        assert accuracy.few == pytest.approx(100 * right[data.labels == 3].mean(), abs=1e-3)
    assert found.largest_loss > 5
