"""Risk control: the bound holds as often as it says and is not looser than it must be; what chooses does not test."""

import dataclasses

import numpy as np
import pytest

from model_export.bundle import BundleError
from model_export.calibrate import RULES, rule_scores
from model_export.risk import certify, halves, upper_bound
from training.evaluate import Costs, Predictions, mean_logits, route

COUNTS = [500, 200, 50, 5]
MACS = Costs(100, [10, 10, 10], [1, 1])


def draws(generator, n_images, worse, better):
    """Losses of 1 with the probability `worse`, of -1 with the probability `better`."""
    return generator.choice([1.0, -1.0, 0.0], n_images, p=[worse, better, 1 - worse - better])


@pytest.mark.parametrize(("worse", "better"), [(0.02, 0.015), (0.1, 0.02), (0.004, 0.0), (0.3, 0.25)])
@pytest.mark.parametrize("error", [0.05, 0.2])
def test_the_bound_is_exceeded_no_more_often_than_it_says(worse, better, error):
    """Of 400 samples of 1000 images; three standard errors are allowed."""
    generator = np.random.default_rng(0)
    bounds = np.array([upper_bound(draws(generator, 1000, worse, better), error) for _ in range(400)])

    violations = (bounds < worse - better).mean()
    assert violations <= error + 3 * np.sqrt(error * (1 - error) / 400)
    assert violations >= error / 10  # a bound that is never exceeded gives experts away


@pytest.mark.parametrize(("worse", "better"), [(0.02, 0.015), (0.1, 0.02)])
def test_the_bound_is_nearly_that_of_the_normal_distribution(worse, better):
    """Within half as much again, with 5000 images; Hoeffding's is several times as far from the mean."""
    generator = np.random.default_rng(1)
    samples = [draws(generator, 5000, worse, better) for _ in range(50)]
    distance = np.mean([upper_bound(losses, 0.05) - losses.mean() for losses in samples])
    normal = np.mean([1.645 * losses.std() / np.sqrt(5000) for losses in samples])

    assert normal < distance < 1.5 * normal
    assert distance < np.sqrt(2 * np.log(1 / 0.05) / 5000) / 3


@pytest.mark.parametrize("n_images", [7, 400])
def test_the_bound_is_the_smallest_mean_whose_stake_grows_enough(n_images):
    """Image by image: each bet is made before its image's loss is seen, by the variance of those before it."""
    losses, error = draws(np.random.default_rng(2), n_images, 0.1, 0.05), 0.3
    squares, total, bets = 1.0, 0.0, []
    for index, loss in enumerate(losses):
        bets.append(min(0.9, (2 * np.log(1 / error) / (n_images * squares / (index + 1))) ** 0.5))
        total += loss
        squares += (loss - total / (index + 2)) ** 2

    def largest_stake(mean):
        stakes = [np.prod(1 + np.array(bets[:count]) * (mean - losses[:count])) for count in range(1, n_images + 1)]
        return max(stakes)

    bound = upper_bound(losses, error)
    assert 0 < bound < 1
    assert largest_stake(bound) == pytest.approx(1 / error)


def test_bounds_at_the_ends():
    """Never lost: near 0, nearer the more images; always lost: 1; nothing seen: 1; always gained: 0."""
    assert upper_bound(np.zeros(5000), 0.05) < 0.001
    assert upper_bound(np.zeros(500), 0.05) == pytest.approx(np.log(20) / 500, rel=0.2)
    assert upper_bound(np.ones(100), 0.05) == 1
    assert upper_bound(np.zeros(1), 0.05) == 1
    assert upper_bound(-np.ones(1000), 0.05) == 0
    assert upper_bound(np.zeros(500), 0.01) > upper_bound(np.zeros(500), 0.1)


def loss_at(data, rule, thresholds):
    """Percentage points lost against all experts."""
    used = route(rule_scores(rule, data.expert_logits, data.router_scores), thresholds)
    early, full = (
        mean_logits(data.expert_logits, count).argmax(axis=1) == data.labels
        for count in (used, np.full(len(used), len(data.expert_logits)))
    )
    return 100 * (full.mean() - early.mean())


def test_certified_thresholds_lose_more_than_the_risk_as_rarely_as_they_should(predictions):
    """From 200 samples of 600 images each; what they really lose is measured on 40,000 others."""
    world = predictions(seed=100, n_images=40_000, n_experts=2)
    truly = [
        loss_at(world, "confidence", certify(predictions(seed, 600, 2), COUNTS, Costs(100, [10, 10], [1]), "confidence",
                                             4.0, 0.8)[0])
        for seed in range(200)
    ]  # fmt: skip
    violations = np.mean(np.array(truly) > 4.0)
    assert violations <= 0.2 + 3 * np.sqrt(0.2 * 0.8 / 200)
    assert np.mean(truly) > 0.5  # and it does dare something


