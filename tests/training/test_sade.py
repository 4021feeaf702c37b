"""SADE: three experts with priors of their own."""

import dataclasses

import pytest
import torch

from tests.training.test_losses import COUNTS, EXACT, LABELS, golden_logits
from training.methods.losses import effective_number_weights
from training.methods.ride import RideLoss
from training.methods.sade import SadeLoss, sade_priors
from training.models.multi_expert import Outputs
from training.recipe import RecipeError
from training.recipes import RECIPES

SADE = RECIPES["sade-cifar100"]


def test_the_loss_has_its_golden_value():
    """τ = 2, the sum of the three experts' losses; the first is plain cross-entropy."""
    logits = golden_logits()
    losses = SadeLoss(SADE, COUNTS)(Outputs(logits, logits), LABELS, 0)

    assert losses["loss"].item() == pytest.approx(29.639687, **EXACT)
    assert losses["expert_0"].item() == pytest.approx(7.572661, **EXACT)


def test_the_third_prior_has_the_frequencies_reversed():
    """Whatever the order of the classes: the rarest has the share of the most frequent one."""
    log_shares = torch.log(torch.tensor([0.2, 0.5, 0.3]))
    reversed_log_shares = torch.log(torch.tensor([0.5, 0.2, 0.3]))
    priors = sade_priors([2, 5, 3], reversed_tau=2.0)

    torch.testing.assert_close(priors, torch.stack([torch.zeros(3), log_shares, log_shares - 2 * reversed_log_shares]))


def test_for_a_geometric_profile_it_is_rides_frame_with_a_prior_per_expert():
    """Then log p̃ is −log p but for a constant, so the third expert has weight 1 + τ."""
    counts = [64, 32, 16, 8, 4, 2, 1]
    logits, labels = torch.randn(3, 5, 7, dtype=torch.float64), torch.tensor([0, 1, 3, 6, 6])
    ride = dataclasses.replace(RECIPES["ride-cifar100"], loss="logit_adjusted", diversity_weight=0.0,
                               deferred_from=None, expert_taus=(0.0, 1.0, 3.0))  # fmt: skip

    ours, theirs = (loss(Outputs(logits, logits), labels, 0)["loss"].item()
                    for loss in (SadeLoss(SADE, counts), RideLoss(ride, counts)))  # fmt: skip
    assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_experts": 4}, "n_experts=4: method 'sade' has three; 'ride' with expert_taus has any"),
        ({"loss": "balanced_softmax"}, "loss='balanced_softmax': method 'sade' adds frequencies itself"),
    ],
)
def test_what_sade_is_not_is_refused(fields, message):
    """With the way to get it."""
    with pytest.raises(RecipeError, match=message):
        dataclasses.replace(SADE, **fields)


def test_class_weights_apply_where_the_recipe_defers_them():
    """From their epoch on, on top of the priors: the tail's image decides."""
    logits = golden_logits()
    loss = SadeLoss(dataclasses.replace(SADE, deferred_from=0.8), COUNTS)
    weights = effective_number_weights(COUNTS, 0.9999).double()[LABELS]
    each = torch.stack([loss(Outputs(logits[:, [b]], logits), LABELS[[b]], 0)["loss"] for b in range(4)])

    before, after = (loss(Outputs(logits, logits), LABELS, epoch)["loss"].item() for epoch in (159, 160))

    assert before == pytest.approx(each.mean().item())
    assert after == pytest.approx(((weights * each).sum() / weights.sum()).item())
