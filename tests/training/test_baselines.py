"""The formulas of the baselines, against golden values, hand-worked cases and plain references."""

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.training.test_losses import COUNTS, EXACT, LABELS, golden_logits
from training.average import WeightAverage
from training.data.samplers import class_aware, class_balanced, shuffled
from training.data.sets import DataError, Images
from training.evaluate import macs_of
from training.loop import judged_in
from training.methods import bbn, lfme, m2m, oltr, ride, single
from training.methods.decoupled import (
    NearestMeanClassifier,
    ScaledClassifier,
    class_mean_accuracy,
    class_means,
    features_of,
    fit_nearest_means,
    fit_tau_norm,
    logits_of,
    tau_normalised,
)
from training.methods.individual import IndividualLoss
from training.methods.losses import effective_number_weights, focal_loss, sigmoid_focal_loss
from training.methods.method import Model, build_model, scheduled_lr
from training.models.classifiers import LinearClassifier
from training.models.multi_expert import Expert, MultiExpertNet, Outputs, Trunk
from training.optimiser import parameter_groups
from training.recipe import RecipeError
from training.recipes import RECIPES

MEAN_STD = ((0.5,) * 3, (0.25,) * 3)


def tiny(name, **fields):
    """A recipe on 8x8 images."""
    return dataclasses.replace(RECIPES[name], image_size=8, compile=False, **fields)


def noise(count, seed=0, size=8):
    """(count, size, size, 3), uint8."""
    return torch.randint(
        0, 256, (count, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def net_of_features(classifier):
    """A net of one expert whose features are the first numbers of the image, unscaled."""
    width = classifier.in_features

    class First(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :width]

    return MultiExpertNet(Trunk(nn.Identity(), (0.0,) * 3, (1 / 255,) * 3), [Expert(First(), classifier)])


def test_focal_loss_has_its_golden_value():
    """Gamma 1 on the first expert; gamma 0 is cross-entropy."""
    logits = golden_logits()[0]

    assert focal_loss(logits, LABELS, 1.0).item() == pytest.approx(7.546944, **EXACT)
    assert focal_loss(logits, LABELS, 0.0).item() == pytest.approx(7.572661, **EXACT)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_an_image_that_is_certain_gives_the_focal_loss_no_gradient(gamma):
    """Its cross-entropy is exactly 0 in fp32, where a power below 1 has an infinite slope."""
    logits = torch.tensor([[200.0, 0.0], [1.0, 0.0]], requires_grad=True)
    focal_loss(logits, torch.tensor([0, 0]), gamma).backward()

    assert logits.grad[0].tolist() == [0, 0]
    assert logits.grad[1].isfinite().all()
    assert logits.grad[1, 0] < 0


def test_the_focal_factor_has_a_gradient_too():
    """By hand at p = 3/4, γ = 2: d/dp of (1 − p)²·(−log p) times dp/dz = p(1 − p)."""
    logits = torch.tensor([[math.log(3.0), 0.0]], requires_grad=True)
    focal_loss(logits, torch.tensor([0]), 2.0).backward()

    slope = (2 * 0.25 * math.log(0.75) - 0.25**2 / 0.75) * 0.75 * 0.25
    assert logits.grad[0].tolist() == pytest.approx([slope, -slope], rel=1e-5)


def test_class_balanced_focal_loss_weighs_images_but_not_their_probability():
    """By hand: p = 3/4 and 1/2 with weights 1 and 3."""
    logits = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])
    each = [0.25**2 * math.log(4 / 3), 0.5**2 * math.log(2.0)]

    loss = focal_loss(logits, torch.tensor([0, 1]), 2.0, torch.tensor([1.0, 3.0]))

    assert loss.item() == pytest.approx((each[0] + 3 * each[1]) / 2, rel=1e-6)


def test_the_sigmoid_focal_loss_asks_for_each_class_by_itself():
    """
    By hand, γ = 2: probabilities 3/4 and 1/2 of the true class and 1/4 and 1/2 of the other, weights 1 and 3.

    γ = 0 is the binary cross-entropy, and far from 0 nothing overflows.
    """
    logits, labels = torch.tensor([[math.log(3.0), -math.log(3.0)], [0.0, 0.0]]), torch.tensor([0, 1])
    each = [2 * 0.25**2 * math.log(4 / 3), 2 * 0.5**2 * math.log(2.0)]

    loss = sigmoid_focal_loss(logits, labels, 2.0, torch.tensor([1.0, 3.0]))
    assert loss.item() == pytest.approx((each[0] + 3 * each[1]) / 2, rel=1e-6)

    golden = golden_logits()[0]
    plain = F.binary_cross_entropy_with_logits(golden, F.one_hot(LABELS, 100).to(golden.dtype), reduction="sum")
    assert sigmoid_focal_loss(golden, LABELS, 0.0).item() == pytest.approx(plain.item() / len(LABELS), **EXACT)
    far = torch.tensor([[500.0, 500.0]], requires_grad=True)
    sigmoid_focal_loss(far, torch.tensor([0]), 0.5).backward()
    assert far.grad[0].tolist() == [0, 1]


def test_the_cb_focal_recipe_is_that_of_the_published_row():
    """Sigmoid focal loss with β = 0.9 from the first epoch, and a bias at which each class has 1/C."""
    logits = golden_logits()[0]
    weighted, plain = (
        IndividualLoss(RECIPES[name].loss, RECIPES[name], COUNTS)(logits, LABELS, 0).item()
        for name in ("cb-focal-cifar100", "focal-cifar100")
    )
    model, _ = single.build(tiny("cb-focal-cifar100"), COUNTS, *MEAN_STD)

    weights = effective_number_weights(COUNTS, 0.9).double()
    assert weighted == pytest.approx(sigmoid_focal_loss(logits, LABELS, 1.0, weights).item(), **EXACT)
    assert torch.sigmoid(model.net.experts[0].classifier.bias).tolist() == pytest.approx([0.01] * 100)
    assert plain == pytest.approx(7.546944, **EXACT)


def test_balanced_softmax_and_logit_adjustment_at_tau_1_are_the_same_loss():
    """Cross-entropy after the log of the class frequencies was added."""
    logits = golden_logits()[0]
    expected = F.cross_entropy(logits + torch.tensor(COUNTS).double().log(), LABELS).item()

    for name in ("balanced-softmax-cifar100", "logit-adjustment-cifar100"):
        recipe = RECIPES[name]
        found = IndividualLoss(recipe.loss, recipe, COUNTS)(logits, LABELS, 0).item()
        assert found == pytest.approx(expected, rel=1e-6)
    doubled = dataclasses.replace(RECIPES["logit-adjustment-cifar100"], logit_tau=2.0)  # of which the other takes none
    assert IndividualLoss("balanced_softmax", doubled, COUNTS)(logits, LABELS, 0).item() == pytest.approx(expected)


def test_tau_0_leaves_the_weights_and_tau_1_makes_them_unit_vectors():
    """And what lies between scales by the length to the power 1 − τ."""
    weight = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 6).unsqueeze(1)

    assert torch.equal(tau_normalised(weight, 0), weight)
    assert tau_normalised(weight, 1).norm(dim=1).tolist() == pytest.approx([1] * 5)
    lengths = tau_normalised(weight, 0.3).norm(dim=1)
    assert torch.allclose(lengths, weight.norm(dim=1) ** 0.7)