@pytest.mark.parametrize("rule", RULES)
def test_what_is_recorded_is_what_the_testing_half_lost(rule, predictions):
    """In all and in each split; the bound lies between that loss and the risk."""
    data = predictions(seed=1, n_images=2000)
    thresholds, risk = certify(data, COUNTS, MACS, rule, 5.0, 0.9)

    assert (risk.max_risk, risk.confidence, risk.images) == (5.0, 0.9, 1000)
    assert max(risk.loss, 0) <= risk.upper_bound <= 5.0
    testing = halves(data.labels)[1]
    rows = Predictions(data.expert_logits[:, testing], data.router_scores[:, testing], data.labels[testing])
    assert risk.loss == pytest.approx(loss_at(rows, rule, thresholds), abs=1e-4)
    for split, labels in {"many": (0, 1), "medium": (2,), "few": (3,)}.items():
        mine = np.isin(rows.labels, labels)
        part = Predictions(rows.expert_logits[:, mine], rows.router_scores[:, mine], rows.labels[mine])
        assert risk.loss_by_split[split] == pytest.approx(loss_at(part, rule, thresholds), abs=1e-4)
    assert certify(data, COUNTS, MACS, rule, 5.0, 0.9) == (thresholds, risk)


def test_a_larger_risk_or_less_confidence_buys_cheaper_thresholds(predictions):
    """And no risk at all buys none."""
    data = predictions(seed=2, n_images=2000)

    def experts(max_risk, confidence):
        thresholds, _ = certify(data, COUNTS, MACS, "confidence", max_risk, confidence)
        return route(rule_scores("confidence", data.expert_logits, data.router_scores), thresholds).mean()

    costs = [experts(risk, 0.9) for risk in (0.0, 2.0, 5.0, 100.0)]
    assert costs == sorted(costs, reverse=True)
    assert (costs[0], costs[3]) == (3, 1)
    assert costs[1] > costs[2] > 1
    assert experts(3.0, 0.5) < experts(3.0, 0.999)


def test_where_nothing_can_be_certified_all_experts_run(predictions):
    """With a loss of exactly 0, which needs no test."""
    thresholds, risk = certify(predictions(seed=3, n_images=60), COUNTS, MACS, "confidence", 0.1, 0.95)

    assert thresholds == (0.0, 0.0)
    assert (risk.loss, risk.upper_bound) == (0.0, 0.0)
    assert set(risk.loss_by_split.values()) == {0.0}


def test_testing_stops_at_the_first_thresholds_that_fail(predictions, monkeypatch):
    """Whatever the cheaper ones would give; those before it stand. The order goes from the safest to the cheapest."""
    data = predictions(seed=4, n_images=1000)
    losses, bounds = [], iter([0.01, 0.02, 0.9, 0.0])

    def scripted(found, error):
        assert error == pytest.approx(0.05)
        losses.append(found)
        return next(bounds)

    monkeypatch.setattr("model_export.risk.upper_bound", scripted)
    thresholds, risk = certify(data, COUNTS, MACS, "confidence", 5.0, 0.95)

    assert next(bounds) == 0.0
    assert risk.upper_bound == 2.0
    assert risk.loss == pytest.approx(100 * losses[1].mean(), abs=1e-4)
    _, testing = halves(data.labels)
    scores = rule_scores("confidence", data.expert_logits, data.router_scores)[:, testing]
    assert 2.5 < route(scores, thresholds).mean() < 3
    assert len(losses[1]) == len(testing)

    bounds = iter([0.01, 0.02, 0.9])
    logits = data.expert_logits.copy()
    logits[:, testing] = np.random.default_rng(0).normal(size=logits[:, testing].shape)
    changed = dataclasses.replace(data, expert_logits=logits)
    assert certify(changed, COUNTS, MACS, "confidence", 5.0, 0.95)[0] == thresholds  # the order is not its own


def test_the_recorded_bound_is_rounded_up_but_never_above_the_risk(predictions, monkeypatch):
    """A risk of many digits can be certified, too."""
    for bound, recorded in ((0.00123451, 0.1235), (0.00999998, 0.999999)):
        monkeypatch.setattr("model_export.risk.upper_bound", lambda losses, error, bound=bound: bound)
        assert certify(predictions(), COUNTS, MACS, "margin", 0.999999, 0.95)[1].upper_bound == recorded


