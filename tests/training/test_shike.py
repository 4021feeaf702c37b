"""SHIKE: its network's size and cost, its losses, its schedule."""

import dataclasses
import math

import pytest
import torch

from tests.training.test_losses import COUNTS, EXACT, LABELS, golden_logits
from training.methods import shike
from training.methods.method import build_model
from training.methods.shike import ShikeLoss
from training.models.depth_fusion import FusionLayers
from training.models.macs import count_macs
from training.models.multi_expert import Outputs
from training.recipe import Recipe, RecipeError
from training.recipes import RECIPES

SHIKE = RECIPES["shike-cifar100"]
MEAN_STD = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


@pytest.mark.parametrize(
    ("n_experts", "macs", "parameters"), [(2, "96.0", "0.887"), (3, "121.0", "1.277"), (4, "144.8", "1.662")]
)
def test_the_network_has_the_published_cost(n_experts, macs, parameters):
    """
    In millions; two operations per batch-norm element, option-B shortcuts, both depths of shallow branch.

    The published code has a second set of classifiers for its second phase, where ours begin afresh.
    """
    net = build_model(dataclasses.replace(SHIKE, n_experts=n_experts), 100, *MEAN_STD).net

    assert f"{count_macs(net, torch.zeros(1, 32, 32, 3, dtype=torch.uint8)) / 1e6:.1f}" == macs
    once = sum(parameter.numel() for parameter in net.parameters())
    second = sum(expert.classifier.weight.numel() for expert in net.experts)
    assert f"{(once + second) / 1e6:.3f}" == parameters


@pytest.mark.parametrize("side", [16, 19])
def test_experts_find_both_levels_in_the_trunks_output(side):
    """The fused feature is the mean of deep times shallow, worked from the stages by hand; odd sides too."""
    net = build_model(dataclasses.replace(SHIKE, image_size=side), 100, *MEAN_STD).net.eval()
    images = torch.randint(0, 256, (2, side, side, 3), dtype=torch.uint8)
    with torch.no_grad():
        outputs = net(images)
        low = net.trunk.layers.low((images.permute(0, 3, 1, 2) / 255 - 0.5) / 0.25)
        high = net.trunk.layers.high(low)
        for index, start in enumerate((low, high, low)):
            layers = net.experts[index].layers
            fused = layers.deep(high) * layers.shallow(start)
            torch.testing.assert_close(outputs.expert_features[index], fused.mean(dim=(2, 3)), atol=1e-2, rtol=1e-3)


def test_only_the_shorter_shallow_branch_ends_with_a_relu():
    """One convolution from the second stage, with it; two from the first, without, at even indices."""
    net = build_model(dataclasses.replace(SHIKE, n_experts=4), 100, *MEAN_STD).net
    branches = [expert.layers.shallow for expert in net.experts]
    maps = [branch(torch.randn(4, branch[0].in_channels, 16, 16)) for branch in branches]

    assert [branch[0].in_channels for branch in branches] == [16, 32, 16, 32]
    assert [bool((each < 0).any()) for each in maps] == [True, False, True, False]


def test_shallow_branches_begin_as_torch_has_it():
    """Variance 1/(3 · k² · inputs); all else has the gain of ReLU, 2/(k² · inputs)."""
    layers = build_model(SHIKE, 100, *MEAN_STD).net.experts[0].layers

    for convolution, relative in ((layers.shallow[3], 1 / 3), (layers.deep[1].conv1, 2)):
        weight = convolution.weight
        assert weight.var().item() * weight[0].numel() == pytest.approx(relative, rel=0.1)


def test_products_of_features_may_exceed_the_range_of_fp16():
    """A model in half precision multiplies in fp32: 1000 times 1000 is no infinity."""
    layers = FusionLayers(index=1, width=48, image_size=8).eval()
    torch.nn.init.constant_(layers.deep[-1].bn2.bias, 1000)
    torch.nn.init.constant_(layers.shallow[1].bias, 1000)
    with torch.no_grad():
        fused = layers.half()(torch.zeros(1, 16 * 8 * 8 + 32 * 4 * 4, dtype=torch.float16))

    torch.testing.assert_close(fused, torch.full((1, 48), 1e6))


def test_the_first_phase_has_its_golden_values():
    """Cross-entropy, knowledge transfer times 10, mutual distillation, and their sum."""
    logits = golden_logits()
    losses = ShikeLoss(SHIKE, COUNTS)(Outputs(logits, logits), LABELS, 0)

    found = [losses[name].item() for name in ("individual", "transfer", "mutual", "loss")]
    assert found == pytest.approx([24.392368, 1.208530, 0.417093, 26.017992], **EXACT)