def test_tau_is_what_is_best_on_held_out_images():
    """The frequent class has long weights: equal votes need τ = 1 or about it. The bias goes."""
    classifier = LinearClassifier(2, 2)
    classifier.weight.data, classifier.bias.data = torch.tensor([[100.0, 0.0], [0.0, 1.0]]), torch.tensor([3.0, -3.0])
    features = torch.tensor([[9.0, 10.0], [10.0, 9.0], [8.0, 9.0], [12.0, 11.0]])
    pixels = torch.zeros(4, 1, 1, 3)
    pixels[:, 0, 0, :2] = features
    heldout = Images(pixels, torch.tensor([1, 0, 1, 0]))
    net = net_of_features(classifier)

    with torch.no_grad():
        found = fit_tau_norm(net, None, heldout, heldout)

    assert found["heldout_accuracy"] == {"0": 100.0}
    assert found["tau"] == {"0": 1.0}
    assert classifier.weight.norm(dim=1).tolist() == pytest.approx([1, 1])
    assert classifier.bias.tolist() == [0, 0]


def test_tau_may_exceed_1():
    """Lengths 100 and 1, by hand: right where 100^(1 − τ) lies between 4/50 and 3/20, which τ = 1.5 alone does."""
    classifier = LinearClassifier(2, 2)
    classifier.weight.data = torch.tensor([[100.0, 0.0], [0.0, 1.0]])
    pixels = torch.zeros(2, 1, 1, 3)
    pixels[:, 0, 0, :2] = torch.tensor([[50.0, 4.0], [20.0, 3.0]])
    heldout = Images(pixels, torch.tensor([0, 1]))

    with torch.no_grad():
        assert fit_tau_norm(net_of_features(classifier), None, heldout, heldout)["tau"] == {"0": 1.5}


def test_a_tau_of_the_recipe_is_taken_as_it_is():
    """Whatever held-out images would prefer."""
    classifier = LinearClassifier(2, 2)
    classifier.weight.data = torch.tensor([[100.0, 0.0], [0.0, 1.0]])
    heldout = Images(torch.ones(2, 1, 1, 3), torch.tensor([0, 1]))

    with torch.no_grad():
        assert fit_tau_norm(net_of_features(classifier), 0.5, heldout, heldout)["tau"] == {"0": 0.5}
    assert classifier.weight.norm(dim=1).tolist() == pytest.approx([10, 1])


