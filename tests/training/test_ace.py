"""ACE: groups, losses, learning rates, and an answer that is a running sum."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from tests.training.test_losses import COUNTS
from training.checkpoint import checkpoints_of
from training.data.sets import Images
from training.log import Log
from training.loop import run_stage
from training.methods import ace
from training.methods.ace import AceLoss, complementary_loss, lr_factors
from training.models.groups import nested_groups
from training.models.multi_expert import Outputs
from training.recipe import RecipeError
from training.recipes import RECIPES
from training.train import train, trained_model

ACE = RECIPES["ace-cifar100"]
MEAN_STD = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
SMALL_COUNTS = [2, 40, 9, 9, 4]  # not in order of frequency


def small_model(**fields):
    """Three experts for five classes on 16x16 images, and the stage that trains them."""
    recipe = dataclasses.replace(ACE, image_size=16, group_shares=(0.6, 0.4), **fields)
    torch.manual_seed(0)
    model, stages = ace.build(recipe, SMALL_COUNTS, *MEAN_STD)
    return model, stages[0]


def images_of(count):
    """(count, 16, 16, 3), uint8, noise."""
    return torch.randint(0, 256, (count, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_groups_are_nested_and_hold_the_rarest_classes():
    """CIFAR-100-LT: all, medium and few, few; and any order of classes, ties to the higher index."""
    groups = nested_groups(COUNTS, (0.65, 0.3))

    assert [group.sum().item() for group in groups] == [100, 65, 30]
    assert all(groups[1] == torch.tensor([count <= 100 for count in COUNTS]))
    assert all(groups[2] == torch.tensor([count < 20 for count in COUNTS]))
    assert nested_groups(SMALL_COUNTS, (0.6, 0.4, 0.01)).int().tolist() == [
        [1, 1, 1, 1, 1], [1, 0, 0, 1, 1], [1, 0, 0, 0, 1], [1, 0, 0, 0, 0]
    ]  # fmt: skip


def test_learning_rates_follow_the_images_of_a_group():
    """Shares 1, 0.187, 0.0281 of CIFAR-100-LT; what is not named learns as the first does; or all alike."""
    model, (stage, _) = ace.build(ACE, COUNTS, *MEAN_STD)

    assert lr_factors(nested_groups(COUNTS, (0.65, 0.3)), COUNTS) == pytest.approx([1, 2023 / 10847, 305 / 10847])
    assert [(module, pytest.approx(factor, abs=1e-4)) for module, factor in stage.lr_factors] == [
        *zip(model.net.experts, (1, 0.1865, 0.0281), strict=True)
    ]
    assert small_model(group_lr_scaling=False)[1].lr_factors == ()


def test_each_expert_is_judged_on_its_group_alone():
    """Cross-entropy and squared logits outside the group, means over the group's images; worked image by image."""
    groups = nested_groups(SMALL_COUNTS, (0.6, 0.4))
    logits, labels = torch.randn(3, 6, 5), torch.tensor([1, 0, 3, 1, 4, 2])
    recipe = dataclasses.replace(ACE, complementary_weight=0.5)
    losses = AceLoss(recipe, SMALL_COUNTS, groups)(Outputs(logits, logits, own_logits=logits), labels, 0)

    individual = complementary = 0.0
    for z, images, outside in (
        (logits[0], range(6), []),
        (logits[1], (1, 2, 4), [1, 2]),
        (logits[2], (1, 4), [1, 2, 3]),
    ):
        for image in images:
            individual += F.cross_entropy(z[image], labels[image]).item() / len(images)
            complementary += sum(z[image, label].item() ** 2 for label in outside) / len(images)
    assert losses["individual"].item() == pytest.approx(individual, rel=1e-5)
    assert losses["complementary"].item() == pytest.approx(0.5 * complementary, rel=1e-5)
    assert losses["loss"].item() == pytest.approx(individual + 0.5 * complementary, rel=1e-5)


def test_the_complementary_loss_may_be_a_length():
    """Of all logits outside the group as one vector, by the number of those classes; an expert for all has none."""
    logits = torch.tensor([[3.0, 1.0, 0.0], [9.0, 2.0, 4.0]], requires_grad=True)
    loss = complementary_loss(logits, torch.tensor([True, False, False]), "length")
    assert loss.item() == pytest.approx((1 + 4 + 16) ** 0.5 / 2)

    nothing = complementary_loss(logits, torch.tensor([True, True, True]), "length")
    nothing.backward()
    assert (nothing.item(), logits.grad.abs().max().item()) == (0, 0)
    recipe = dataclasses.replace(ACE, complementary_weight=1, complementary_form="length")
    groups = nested_groups(SMALL_COUNTS, (0.6, 0.4))
    outputs = torch.randn(3, 6, 5)
    rare = torch.zeros(6, dtype=torch.long)  # in all groups
    losses = AceLoss(recipe, SMALL_COUNTS, groups)(Outputs(outputs, outputs, own_logits=outputs), rare, 0)
    parts = [outputs[e][:, ~groups[e]].norm() / (~groups[e]).sum() for e in (1, 2)]
    assert losses["complementary"].item() == pytest.approx(sum(parts).item(), rel=1e-5)


@pytest.mark.parametrize(("labels", "moved"), [([1, 1, 1, 1], [True, False, False]), ([1, 1, 0, 1], [True] * 3)])
def test_a_batch_with_one_image_of_a_group_or_none_trains_as_any_other(labels, moved):
    """Finite losses; an expert without images gets gradients of zero, so the optimiser's state is complete."""
    model, stage = small_model()
    stage.losses(model.net.train()(images_of(4)), torch.tensor(labels), 0)["loss"].backward()

    for expert, moves in zip(model.net.experts, moved, strict=True):
        gradients = [parameter.grad for parameter in expert.parameters()]
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert any(gradient.any() for gradient in gradients) == moves


