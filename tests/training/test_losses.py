"""The losses give the values that the public implementations give on the same input."""

import dataclasses
import math

import pytest
import torch

from training.data.longtail import class_counts
from training.methods.individual import IndividualLoss
from training.methods.losses import (
    class_temperatures,
    diversity_loss,
    effective_number_weights,
    ldam_loss,
    ldam_margins,
)
from training.methods.ride import RideLoss, another_expert_helps, router_losses
from training.models.multi_expert import Outputs
from training.recipes import RECIPES

COUNTS = class_counts(500, 100, 100)
LABELS = torch.tensor([0, 33, 66, 99])
EXACT = {"abs": 5e-6, "rel": 1e-6}


def golden_logits() -> torch.Tensor:
    """(3, 4, 100), float64, the fixed input that the expected values below belong to."""
    expert, image, label = (
        torch.arange(n, dtype=torch.float64).view(shape) for n, shape in ((3, (3, 1, 1)), (4, (4, 1)), (100, (100,)))
    )
    return 6 * torch.sin(1 + 2 * expert + 3 * image + 0.37 * label * (1 + 0.1 * expert))


@pytest.mark.parametrize(
    ("epoch", "individual", "diversity", "total"),
    [
        (0, 52.082752, -3.564109, 48.518643),
        (159, 52.082752, -3.564109, 48.518643),
        (160, 57.376019, -2.803761, 54.572259),
    ],
)
def test_ride_loss_has_its_golden_values_before_and_after_the_deferred_epoch(epoch, individual, diversity, total):
    """Individual and diversity terms are summed over experts; weights and temperatures begin at epoch 160 of 200."""
    logits = golden_logits()
    losses = RideLoss(RECIPES["ride-cifar100"], COUNTS)(Outputs(logits, logits), LABELS, epoch)

    assert losses["individual"].item() == pytest.approx(individual, **EXACT)
    assert losses["diversity"].item() == pytest.approx(diversity, **EXACT)
    assert losses["loss"].item() == pytest.approx(total, **EXACT)


@pytest.mark.parametrize(("deferred", "expected"), [(False, 16.806237), (True, 20.469588)])
def test_ldam_loss_has_its_golden_values(deferred, expected):
    """LDAM of the first expert alone, without and with deferred class weights."""
    weights = effective_number_weights(COUNTS, 0.9999).double() if deferred else None
    loss = ldam_loss(golden_logits()[0], LABELS, ldam_margins(COUNTS, 0.5), 30, weights)

    assert loss.item() == pytest.approx(expected, **EXACT)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (ldam_margins(COUNTS, 0.5), [0.158114, 0.284055, 0.5]),
        (effective_number_weights(COUNTS, 0.9999), [0.044876, 0.457055, 4.378313]),
        (class_temperatures(COUNTS, 0.05), [1, 0.823502, 0.806711]),
    ],
)
def test_class_quantities_have_their_golden_values(values, expected):
    """Margin, deferred weight and temperature of the classes with 500, 48 and 5 images."""
    assert values[[0, 50, 99]].tolist() == pytest.approx(expected, abs=1e-6)


def test_class_weights_average_to_one_and_temperatures_to_their_golden_mean():
    """The weights do not change the size of the loss; T̄ scales the diversity term."""
    assert effective_number_weights(COUNTS, 0.9999).mean().item() == pytest.approx(1, abs=1e-6)
    assert class_temperatures(COUNTS, 0.05).mean().item() == pytest.approx(0.847114, abs=1e-6)


def test_a_descent_step_on_the_diversity_term_makes_experts_disagree_more():
    """The term enters with a negative weight: the first public version had this sign wrong."""
    recipe = RECIPES["ride-cifar100"]
    logits = golden_logits().requires_grad_()
    flat = torch.ones(100, dtype=torch.float64)

    before = diversity_loss(logits, flat)
    (recipe.diversity_weight * before).backward()
    after = diversity_loss(logits.detach() - 0.01 * logits.grad, flat)

    assert before.item() == pytest.approx(7.920243, **EXACT)
    assert after.item() == pytest.approx(7.920611, **EXACT)