@pytest.mark.parametrize("kind", ["un", "l2n", "cl2n"])
def test_the_nearest_mean_classifier_finds_the_nearest_mean(kind):
    """The linear logits choose the class that a brute-force search over distances chooses."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60).sqrt().long() % 5  # of unequal sizes
    features = torch.randn(60, 4, generator=generator) + 2 * F.one_hot(labels, 5)[:, :4] + 1
    asked = 2 * torch.randn(200, 4, generator=generator)
    centre = features.mean(dim=0) if kind == "cl2n" else torch.zeros(4)

    def transformed(each):
        return each - centre if kind == "un" else (each - centre) / (each - centre).norm(dim=1, keepdim=True)

    means = torch.stack([transformed(features)[labels == c].mean(dim=0) for c in range(5)])
    nearest = [min(range(5), key=lambda c: float((g - means[c]).square().sum())) for g in transformed(asked)]
    classifier = NearestMeanClassifier(4, 5)
    with torch.no_grad():
        classifier.fit(features, labels, kind)

        assert classifier(asked).argmax(dim=1).tolist() == nearest


def test_the_kind_of_features_is_what_is_best_on_held_out_images():
    """Classes differ in direction, images in length, and one class was seen long, the other short."""
    directions = torch.tensor([[1.0, 0.2], [0.2, 1.0]])
    labels = torch.arange(20) % 2
    lengths = torch.linspace(1, 30, 20).unsqueeze(1)
    lengths[:6] = torch.tensor([20.0, 2.0] * 3).unsqueeze(1)
    pixels = torch.zeros(20, 1, 1, 3)
    pixels[:, 0, 0, :2] = directions[labels] * lengths
    train = Images(pixels[:6], labels[:6])
    classifier = NearestMeanClassifier(2, 2)

    with torch.no_grad():
        found = fit_nearest_means(net_of_features(classifier), "best", train, Images(pixels[6:], labels[6:]))

    assert found["features"] == {"0": "l2n"}
    assert found["heldout_accuracy"] == {"0": 100.0}
    assert bool(classifier.unit_length)
    assert not classifier.centre.any()
    with torch.no_grad():  # unless the recipe names one
        fit_nearest_means(net_of_features(classifier), "un", train, Images(pixels[6:], labels[6:]))
    assert not classifier.unit_length


def test_features_are_centred_where_that_is_best():
    """Four classes in the directions of the diagonals, far from the origin, two of them seen long, two short."""
    directions = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]])
    labels = torch.arange(8) % 4
    pixels = torch.zeros(8, 1, 1, 3)
    pixels[:4, 0, 0, :2] = 100 + directions * torch.tensor([[20.0], [2.0], [20.0], [2.0]])
    pixels[4:, 0, 0, :2] = 100 + directions * torch.tensor([[5.0], [9.0], [5.0], [9.0]])
    classifier = NearestMeanClassifier(2, 4)
    train, heldout = (Images(pixels[rows], labels[rows]) for rows in (slice(4), slice(4, 8)))

    with torch.no_grad():
        found = fit_nearest_means(net_of_features(classifier), "best", train, heldout)

    assert (found["features"], found["heldout_accuracy"]) == ({"0": "cl2n"}, {"0": 100.0})
    assert classifier.centre.tolist() == [100, 100]


def test_crt_retrains_by_a_schedule_of_its_own():
    """Class-aware draws in batches of 512, 0.2 along a cosine over 30 epochs, whatever the first stage had."""
    recipe = dataclasses.replace(RECIPES["crt-cifar100"], weight_decay=1e-4)
    _, (first, second) = single.build(recipe, COUNTS, *MEAN_STD)

    assert (first.sampler, first.batch_size, first.weight_decay) == (shuffled, 128, 1e-4)
    assert (second.sampler, second.batch_size, second.weight_decay) == (class_aware, 512, 5e-4)
    assert [second.lr(epoch) for epoch in (0, 10, 15, 20)] == pytest.approx([0.2, 0.15, 0.1, 0.05])


def test_lws_trains_only_the_scales_and_starts_from_the_classifier():
    """s = 1 changes nothing; the bias is scaled too."""
    linear = LinearClassifier(3, 2)
    nn.init.normal_(linear.bias)
    scaled, features = ScaledClassifier(linear), torch.randn(4, 3)

    assert torch.equal(scaled(features), linear(features))
    scaled.scales[0].data = torch.tensor([2.0, 0.5])
    assert torch.allclose(scaled(features), linear(features) * torch.tensor([2.0, 0.5]))
    model, stages = single.build(RECIPES["lws-cifar100"], COUNTS, *MEAN_STD)
    stages[1].arrange()
    (trained,) = stages[1].part.parameters()
    assert trained is model.net.experts[0].classifier.scales[0]


def test_class_means_are_those_of_their_images():
    """In any order of the images."""
    features, labels = (
        torch.randn(7, 3, generator=torch.Generator().manual_seed(0)),
        torch.tensor([2, 0, 1, 0, 2, 2, 1]),
    )

    means = class_means(features, labels, 3)
    torch.testing.assert_close(means, torch.stack([features[labels == c].mean(dim=0) for c in range(3)]))


def test_features_of_all_images_come_batch_by_batch(monkeypatch):
    """In their order, of every expert, as from one batch of all."""
    recipe = dataclasses.replace(RECIPES["ride-cifar100"], image_size=8, backbone="resnet20_cifar")
    net = build_model(recipe, 3, (0.5,) * 3, (0.25,) * 3).net.eval()
    images = Images(torch.randint(0, 256, (5, 8, 8, 3), dtype=torch.uint8), torch.zeros(5, dtype=torch.long))
    monkeypatch.setattr("training.methods.decoupled.FEATURE_BATCH", 2)
    with torch.no_grad():
        logits, features, whole = logits_of(net, images), features_of(net, images), net(images.pixels)

    torch.testing.assert_close(logits, whole.expert_logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(features, whole.expert_features, atol=1e-4, rtol=1e-4)


def test_the_accuracy_that_choices_are_made_by_is_the_mean_over_classes():
    """Nine of ten right in one class, none of one in the other; a class without images does not count."""
    logits = torch.zeros(11, 3)
    logits[:9, 0], logits[9:, 2] = 1, 1

    assert class_mean_accuracy(logits, torch.tensor([0] * 10 + [1])) == pytest.approx(45)


def test_bbn_moves_from_the_uniform_to_the_reversed_branch():
    """α = 1 − (e/200)²."""
    assert [bbn.uniform_share(epoch, 200) for epoch in (0, 100, 199)] == pytest.approx([1, 0.75, 1 - 0.995**2])


def test_bbn_mixes_features_and_losses_by_alpha():
    """Against a direct computation on random features: 2α and 2(1 − α), and both cross-entropies of the same logits."""
    generator = torch.Generator().manual_seed(0)
    features, classifier = torch.randn(1, 3, 8, generator=generator), LinearClassifier(8, 4)
    labels = torch.tensor([0, 1, 2, 3, 3, 2])

    def network(images):
        return bbn.Outputs(torch.zeros(1, 3, 4), features)

    outputs, losses = bbn.step(classifier, 200, network, torch.zeros(6), labels, 100, generator)

    mixed = torch.cat([1.5 * features[0, :, :4], 0.5 * features[0, :, 4:]], dim=1)
    logits = mixed @ classifier.weight.T + classifier.bias
    expected = 0.75 * F.cross_entropy(logits, labels[:3]) + 0.25 * F.cross_entropy(logits, labels[3:])
    assert losses["loss"].item() == pytest.approx(expected.item(), rel=1e-6)
    assert outputs.expert_logits.shape == (1, 6, 4)
    assert torch.allclose(outputs.expert_logits[0, 3:], logits)


def test_bbn_branches_see_their_own_half_in_training_and_every_image_in_evaluation():
    """The second half does not reach the conventional branch's batch norms, nor the first half the other's."""
    torch.manual_seed(0)
    model, _ = bbn.build(tiny("bbn-cifar100"), [9, 5, 2], *MEAN_STD)
    images = noise(8)
    other = torch.cat([images[:4], noise(4, seed=1)])
    model.eval()
    with torch.no_grad():
        assert model.net(images).expert_features.shape == (1, 8, 128)
        model.net.experts[0].layers.train()
        for module in model.net.experts[0].layers.shared.modules():
            module.eval()
        first, second = (model.net(each).expert_features[0] for each in (images, other))
    assert first.shape == (4, 128)
    assert torch.equal(first[:, :64], second[:, :64])
    assert not torch.allclose(first[:, 64:], second[:, 64:])


def test_bbn_passes_one_half_after_the_other_through_the_shared_layers():
    """Their features are those of two batches that come one after the other, and so is what their norms have seen."""
    torch.manual_seed(0)
    model, _ = bbn.build(tiny("bbn-cifar100"), [9, 5, 2], *MEAN_STD)
    shared = nn.Sequential(model.net.trunk, model.net.experts[0].layers.shared)
    plain = copy.deepcopy(shared)
    for module in plain.modules():
        if isinstance(module, bbn.HalvesBatchNorm2d):
            module.__class__ = nn.BatchNorm2d
    uniform, rare = noise(4), noise(4, seed=1) / 3

    together, apart = shared(torch.cat([uniform, rare])), torch.cat([plain(uniform), plain(rare)])

    norms = [module for module in shared.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert all(type(norm) is bbn.HalvesBatchNorm2d for norm in norms)
    assert torch.allclose(together, apart, atol=1e-5)
    for one, other in zip(shared.buffers(), plain.buffers(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    assert torch.equal(shared.eval()(uniform), shared(torch.cat([uniform, rare]))[:4])


@pytest.mark.parametrize("backbone", ["resnet32_cifar", "resnet10"])
def test_bbn_branches_begin_apart(backbone):
    """The re-balancing block is no copy of the other; weights are as wide, and its batch norms begin as theirs do."""
    recipe = dataclasses.replace(tiny("bbn-cifar100"), backbone=backbone)
    layers = bbn.build(recipe, [9, 5, 2], *MEAN_STD)[0].net.experts[0].layers

    for name in ("conv1", "conv2"):
        one, other = getattr(layers.conventional, name).weight, getattr(layers.rebalancing, name).weight
        assert not torch.isclose(one, other).all(dim=(1, 2, 3)).any()
        assert one.std().item() == pytest.approx(other.std().item(), rel=0.1)
    for name in ("bn1", "bn2"):
        one, other = getattr(layers.conventional, name).state_dict(), getattr(layers.rebalancing, name).state_dict()
        assert all(one[key].equal(other[key]) for key in one)


def test_a_bbn_step_takes_a_batch_from_either_sampler():
    """128 images of each; the loss weighs them by the epoch of the recipe's 200."""
    _, (stage,) = bbn.build(RECIPES["bbn-cifar100"], [200, 50], *MEAN_STD)
    labels = torch.repeat_interleave(torch.arange(2), torch.tensor([200, 50]))
    first = stage.sampler(labels, torch.Generator().manual_seed(0))[: stage.batch_size]
    seen = Outputs(torch.zeros(1, 128, 2), torch.randn(1, 128, 128, generator=torch.Generator().manual_seed(0)))
    _, losses = stage.step(lambda images: seen, torch.zeros(256), labels[first], 100, torch.Generator())

    assert (stage.batch_size, stage.nesterov, len(first[:128].unique())) == (256, True, 128)
    assert labels[first[:128]].float().mean().item() == pytest.approx(0.2, abs=0.08)
    assert labels[first[128:]].float().mean().item() == pytest.approx(0.8, abs=0.12)
    assert losses["loss"].item() == pytest.approx((0.75 * losses["uniform"] + 0.25 * losses["reversed"]).item())