@pytest.mark.parametrize("stopped", [True, False])
def test_later_experts_train_the_trunk_only_where_the_recipe_lets_them(stopped):
    """The gradient of the later experts' losses, at the trunk; that of the first expert's always reaches it."""
    model, _ = small_model(group_stop_gradient=stopped)
    first = model.net(images_of(4)).own_logits[0].square().sum()
    assert all(slope.any() for slope in torch.autograd.grad(first, [*model.net.trunk.parameters()]))
    model.net(images_of(4)).own_logits[1:].square().sum().backward()

    reached = [p.grad is not None and bool(p.grad.any()) for p in model.net.trunk.parameters()]
    assert any(reached) != stopped
    assert all(p.grad is not None for p in model.net.experts[1].parameters())


@pytest.mark.parametrize(
    ("fields", "power", "own_rows", "over_group"),
    [
        ({}, 1, True, True),
        ({"group_norm_power": 2.0}, 2, True, True),
        ({"group_norm_power": -1.0, "group_norm_rows": "all"}, -1, False, True),
        ({"group_answer": "all"}, 1, True, False),
        ({"group_norm_power": 0.0}, 0, True, True),
    ],
)
def test_the_running_mean_of_the_contributions_is_the_answer_of_every_prefix(fields, power, own_rows, over_group):
    """For 1, 2 and 3 experts, against the definition: per class the mean over the experts that have it, rescaled."""
    model, _ = small_model(**fields)
    net = model.net.eval()
    with torch.no_grad():
        for index, expert in enumerate(net.experts):  # lengths that differ between experts and between rows
            expert.classifier.weight.mul_((1 + index) * torch.linspace(0.5, 2, 5).unsqueeze(1))
        outputs = net(images_of(4))
    groups = nested_groups(SMALL_COUNTS, (0.6, 0.4))
    lengths = [
        expert.classifier.weight.detach().norm(dim=1)[groups[index] if own_rows else slice(None)].mean()
        for index, expert in enumerate(net.experts)
    ]
    for used in (1, 2, 3):
        answer = torch.zeros(4, 5)
        for label in range(5):
            allowed = [index for index in range(used) if groups[index, label]]
            scaled = [(lengths[0] / lengths[i]) ** power * outputs.own_logits[i, :, label] for i in allowed]
            answer[:, label] = sum(scaled) / (len(allowed) if over_group else used)
        torch.testing.assert_close(outputs.expert_logits[:used].sum(dim=0) / used, answer, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(outputs.expert_logits[1:], outputs.own_logits[1:])


def test_contributions_join_one_after_the_other_as_in_a_bundle():
    """`addition`, which export writes into the graphs, gives the same sums as the network."""
    net = small_model()[0].net.eval()
    with torch.no_grad():
        outputs = net(images_of(3))
        total = torch.zeros(3, 5)
        for index in range(3):
            total = net.addition(index)(total, outputs.own_logits[index])
            torch.testing.assert_close(total, outputs.expert_logits[: index + 1].sum(dim=0))


def tiny(folder, **fields):
    """Three experts on the folder's four classes, one epoch."""
    return dataclasses.replace(
        ACE, data=str(folder), profile="natural", image_size=16, group_shares=(0.5, 0.25), epochs=1, router_epochs=1,
        warmup_epochs=0, batch_size=32, compile=False, precision="fp32", **fields,
    )  # fmt: skip


def test_a_checkpoint_brings_the_groups(folder, tmp_path):
    """The recipe alone does not know them: they depend on the class counts."""
    train(tiny(folder, lr=0.01), tmp_path / "run")
    checkpoint, model = trained_model(tmp_path / "run")

    assert model.net.groups.equal(nested_groups(checkpoint.class_counts, (0.5, 0.25)))
    assert list(checkpoints_of(tmp_path / "run")) == ["experts", "routers"]


def test_the_loop_multiplies_the_learning_rate_by_each_parts_factor(folder, tmp_path):
    """With gradients of zero and weight decay alone, one step shrinks a weight by lr · factor · decay."""
    recipe = tiny(folder, lr=0.5, weight_decay=0.5)
    model, (stage, _) = ace.build(recipe, [4, 3, 2, 1], *MEAN_STD)
    still = dataclasses.replace(stage, losses=lambda outputs, *_: {"loss": 0 * outputs.own_logits.sum()})
    before = [expert.classifier.weight.clone() for expert in model.net.experts]
    log = Log.open(tmp_path, {})
    one = Images(images_of(1), torch.zeros(1, dtype=torch.long))
    run_stage(
        model, still, one, one, recipe,
        start=None, run=tmp_path, log=log, info={"recipe": recipe.to_dict()}, evaluate=lambda _: {},
    )  # fmt: skip
    log.board.close()

    shrunk = [(e.classifier.weight / b).mean().item() for e, b in zip(model.net.experts, before, strict=True)]
    assert shrunk == pytest.approx([1 - 0.25 * share for share in (1, 0.3, 0.1)], abs=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"group_shares": (0.3,)}, r"group_shares=\(0.3,\): method 'ace' with 3 experts needs 2 of them, descending"),
        ({"group_shares": (0.3, 0.6)}, "needs 2 of them, descending, between 0 and 1"),
        ({"method": "sade"}, "method 'sade' with 3 experts needs 0 of them"),
        ({"retrain_epochs": 5}, "retrain_epochs=5: method 'ace' has class groups"),
        ({"classifier": "cosine"}, "classifier='cosine': has no lengths to scale by"),
    ],
)
def test_impossible_groups_are_refused(fields, message):
    """By field and value, with what is possible."""
    with pytest.raises(RecipeError, match=message):
        dataclasses.replace(ACE, **fields)