def test_diversity_of_one_expert_is_refused():
    """It would always be 0."""
    with pytest.raises(ValueError, match="two experts or more, there is 1"):
        diversity_loss(golden_logits()[:1], torch.ones(100))


def test_collaborative_and_diversity_are_separate_switches():
    """Without diversity the loss is individual unless the recipe asks for the collaborative one."""
    logits = golden_logits()
    plain = dataclasses.replace(RECIPES["ride-cifar100"], diversity_weight=0.0, max_margin=0.0)
    together = dataclasses.replace(plain, collaborative=True)

    individual = RideLoss(plain, COUNTS)(Outputs(logits, logits), LABELS, 0)["loss"].item()
    collaborative = RideLoss(together, COUNTS)(Outputs(logits, logits), LABELS, 0)["loss"].item()

    each = sum(torch.nn.functional.cross_entropy(expert, LABELS).item() for expert in logits)
    assert individual == pytest.approx(each, **EXACT)
    assert collaborative == pytest.approx(3 * 5.490708, **EXACT)
    both = dataclasses.replace(together, diversity_weight=-0.45)
    diversity = RideLoss(both, COUNTS)(Outputs(logits, logits), LABELS, 0)["diversity"].item()
    assert diversity == pytest.approx(-3.564109, **EXACT)  # of the experts, not of their mean


def test_routers_learn_where_a_longer_prefix_is_right_and_this_one_is_wrong():
    """Label 1 only where more experts would repair the answer; a hand-worked case of every pattern."""
    right = {"R": [2.0, 0.0], "W": [0.0, 3.0]}
    patterns = ["RRR", "WRR", "WWW", "RWR", "WWR"]
    sums = torch.tensor([[right[pattern[e]] for pattern in patterns] for e in range(3)])  # logits of prefixes
    expert_logits = torch.diff(sums, dim=0, prepend=torch.zeros(1, 5, 2))

    helps = another_expert_helps(expert_logits, torch.zeros(5, dtype=torch.long))

    assert helps.int().tolist() == [[0, 1, 0, 0, 1], [0, 0, 0, 1, 1]]


def test_every_cross_entropy_is_weighed_from_the_deferred_epoch_on():
    """Σ w_y · (−log p_y) / Σ w_y, with the golden weights of classes with 500, 48 and 5 images; without a margin."""
    logits, labels = golden_logits()[0, :3], torch.tensor([0, 50, 99])
    weights = torch.tensor([0.044876, 0.457055, 4.378313], dtype=torch.float64)
    recipe = dataclasses.replace(RECIPES["ride-cifar100"], loss="ce")
    adjusted = logits + torch.tensor(COUNTS, dtype=torch.float64).log()

    for name, judged in (("ce", logits), ("balanced_softmax", adjusted), ("logit_adjusted", adjusted)):
        each = judged.logsumexp(dim=1) - judged[torch.arange(3), labels]
        before, after = (IndividualLoss(name, recipe, COUNTS)(logits, labels, epoch).item() for epoch in (159, 160))
        assert before == pytest.approx(each.mean().item(), rel=1e-5)
        assert after == pytest.approx(((weights * each).sum() / weights.sum()).item(), rel=1e-5)


def test_routers_are_judged_by_the_mean_over_images_and_routers():
    """By hand: two routers, two images; a missed repair costs a hundred times a needless expert."""
    expert_logits = torch.tensor([[[0.0, 1.0], [1.0, 0.0]], [[3.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    asked = torch.tensor([[-2.0, 1.0], [0.5, -3.0]])  # of which the first alone should have been positive

    loss = router_losses(lambda outputs: asked, 100.0, Outputs(expert_logits, expert_logits), torch.zeros(2).long(), 0)

    each = [100 * math.log1p(math.exp(2.0)), *(math.log1p(math.exp(x)) for x in (1.0, 0.5, -3.0))]
    assert loss["loss"].item() == pytest.approx(sum(each) / 4)