def test_bbn_doubles_the_last_block_of_resnet_50():
    """Two bottlenecks of 2048 after all others, of which the last stage keeps two; the classifier sees both."""
    with torch.device("meta"):
        expert = bbn.build(RECIPES["bbn-inaturalist-r50"], [9, 5, 2], *MEAN_STD)[0].net.experts[0]

    layers = expert.layers
    assert (len(layers.shared[0]), len(layers.shared)) == (6, 3)
    for branch in (layers.conventional, layers.rebalancing):
        assert (branch.conv1.weight.shape, branch.downsample) == ((512, 2048, 1, 1), None)
    assert expert.classifier.in_features == 4096


def test_bbn_costs_what_its_paper_says():
    """One more block than ResNet-32, 128 features: 74.2 M; the published 74.3 comes from another tool."""
    model, _ = bbn.build(RECIPES["bbn-cifar100"], [1] * 100, *MEAN_STD)
    trunk, experts, _ = macs_of(model, 32)

    assert (trunk + sum(experts)) / 1e6 == pytest.approx(74.2, abs=0.05)


def test_the_bbn_recipe_warms_up_from_a_third_and_drops_at_120_and_160():
    """As in the authors' configuration."""
    recipe = RECIPES["bbn-cifar100"]
    rates = [scheduled_lr(recipe, epoch) for epoch in (0, 1, 4, 5, 119, 120, 160)]

    assert rates == pytest.approx([0.1 / 3, 0.14 / 3, 0.26 / 3, 0.1, 0.1, 1e-3, 1e-5])


@pytest.mark.parametrize(("accuracy", "weight"), [(0, 1), (14.9, 1), (15.1, 0.9971428), (32.5, 0.5), (50, 0), (60, 0)])
def test_a_teacher_falls_silent_as_the_student_catches_up(accuracy, weight):
    """Teacher at 50 %, threshold 0.3: full weight below 15 %, then linear to 0 at 50 %."""
    assert lfme.teacher_weight(accuracy, 50, 0.3) == pytest.approx(weight)


def test_a_teacher_that_is_never_right_weighs_nothing():
    """Instead of dividing by 0."""
    assert lfme.teacher_weight(0, 0, 0.3) == 0


def test_hard_images_enter_slowly():
    """From the teacher's confidence to 1 at half of the epochs, and no further."""
    confidence = torch.tensor([0.1, 0.6])

    weights = [lfme.curriculum_weights(confidence, epoch, 90).tolist() for epoch in (0, 9, 45, 89)]
    assert weights == [pytest.approx(each) for each in ([0.1, 0.6], [0.28, 0.68], [1, 1], [1, 1])]


def test_rare_classes_have_their_full_weight_at_once():
    """The least weight of a split is the mean count of the few classes by its own."""
    counts = [150, 120, 50, 10, 5]
    least = lfme.least_weights(counts, lfme.classes_of_splits(counts))

    assert least.tolist() == pytest.approx([7.5 / 135, 7.5 / 135, 7.5 / 50, 1, 1])


def test_an_image_is_as_easy_as_its_class_makes_it():
    """
    On the scale of its class's training images as they are: the hardest has the least weight, the easiest 1.

    The teachers of classes 2 and 3 know nothing else, so that all their images are alike; of the many classes the two
    images of class 0 differ, and one between them, or beyond them, lies on their scale.
    """
    counts = [150, 150, 50, 10]
    logits = torch.tensor([[2.0, 0, 0, 0], [-1.0, 0, 0, 0], [0.0, 0, 0, 0], [9.0, 0, 0, 0], [0.0, 1, 0, 0], [0.0] * 4])
    pixels, labels = logits[:, None, None, :].expand(-1, 1, 3, 4).transpose(2, 3), torch.tensor([0, 0, 1, 2, 3, 3])
    net = net_of_features(LinearClassifier(12, 4))
    net.experts[0].classifier.load_state_dict({"weight": torch.eye(12)[::3], "bias": torch.zeros(4)})
    model = Model(net, None, dict.fromkeys(("many", "medium", "few"), net))
    student = lfme.Student(tiny("lfme-cifar100"), model, counts)
    with torch.no_grad():
        student.prepare(Images(pixels, labels), Images(pixels[:0], labels[:0]), 0)

    confidence = torch.tensor([2.0, -1, 0.5, 9]).sigmoid()
    of_first = student._easiness(confidence, torch.zeros(4, dtype=torch.long))
    least, span = 10 / 150, torch.tensor([2.0, -1]).sigmoid()
    between = least + (1 - least) * ((confidence[2] - span[1]) / (span[0] - span[1])).item()
    assert of_first.tolist() == pytest.approx([1, least, between, 1], rel=1e-4)
    assert student._easiness(torch.ones(2), torch.tensor([2, 3])).tolist() == pytest.approx([0.2, 1])


def test_lfme_distils_each_split_on_its_own_classes():
    """The student's step against a direct computation: scaled logits, slices, temperature 2, teachers' weights."""
    torch.manual_seed(0)
    recipe = tiny("lfme-cifar100")
    model, _ = lfme.build(recipe, [150, 120, 50, 10], *MEAN_STD)
    model.eval()
    student = lfme.Student(recipe, model, [150, 120, 50, 10])
    student.weights = {"many": 0.5, "medium": 1.0, "few": 0.0}
    student.lowest, student.highest = torch.tensor([0.0, 0.1, 1.0, 1.0]), torch.tensor([1.0, 0.9, 1.0, 1.0])
    images, labels = noise(4), torch.tensor([1, 2, 3, 0])

    _, losses = student.step(model.net, images, labels, 25, torch.Generator())

    slices = {"many": [0, 1], "medium": [2], "few": [3]}
    taught = {name: model.teachers[name](images).expert_logits[0][:, classes] for name, classes in slices.items()}
    p_many = torch.softmax(taught["many"], dim=1)
    first, last = ((p_many[0, 1] - 0.1) / 0.8).clamp(0, 1), p_many[3, 0]  # on the scales of classes 1 and 0
    rare = 10 / 135  # the least weight of the many classes; that of the medium one is 0.2, and all its images are alike
    easiness = torch.stack([rare + (1 - rare) * first, torch.tensor(0.2), torch.tensor(1.0), rare + (1 - rare) * last])
    logits = (easiness + (1 - easiness) * 0.25).unsqueeze(1) * model.net(images).expert_logits[0]
    p, q = torch.softmax(taught["many"] / 2, dim=1), torch.softmax(logits[:, :2] / 2, dim=1)
    assert losses["many"].item() == pytest.approx(0.5 * (p * (p / q).log()).sum(dim=1).mean().item(), rel=1e-4)
    assert (losses["medium"].item(), losses["few"].item()) == (0, 0)
    assert losses["cross_entropy"].item() == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert losses["loss"].item() == pytest.approx(losses["cross_entropy"].item() + losses["many"].item(), rel=1e-5)