def test_the_halves_share_no_image_and_hold_each_class_alike():
    """Each image is in one of them, in an order that says nothing of its class; the same at every call."""
    labels = np.repeat([0, 1, 2, 3], [400, 101, 17, 1])
    first, second = halves(labels)

    assert sorted([*first, *second]) == list(range(len(labels)))
    counts = np.stack([np.bincount(labels[half], minlength=4) for half in (first, second)])
    assert np.abs(counts[0] - counts[1]).max() <= 1
    assert all(abs(np.corrcoef(np.arange(len(half)), labels[half])[0, 1]) < 0.2 for half in (first, second))
    assert [half.tolist() for half in halves(labels)] == [first.tolist(), second.tolist()]


def coarser(data, spread, seed=0):
    """The same images as a less exact precision sees them."""
    noise = np.random.default_rng(seed).normal(0, spread, data.expert_logits.shape)
    return dataclasses.replace(data, expert_logits=(data.expert_logits + noise).astype(np.float32))


def test_what_is_certified_holds_for_every_variant_that_can(predictions):
    """Each has its bound, against all experts of the checkpoint; thresholds are no bolder than the worst one allows."""
    data = predictions(seed=5, n_images=4000)
    alone, without = certify(data, COUNTS, MACS, "confidence", 3.0, 0.9)
    together, risk = certify(data, COUNTS, MACS, "confidence", 3.0, 0.9, {"int8": coarser(data, 0.1)})

    assert without.variants == {}
    assert max(risk.upper_bound, risk.variants["int8"]) <= 3.0
    assert sum(together) <= sum(alone)
    testing = halves(data.labels)[1]
    found = route(rule_scores("confidence", coarser(data, 0.1).expert_logits, data.router_scores), together)
    early = mean_logits(coarser(data, 0.1).expert_logits, found).argmax(axis=1) == data.labels
    full = data.expert_logits.mean(axis=0).argmax(axis=1) == data.labels
    assert 100 * (full[testing].mean() - early[testing].mean()) <= risk.variants["int8"]


def test_a_variant_that_fails_with_all_experts_does_not_count(predictions):
    """Its bound says so; the others are certified as if it were not there."""
    data = predictions(seed=5, n_images=4000)
    alone = certify(data, COUNTS, MACS, "confidence", 3.0, 0.9)
    thresholds, risk = certify(data, COUNTS, MACS, "confidence", 3.0, 0.9, {"int8": coarser(data, 5.0)})

    assert (thresholds, risk.upper_bound) == (alone[0], alone[1].upper_bound)
    assert risk.variants["int8"] > 3.0


def test_thresholds_safer_than_the_frontier_s_are_tried_too():
    """The second expert hardly helps, so the frontier begins far below all experts; small risks buy some exits."""
    generator = np.random.default_rng(0)
    n_images = 4000
    labels = generator.integers(0, 4, n_images)
    logits = generator.normal(0, 1, (2, n_images, 4)).astype(np.float32)
    logits[0, np.arange(n_images), labels] += 1.0
    logits[1, np.arange(n_images), labels] += 1.1
    data = Predictions(logits, generator.uniform(0, 1, (1, n_images)).astype(np.float32), labels)
    used = [
        route(data.router_scores, certify(data, COUNTS, Costs(100, [10, 10], [1]), "router", risk, 0.9)[0]).mean()
        for risk in (0.5, 1.0, 2.0, 4.0)
    ]

    assert used == sorted(used, reverse=True)
    assert 2 > used[1] > used[2] > used[3] > 1


def test_certified_thresholds_lie_between_scores(predictions):
    """Also the safest ones: a score that another precision rounds otherwise decides the same."""
    data = predictions(seed=3, n_images=300)
    for risk in (3.0, 6.0, 12.0, 24.0):
        thresholds = certify(data, COUNTS, MACS, "router", risk, 0.8)[0]
        for scores, value in zip(data.router_scores, thresholds, strict=True):
            assert value in (0.0, 1.0) or np.abs(scores - value).min() > 1e-6


def test_one_image_cannot_both_choose_and_test(predictions):
    """With two, each does one of them."""
    with pytest.raises(BundleError, match=r"max_risk needs two held-out images or more, .* there is 1"):
        certify(predictions(seed=3, n_images=1), COUNTS, MACS, "router", 1.0, 0.95)
    assert certify(predictions(seed=3, n_images=2), COUNTS, MACS, "router", 1.0, 0.95)[1].images == 1