def test_gradients_reach_the_teachers():
    """Nothing is detached: the transfer term moves the logit that only the teacher takes."""
    logits = torch.zeros(2, 1, 4, dtype=torch.float64)
    logits[0, 0, 1], logits[1, 0, 2] = 3.0, 5.0  # class 0 is true, 2 the hardest
    logits.requires_grad_()
    shike.transfer_loss(logits, torch.tensor([0])).backward()

    detached = logits.detach().clone().requires_grad_()
    student = torch.nn.functional.log_softmax(detached.masked_fill(torch.tensor([True, False, False, False]), -30), 2)
    teacher = torch.tensor([[0.0, 3.0, 2.5, 0.0]], dtype=torch.float64).log_softmax(1)
    torch.nn.functional.kl_div(student, teacher.expand_as(student), reduction="sum", log_target=True).div(4).backward()
    assert (logits.grad - detached.grad)[0, 0, 1].abs() > 1e-3


def test_mutual_distillation_moves_teachers_too():
    """As the sum over ordered pairs written out, divided by images and classes."""
    logits = golden_logits().requires_grad_()
    logs = logits.log_softmax(dim=2)
    pairs = [(logs[j].exp() * (logs[j] - logs[k])).mean() for j in range(3) for k in range(3) if j != k]

    (found,) = torch.autograd.grad(shike.mutual_loss(logits), logits, retain_graph=True)

    torch.testing.assert_close(found, torch.autograd.grad(sum(pairs), logits)[0])


def test_the_hardest_class_is_a_wrong_one():
    """By hand: the true class 0 has the largest mean logit, 1 the largest of the others; the teacher is [0, 2, 3]."""
    logits = torch.tensor([[[9.0, 4.0, 3.0]], [[8.0, 0.0, -2.0]]], dtype=torch.float64)
    teacher = torch.tensor([0.0, 2.0, 3.0], dtype=torch.float64).softmax(0)
    students = logits[:, 0].clone()
    students[:, 0] = -30
    divergences = (teacher * (teacher.log() - students.log_softmax(1))).sum(dim=1)

    found = shike.transfer_loss(logits, torch.tensor([0])).item()

    assert found == pytest.approx(divergences.sum().item() / 3)


def test_the_second_phase_trains_classifiers_alone_under_balanced_softmax():
    """Its golden value; fresh classifiers; the frozen rest in the loop keeps following with its batch norms."""
    model, stages = shike.build(SHIKE, COUNTS, *MEAN_STD)
    stage = stages[1]
    logits = golden_logits()
    before = model.net.experts[2].classifier.weight.clone()
    stage.begin()

    assert [s.name for s in stages] == ["experts", "classifiers", "routers"] == list(SHIKE.stage_epochs())
    assert stage.losses(Outputs(logits, logits), LABELS, 0)["loss"].item() == pytest.approx(26.707568, **EXACT)
    assert sum(parameter.numel() for parameter in stage.part.parameters()) == 3 * 64 * 100
    assert not before.equal(model.net.experts[2].classifier.weight)
    assert stage.norms_follow


def test_learning_rates_are_those_of_the_authors_code():
    """Linear to a peak that the first epoch after the warm-up has; the second phase begins above zero."""
    _, (experts, classifiers, _) = shike.build(SHIKE, COUNTS, *MEAN_STD)

    assert [experts.lr(e) for e in range(6)] == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.125, 0.15], abs=1e-12)
    assert [classifiers.lr(e) for e in range(6)] == pytest.approx([0.0375, 0.05, 0.0625, 0.075, 0.0875, 0.1], abs=1e-12)
    assert experts.lr(179) == pytest.approx(0.15 * (1 + math.cos(math.pi * 174 / 175)) / 2)
    assert classifiers.lr(10) == pytest.approx(0.1 * 0.75)  # a third of the cosine
    assert experts.epochs + classifiers.epochs == 200

    _, (_, at_once, _) = shike.build(dataclasses.replace(SHIKE, retrain_warmup_epochs=0), COUNTS, *MEAN_STD)
    assert at_once.lr(0) == pytest.approx(0.1)
    _, (steps, _, _) = shike.build(dataclasses.replace(SHIKE, schedule="step"), COUNTS, *MEAN_STD)
    assert [steps.lr(e) for e in (0, 5, 143, 144)] == pytest.approx([0.03, 0.15, 0.15, 1.5e-3])


def test_one_expert_has_nobody_to_learn_from():
    """Refused, by name."""
    with pytest.raises(RecipeError, match="n_experts=1: method 'shike' needs two experts"):
        Recipe(name="x", method="shike", n_experts=1)