def test_the_student_is_weighed_on_held_out_images():
    """A student that already does as well as its teachers is left to itself; one that knows nothing is not."""
    torch.manual_seed(0)
    counts = [150, 120, 50, 10]
    recipe = tiny("lfme-cifar100")
    model, _ = lfme.build(recipe, counts, *MEAN_STD)
    classifier = model.teachers["many"].experts[0].classifier
    nn.init.zeros_(classifier.weight)
    classifier.bias.data = torch.tensor([9.0, 0, 0, 0])  # right in one of its two classes
    model.net.experts[0].classifier.load_state_dict(classifier.state_dict())
    student, images = lfme.Student(recipe, model.eval(), counts), Images(noise(4), torch.tensor([0, 1, 2, 3]))

    class OnDisk:
        """What a set too large for the memory has: batches, never all pixels at once."""

        labels, in_order, __len__ = images.labels, images.in_order, lambda _: len(images)

    with torch.no_grad():
        student.prepare(images, OnDisk(), 0)

    assert student.weights == {"many": 0, "medium": 1, "few": 1}


def test_teachers_and_student_are_compared_class_by_class():
    """
    By hand, threshold 0.3; twelve numbers of an image are the student's logits, then the teacher's, of four classes.

    The teacher is right about both of its classes, where those of others do not count; the student, for whom they do,
    about half of one class and all of the other: 1 − 0.75 of the teacher's accuracy, divided by 0.7.
    """
    told = torch.tensor([0, 0, 0, 0, 1, 3])  # what each image is
    said = torch.tensor([0, 0, 1, 2, 1, 2])  # by the student
    numbers = torch.cat([F.one_hot(said, 4), F.one_hot(told, 4), torch.zeros(6, 4)], dim=1).float()
    numbers[:5, 4 + 2] = 9  # a class of which the teacher of 0 and 1 knows nothing
    pixels = numbers.view(6, 3, 1, 4).permute(0, 2, 3, 1)
    nets = [net_of_features(LinearClassifier(12, 4)) for _ in range(4)]
    for net, begin in zip(nets, (0, 4, 4, 4), strict=True):
        net.experts[0].classifier.load_state_dict({"weight": torch.eye(12)[begin : begin + 4], "bias": torch.zeros(4)})
    classes = {"many": [0, 1], "medium": [2], "few": [3]}
    model = Model(nets[0], None, dict(zip(classes, nets[1:], strict=True)))
    student, images = lfme.Student(tiny("lfme-cifar100"), model, [150, 150, 50, 10]), Images(pixels, told)

    with torch.no_grad():
        student.prepare(images, images, 0)

    assert student.weights == {"many": pytest.approx(0.25 / 0.7), "medium": 1, "few": 1}  # none held out of medium


def test_lfme_teachers_see_their_classes_and_the_student_all_alike():
    """
    120 epochs along a cosine, each image of the split once, rarer ones in smaller batches; then the common schedule on
    class-aware draws.
    """
    recipe = dataclasses.replace(RECIPES["lfme-cifar100"], weight_decay=1e-4, batch_size=256)
    _, stages = lfme.build(recipe, [150, 50, 10], *MEAN_STD)
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor([150, 50, 10]))

    for label, stage in enumerate(stages[:3]):
        order = stage.sampler(labels, torch.Generator().manual_seed(0))
        assert torch.equal(order.sort().values, torch.nonzero(labels == label).flatten())
        assert (stage.epochs, stage.weight_decay) == (120, 5e-4)
        assert [stage.lr(epoch) for epoch in (0, 40, 60)] == pytest.approx([0.1, 0.075, 0.05])
    assert [stage.batch_size for stage in stages] == [128, 64, 32, 256]
    assert (stages[3].sampler, stages[3].epochs, stages[3].weight_decay) == (class_aware, 200, 1e-4)
    assert [stages[3].lr(epoch) for epoch in (0, 5, 160)] == pytest.approx([0.02, 0.1, 1e-3])


def test_a_teacher_is_judged_by_its_own_classes_only():
    """Other classes have no part in its loss, and get no gradient."""
    torch.manual_seed(0)
    model, stages = lfme.build(tiny("lfme-cifar100"), [150, 50, 10], *MEAN_STD)
    teacher = model.teachers["medium"].train()

    outputs, losses = stages[1].step(teacher, noise(4), torch.ones(4, dtype=torch.long), 0, torch.Generator())
    losses["loss"].backward()

    assert stages[1].network is teacher
    assert outputs.expert_logits[0].argmax(dim=1).tolist() == [1] * 4
    assert teacher.experts[0].classifier.weight.grad[[0, 2]].abs().max() == 0


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ([90, 50, 10], "no class is many; many is more than 100"),
        ([200, 50, 1], "the few classes have one image in all"),
    ],
)
def test_lfme_needs_images_in_every_split(counts, words):
    """A teacher without images could not be trained, nor could batch norms on one whose features are a single pixel."""
    with pytest.raises(DataError, match=words):
        lfme.build(tiny("lfme-cifar100"), counts, *MEAN_STD)


def test_m2m_takes_seeds_from_more_frequent_classes_only():
    """Images of the largest class stay; seeds have more images than their target, and the stated acceptance."""
    counts = torch.tensor([500, 50, 5])
    labels = torch.tensor([0, 1, 2] * 200)

    chosen = m2m.plan(labels, counts, 0.999, torch.Generator().manual_seed(0))

    targets, seeds = labels[chosen.places], labels[chosen.seeds]
    assert (counts[seeds] > counts[targets]).all()
    expected = 1 - 0.999 ** (counts[seeds] - counts[targets]).double()
    assert torch.allclose(chosen.acceptance, expected)
    stayed = 1 - torch.bincount(targets, minlength=3) / 200
    assert stayed.tolist() == pytest.approx([1, 0.1, 0.01], abs=0.05)
    from_head = (seeds[targets == 2] == 0).double().mean().item()
    head, middle = 1 - 0.999**495, 1 - 0.999**45
    assert from_head == pytest.approx(head / (head + middle), abs=0.05)


def test_m2m_keeps_images_by_the_largest_class_of_all():
    """Not by that of the batch: 5 in 500 of the rare class stay, not 5 in 50."""
    labels = torch.tensor([1, 2] * 300)

    chosen = m2m.plan(labels, torch.tensor([500, 50, 5]), 0.999, torch.Generator().manual_seed(0))

    assert set(labels[chosen.places].tolist()) == {2}  # none could be made of class 1
    assert 1 - len(chosen.places) / 300 == pytest.approx(0.01, abs=0.03)


def test_m2m_without_a_more_frequent_class_in_the_batch_changes_nothing():
    """There is nothing to start from."""
    chosen = m2m.plan(torch.tensor([2, 2]), torch.tensor([500, 50, 5]), 0.999, torch.Generator().manual_seed(0))

    assert len(chosen.places) == len(chosen.seeds) == len(chosen.acceptance) == 0


def test_m2m_accepts_by_the_judge_and_by_chance():
    """Below γ never; at γ and above with the plan's probability."""
    generator = torch.Generator().manual_seed(0)
    judged = torch.tensor([0.89, 0.9, 1.0]).repeat(1000)
    acceptance = torch.tensor([1.0, 1.0, 0.25], dtype=torch.float64).repeat(1000)

    shares = m2m.accepted(judged, acceptance, 0.9, generator).view(1000, 3).double().mean(dim=0)

    assert shares.tolist() == pytest.approx([0, 1, 0.25], abs=0.04)


@pytest.fixture(scope="module")
def two_nets():
    """A model with its generator, in evaluation mode, with three classes."""
    torch.manual_seed(0)
    recipe = tiny("m2m-cifar100")
    model, _ = m2m.build(recipe, [500, 50, 5], *MEAN_STD)
    with torch.no_grad():  # lively running statistics
        model.train()
        for net in (model.net, model.teachers["generator"]):
            for seed in range(10):
                net(noise(64, seed))
    return recipe, model.eval().requires_grad_(False)


def test_generated_images_are_images_nearer_to_their_new_class(two_nets):
    """They lie within the range of pixels, differ from their seeds, and the judge finds their target more likely."""
    recipe, model = two_nets
    judge, seeds, targets = model.teachers["generator"], noise(6, seed=3), torch.tensor([1, 2] * 3)
    before = F.softmax(judge(seeds).expert_logits[0], dim=1)[torch.arange(6), targets]

    made, after = m2m.translate(
        model.net, judge, seeds, torch.zeros(6).long(), targets, recipe, torch.Generator().manual_seed(0)
    )

    assert made.min() >= 0
    assert made.max() <= 255
    moved = ((made - seeds) / 255).flatten(1).norm(dim=1)
    assert moved.min() > 0.1
    assert moved.max() <= recipe.m2m_noise + recipe.m2m_steps * recipe.m2m_step_size + 1e-4
    assert (after > before).all()
    assert torch.allclose(after, F.softmax(judge(made).expert_logits[0], dim=1)[torch.arange(6), targets])


def test_the_trained_networks_logit_of_the_old_class_is_lowered(two_nets):
    """With a large λ more so than without."""
    recipe, model = two_nets
    seeds, targets = noise(6, seed=3), torch.ones(6).long()

    def left(weight):
        made, _ = m2m.translate(
            model.net, model.teachers["generator"], seeds, torch.zeros(6).long(), targets,
            dataclasses.replace(recipe, m2m_lambda=weight), torch.Generator().manual_seed(0),
        )  # fmt: skip
        return model.net(made).expert_logits[0][:, 0].mean().item()

    assert left(300.0) < left(0.0) - 0.1


def test_that_logit_counts_as_the_network_gives_it_before_the_loss_scales_it(two_nets):
    """λ = 30 and a classifier that scales by 30, or λ = 1 and one that does not: the same images."""
    recipe, model = two_nets
    seeds, targets = noise(6, seed=3), torch.ones(6).long()

    def made(weight, classifier):
        other = dataclasses.replace(recipe, loss="ce", classifier=classifier, m2m_lambda=weight)
        arguments = model.net, model.teachers["generator"], seeds, torch.zeros(6).long(), targets, other
        return m2m.translate(*arguments, torch.Generator().manual_seed(0))[0]

    assert recipe.cosine_scale == 30
    torch.testing.assert_close(made(30.0, "cosine"), made(1.0, "linear"))


def test_one_step_of_translation_is_a_step_down_each_images_own_slope():
    """By hand with linear networks: the judge's softmax minus target, plus λ times the other's row, at unit length."""
    judge, trained = (net_of_features(LinearClassifier(3, 3)) for _ in range(2))
    rows = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(0)) / 100
    for net, weight in zip((judge, trained), rows, strict=True):
        net.experts[0].classifier.load_state_dict({"weight": weight, "bias": torch.zeros(3)})
    recipe = tiny("m2m-cifar100", loss="ce", classifier="linear", m2m_steps=1, m2m_noise=0.0)
    images = torch.tensor([[100.0, 120.0, 140.0], [30.0, 0.0, 255.0]]).view(2, 1, 1, 3)

    made, _ = m2m.translate(
        trained, judge, images, torch.tensor([0, 1]), torch.tensor([1, 2]), recipe, torch.Generator()
    )

    for image, old, new, found in zip(images.flatten(1), (0, 1), (1, 2), made.flatten(1), strict=True):
        slope = (torch.softmax(rows[0] @ image, dim=0) - F.one_hot(torch.tensor(new), 3)) @ rows[0] + 0.5 * rows[1][old]
        expected = (image / 255 - 0.1 * slope / slope.norm()).clamp(0, 1)
        assert found.tolist() == pytest.approx((255 * expected).tolist(), abs=1e-2)


def test_translation_starts_from_noise_of_limited_length(two_nets):
    """Of length ½, half of it upwards, before steps that are too short to matter."""
    recipe, model = two_nets
    grey = torch.full((20, 8, 8, 3), 128)
    arguments = model.net, model.teachers["generator"], grey, torch.zeros(20).long(), torch.ones(20).long()
    made, _ = m2m.translate(
        *arguments, dataclasses.replace(recipe, m2m_step_size=1e-6), torch.Generator().manual_seed(0)
    )
    noises = ((made - 128) / 255).flatten(1)

    assert noises.norm(dim=1).tolist() == pytest.approx([0.5] * 20, rel=1e-3)
    assert (noises > 0).float().mean().item() == pytest.approx(0.5, abs=0.05)


def test_m2m_trains_on_the_batch_with_its_accepted_translations(two_nets):
    """
    Those that plan, translation and chance give for the same draws; the network translates in evaluation mode and
    learns in training mode; the loss is that of the epoch counted from the first stage's beginning.
    """
    recipe, model = two_nets
    recipe = dataclasses.replace(recipe, m2m_gamma=0.0, m2m_lambda=300.0, deferred_from=0.8)
    counts, labels, images = torch.tensor([500, 50, 5]), torch.tensor([0, 1, 2, 0, 0, 1, 2, 2]), noise(8, seed=5)
    judge, loss = model.teachers["generator"], m2m.SingleLoss(recipe, counts.tolist())
    draws = torch.Generator().manual_seed(0)
    chosen = m2m.plan(labels, counts, recipe.m2m_beta, draws)
    made, _ = m2m.translate(
        model.net.eval(), judge, images[chosen.seeds], labels[chosen.seeds], labels[chosen.places], recipe, draws
    )
    lucky = m2m.accepted(torch.ones(len(made)), chosen.acceptance, 0.0, draws)
    expected = images.float()
    expected[chosen.places[lucky]] = made[lucky]
    said = Outputs(torch.randn(1, 8, 3), torch.zeros(1, 8, 64))
    shown = []

    def network(batch):
        shown.append((batch, model.net.training))
        return said

    model.net.train()
    _, losses = m2m.step(
        recipe, model, judge, counts, loss, 160, network, images, labels, 0, torch.Generator().manual_seed(0)
    )
    model.eval()

    torch.testing.assert_close(shown[0][0], expected)
    assert shown[0][1]
    torch.testing.assert_close(losses["loss"], loss(said, labels, 160)["loss"])
    assert losses["loss"] != loss(said, labels, 0)["loss"]


def test_m2m_replaces_accepted_images_and_keeps_all_labels(two_nets):
    """With γ = 0 all that chance allows, with an impossible γ none; the share is logged."""
    recipe, model = two_nets
    counts, labels = torch.tensor([500, 50, 5]), torch.tensor([0, 1, 2, 0, 0, 1, 2, 2])
    images = noise(8, seed=5)
    loss = m2m.SingleLoss(recipe, counts.tolist())
    shown = []

    def network(batch):
        shown.append(batch)
        return model.net(batch)

    for gamma, changed in ((0.0, True), (1.0, False)):
        _, losses = m2m.step(
            dataclasses.replace(recipe, m2m_gamma=gamma), model, model.teachers["generator"], counts, loss, 160,
            network, images, labels, 0, torch.Generator().manual_seed(0),
        )  # fmt: skip
        different = (shown[-1] != images).flatten(1).any(dim=1)
        assert losses["generated"].item() == pytest.approx(different.float().mean().item())
        assert different.any() == changed
        assert not different[labels == 0].any()
        assert images.dtype == torch.uint8
    model.eval()


def test_the_schedule_of_m2m_goes_on_where_translation_begins():
    """Two stages of one schedule: 160 epochs and 40."""
    _, stages = m2m.build(RECIPES["m2m-cifar100"], [500, 50, 5], *MEAN_STD)

    assert [(stage.name, stage.epochs) for stage in stages] == [
        ("generator", 200), ("experts", 160), ("translated", 40)
    ]  # fmt: skip
    assert [stages[1].lr(159), stages[2].lr(0), stages[2].lr(20)] == pytest.approx([0.1, 1e-3, 1e-5])
    assert [stage.sampler for stage in stages] == [shuffled, shuffled, class_balanced]


def test_the_generator_of_m2m_learns_by_plain_cross_entropy():
    """To the last epoch, whatever the model's own loss and weights are."""
    recipe = dataclasses.replace(RECIPES["m2m-cifar100"], deferred_from=0.8)
    _, stages = m2m.build(recipe, COUNTS, *MEAN_STD)
    logits = golden_logits()[:1]

    found = stages[0].losses(Outputs(logits, logits), LABELS, 199)["loss"].item()

    assert found == pytest.approx(7.572661, **EXACT)


@pytest.fixture(scope="module")
def memory_model():
    """OLTR's model with attention and memory in place, both filled with numbers; and its stages."""
    torch.manual_seed(0)
    model, stages = oltr.build(tiny("oltr-cifar100"), [9, 5, 2], *MEAN_STD)
    stages[1].arrange()
    for _, parameter in model.net.experts[0].classifier.named_parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval(), stages


def test_oltr_enriches_features_by_its_memory(memory_model):
    """Against a loop over images with the paper's formula and the code's squashed cosine."""
    classifier = memory_model[0].net.experts[0].classifier
    features = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).abs()
    centroids = classifier.memory.centroids
    expected = []
    for f in features:
        shares = torch.softmax(classifier.concepts.weight @ f + classifier.concepts.bias, dim=0)
        selector = torch.tanh(classifier.selector.weight @ f + classifier.selector.bias)
        reach = 10 / min((f - centroid).norm() for centroid in centroids)
        v = reach * (f + selector * (shares @ centroids))
        squashed = v.norm() / (1 + v.norm()) * v / v.norm()
        expected.append(torch.stack([16 * squashed @ w / w.norm() for w in classifier.cosine.weight]))

    assert torch.allclose(classifier(features), torch.stack(expected), atol=1e-4)


def test_the_centroid_loss_draws_to_the_own_centroid_and_pushes_from_others():
    """By hand: two classes at distance 2 and 3 from features on the axes."""
    memory = oltr.Memory(2, 2)
    memory.centroids.data = torch.tensor([[0.0, 0.0], [4.0, 0.0]])
    features, labels = torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 1])
    attract = (1 + 4) / 2 / 2
    repel = 10 - (9 + 4) / (2 * 2)

    loss = oltr.centroid_loss(memory, features, labels, weight=0.5, margin=10, repel_weight=0.01)

    assert loss.item() == pytest.approx(0.5 * (attract + 0.01 * repel))
    near = oltr.centroid_loss(memory, features, labels, weight=0.5, margin=3, repel_weight=0.01)
    assert near.item() == pytest.approx(0.5 * attract)


@pytest.mark.parametrize("repel_weight", [0.0, 0.01])
def test_centroids_follow_their_images_as_in_the_authors_code(repel_weight):
    """
    Σ (M − f) / (1 + n) / B, whatever the weight, which only what repels has; a class without images stays.

    The features' own slope is that of the loss.
    """
    torch.manual_seed(0)
    memory = oltr.Memory(3, 4)
    nn.init.normal_(memory.centroids)
    features, labels = torch.randn(5, 3, requires_grad=True), torch.tensor([0, 0, 0, 1, 2])

    loss = oltr.centroid_loss(memory, features, labels, weight=0.1, margin=100, repel_weight=repel_weight)
    slopes = torch.autograd.grad(loss, [memory.centroids, features], retain_graph=True)

    own = memory.centroids.detach()[labels]
    expected = torch.zeros(4, 3).index_add(0, labels, own - features.detach()) / 5
    expected /= 1 + torch.tensor([[3.0], [1], [1], [0]])
    away = torch.zeros(5, 3)
    for b, f in enumerate(features.detach()):
        for c, m in enumerate(memory.centroids.detach()):
            if c != labels[b]:
                expected[c] -= 0.1 * repel_weight * 2 * (m - f) / 20
                away[b] -= 0.1 * repel_weight * 2 * (f - m) / 20
    torch.testing.assert_close(slopes[0], expected)
    torch.testing.assert_close(slopes[1], 0.1 * (features.detach() - own) / 5 + away)


def test_centroids_learn_from_their_own_loss_alone(memory_model):
    """The classification does not reach them."""
    model, stages = memory_model
    outputs = model.net(noise(4))
    losses = stages[2].losses(outputs, torch.tensor([0, 1, 2, 0]), 0)
    centroids = model.net.experts[0].classifier.memory.centroids

    (slope,) = torch.autograd.grad(losses["cross_entropy"], centroids, retain_graph=True, allow_unused=True)
    assert slope is None
    (slope,) = torch.autograd.grad(losses["centroid"], centroids)
    assert slope.abs().max() > 0


def test_the_centroid_loss_enters_with_its_weight_and_moves_features(memory_model):
    """A hundredth of it, with margin 10 and a hundredth of what repels; its slope at the features is its own."""
    model, stages = memory_model
    labels, memory = torch.tensor([0, 1, 2, 0]), model.net.experts[0].classifier.memory
    features = (torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(0)) / 10).requires_grad_()  # within reach
    logits = torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(1))

    losses = stages[2].losses(Outputs(logits, features), labels, 0)

    own = oltr.centroid_loss(memory, features[0], labels, weight=0.01, margin=10, repel_weight=0.01)
    assert losses["centroid"].item() == pytest.approx(own.item())
    assert losses["loss"].item() == pytest.approx(F.cross_entropy(logits[0], labels).item() + own.item())
    torch.testing.assert_close(
        *(torch.autograd.grad(each, features, retain_graph=True)[0] for each in (losses["loss"], own))
    )


def test_attention_weighs_places():
    """Against a direct computation, from the beginning; the places' weights sum to 1."""
    torch.manual_seed(0)
    attention, x = oltr.ModulatedAttention(4, 6), torch.randn(2, 4, 2, 3)
    flat = x.flatten(2)
    value, query, key = (
        torch.einsum("oc,bcp->bop", layer.weight[:, :, 0, 0], flat) + layer.bias[:, None]
        for layer in (attention.value, attention.query, attention.key)
    )
    weights = torch.softmax(torch.einsum("bop,boq->bpq", query, key), dim=2)
    mask = torch.einsum("co,bop->bcp", attention.out.weight[:, :, 0, 0], torch.einsum("bpq,boq->bop", weights, value))
    places = torch.softmax(x.flatten(1) @ attention.spatial.weight.T + attention.spatial.bias, dim=1)
    assert torch.allclose(attention(x).flatten(2), flat + places.unsqueeze(1) * mask, atol=1e-5)


def test_the_memory_is_filled_with_class_means():
    """Of the features of stage 1, with the attention on; W_h is the first stage's classifier."""
    torch.manual_seed(0)
    model, stages = oltr.build(tiny("oltr-cifar100"), [9, 5, 2], *MEAN_STD)
    images, labels = noise(6), torch.tensor([0, 1, 2, 0, 1, 0])
    first = model.net.experts[0].classifier
    with torch.no_grad():
        stages[1].arrange()
        features = model.eval().net(images).expert_features[0]
        stages[1].fit(Images(images, labels), Images(images, labels))

    classifier = model.net.experts[0].classifier
    assert classifier.concepts is first
    means = torch.stack([features[labels == c].mean(dim=0) for c in range(3)])
    assert torch.allclose(classifier.memory.centroids, means, rtol=1e-4, atol=1e-4)


def test_oltr_has_one_more_layer_on_large_images():
    """In the second stage, after the pooling, of as many numbers; it learns at the features' rate."""
    recipe = dataclasses.replace(RECIPES["oltr-imagenet-lt-r10"], image_size=64)
    model, stages = oltr.build(recipe, [9, 5, 2], *MEAN_STD)
    expert = model.net.experts[0]
    plain = [type(layer) for layer in expert.layers]
    stages[1].arrange()

    pool, flatten, more, cut = list(expert.layers)[-4:]
    assert (type(pool), type(flatten), type(cut)) == (nn.AdaptiveAvgPool2d, nn.Flatten, nn.ReLU)
    assert (more.in_features, more.out_features) == (512, 512)
    assert [type(layer) for layer in (*list(expert.layers)[:2], pool, flatten)] == plain
    assert any(more.weight is parameter for parameter in parameter_groups(stages[2])[0]["params"])
    features = model.eval().net(noise(2, size=64)).expert_features
    assert features.shape == (1, 2, 512)
    assert (features >= 0).all()


def test_oltr_learns_classifiers_faster_than_features_and_centroids(memory_model):
    """0.1 against 0.01, a tenth after each third; every parameter once."""
    model, stages = memory_model
    groups = parameter_groups(stages[2])
    classifier = model.net.experts[0].classifier

    assert [group["factor"] for group in groups] == pytest.approx([1, 10, 10, 10])
    assert any(parameter is classifier.memory.centroids for parameter in groups[0]["params"])
    assert sum(len(group["params"]) for group in groups) == len(list(model.net.parameters()))
    assert [stages[2].lr(epoch) for epoch in (0, 19, 20, 59)] == pytest.approx([0.01, 0.01, 1e-3, 1e-4])
    assert (stages[0].sampler, stages[2].sampler) == (shuffled, class_aware)
    assert [(s.epochs, s.nesterov, s.weight_decay) for s in (stages[0], stages[2])] == [
        (200, False, 2e-4), (60, False, 5e-4)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("ncm-cifar100", {"retrain_epochs": "5"}, "retrain_epochs=5: retrain='ncm' has a closed form; take 1"),
        ("tau-norm-cifar100", {"classifier": "cosine"}, "retrain='tau_norm' needs the linear one"),
        ("bbn-cifar100", {"retrain_epochs": "5"}, "method 'bbn' has no such stage"),
        ("bbn-cifar100", {"classifier": "cosine"}, "method 'bbn' has the linear classifier"),
        ("oltr-cifar100", {"loss": "focal"}, "and loss 'ce'"),
        ("lfme-cifar100", {"n_experts": "3"}, "method 'lfme' trains one expert"),
        ("lfme-cifar100", {"first_stage": "runs/ce"}, "method 'lfme' has no stage that a run can replace"),
        ("m2m-cifar100", {"m2m_from": "1"}, "m2m_from=1.0: of epochs=200, one at least"),
        ("m2m-cifar100", {"m2m_beta": "1"}, "m2m_beta=1.0: must be from 0"),
        ("crt-cifar100", {"retrain_loss": "ldam"}, "need the cosine classifier"),
        ("lws-cifar100", {"retrain_loss": "ldam"}, "need the cosine classifier"),
        ("crt-cifar100", {"retrain": "svm"}, "must be one of crt, lws, tau_norm, ncm"),
    ],
)
def test_impossible_baselines_are_refused(name, settings, message):
    """The message names the field, the value and what is possible."""
    with pytest.raises(RecipeError, match=message):
        RECIPES[name].override(settings)


@pytest.mark.parametrize("averaged", [False, True])
def test_a_stage_with_its_own_network_is_judged_by_that_one(averaged):
    """Or by its average, where weights are averaged."""
    recipe = tiny("m2m-cifar100")
    model, stages = m2m.build(recipe, [9, 4, 2], *MEAN_STD)
    average = WeightAverage(model, 0.9) if averaged else None
    holder = average.model if averaged else model

    assert judged_in(model, stages[0], average).net is holder.teachers["generator"]
    assert judged_in(model, stages[1], average) is holder


def test_a_model_carries_its_teachers_in_its_checkpoint():
    """So that a resumed training has them."""
    recipe = tiny("ce-cifar100")
    nets = [build_model(recipe, 2, *MEAN_STD).net for _ in range(2)]

    names = Model(nets[0], None, {"generator": nets[1]}).state_dict().keys()

    assert {name.split(".")[0] for name in names} == {"net", "teachers"}
    assert {name.split(".")[0] for name in Model(nets[0], None).state_dict()} == {"net"}


def test_classifiers_retrained_by_sgd_do_not_take_over_adamws_weight_decay():
    """0.2 at a learning rate of 0.1 would turn the weights of a class by degrees a step."""
    swin, resnet = (
        ride.build(tiny(name, retrain_epochs=2, weight_decay=0.1), (3, 2, 1), *MEAN_STD)[1][1]
        for name in ("ride-swin-t", "ride-cifar100")
    )
    assert (swin.optimiser, swin.weight_decay) == ("sgd", 5e-4)
    assert resnet.weight_decay == 0.1


def test_retrained_classifiers_are_not_balanced_twice():
    """Class weights deferred to the experts' last epochs would come on top of the prior."""
    counts = (9, 7, 5, 3, 1)
    recipe = tiny("ride-cifar100", epochs=10, retrain_epochs=20)
    _, stages = ride.build(recipe, counts, *MEAN_STD)
    stage = next(stage for stage in stages if stage.name == "classifiers")
    logits, labels = torch.randn(3, 4, 5), torch.tensor([0, 1, 2, 4])
    plain = IndividualLoss("balanced_softmax", dataclasses.replace(recipe, deferred_from=None), counts)
    last = stage.epochs - 1

    assert last >= recipe.epoch_of(recipe.deferred_from)
    expected = sum(plain(each, labels, last) for each in logits)
    torch.testing.assert_close(stage.losses(Outputs(logits, torch.zeros(3, 4, 2)), labels, last)["loss"], expected)
