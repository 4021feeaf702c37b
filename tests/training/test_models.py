"""The networks have the published sizes and costs."""

import dataclasses

import pytest
import torch

from training.evaluate import macs_of, mean_macs
from training.methods.method import Model, build_model
from training.models import macs
from training.models.classifiers import CosineClassifier, LinearClassifier
from training.models.macs import count_macs
from training.models.multi_expert import Outputs
from training.models.resnet_cifar import BasicBlock
from training.models.router import Routers
from training.recipe import Recipe
from training.recipes import RECIPES

MEAN_STD = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def model_of(n_experts: int, reduced: bool, classifier: str = "cosine") -> Model:
    """A fresh RIDE model for 100 classes."""
    recipe = dataclasses.replace(
        RECIPES["ride-cifar100"], n_experts=n_experts, reduced=reduced, classifier=classifier, diversity_weight=0.0
    )
    return build_model(recipe, 100, *MEAN_STD)


@pytest.mark.parametrize(
    ("n_experts", "reduced", "millions"),
    [(1, False, "69.475"), (1, True, "50.0"), (2, True, "75.6"), (3, True, "101.3"), (4, True, "126.9"),
     (6, True, "178.1"),
     (2, False, "114.6"), (3, False, "159.6"), (4, False, "204.7")],
)  # fmt: skip
def test_macs_are_the_published_ones(n_experts, reduced, millions):
    """To the published digit, counting two operations per batch-norm element."""
    counted = count_macs(model_of(n_experts, reduced).net, torch.zeros(1, 32, 32, 3, dtype=torch.uint8))

    assert f"{counted / 1e6:.{len(millions.partition('.')[2])}f}" == millions


@pytest.mark.parametrize(
    ("operations", "n_experts", "reduced", "millions"),
    [(0, 1, False, "68.868"), (0, 1, True, "49.5"), (0, 2, True, "74.9"), (0, 3, True, "100.4"), (0, 4, True, "125.8"),
     (0, 6, True, "176.7"),
     (4, 1, False, "70.081"), (4, 1, True, "50.6"), (4, 2, True, "76.4"), (4, 3, True, "102.2"), (4, 4, True, "128.0"),
     (4, 6, True, "179.6"), (4, 2, False, "115.4"), (4, 3, False, "160.7"), (4, 4, False, "206.1")],
)  # fmt: skip
def test_macs_are_those_of_other_conventions_too(operations, n_experts, reduced, millions, monkeypatch):
    """Convolutions and linear layers alone, and with four operations per batch-norm element, as thop counts today."""
    monkeypatch.setattr(macs, "OPERATIONS_PER_BATCH_NORM_ELEMENT", operations)
    counted = count_macs(model_of(n_experts, reduced).net, torch.zeros(1, 32, 32, 3, dtype=torch.uint8))

    assert f"{counted / 1e6:.{len(millions.partition('.')[2])}f}" == millions


@pytest.mark.parametrize(
    ("n_experts", "reduced", "thousands"),
    [(1, False, 470), (2, True, 531), (3, True, 784), (4, True, 1037), (6, True, 1544)],
)
def test_parameter_counts_are_the_published_ones(n_experts, reduced, thousands):
    """In thousands; the three-expert model has 783,856 exactly."""
    parameters = sum(parameter.numel() for parameter in model_of(n_experts, reduced).net.parameters())

    assert round(parameters / 1000) == thousands
    if n_experts == 3:
        assert parameters == 783_856


def test_routed_cost_of_the_published_shares_is_the_published_cost():
    """40.99 / 9.47 / 49.54 % of images with 1 / 2 / 3 experts cost 77.8 M, routers included."""
    parts = macs_of(model_of(3, True), 32)

    assert mean_macs(parts, [0.4099, 0.0947, 0.4954]) / 1e6 == pytest.approx(77.84, abs=0.01)


def test_the_net_is_the_same_as_its_trunk_and_experts_run_by_hand():
    """Outputs stack what each expert says of the shared features."""
    model = model_of(3, True).eval()
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    with torch.no_grad():
        outputs = model.net(images)
        features = model.net.trunk(images)
        logits, feature = model.net.experts[2](features)

    assert outputs.expert_logits.shape == (3, 2, 100)
    assert outputs.expert_features.shape == (3, 2, 48)
    torch.testing.assert_close(outputs.expert_logits[2], logits)
    torch.testing.assert_close(outputs.expert_features[2], feature)


def test_the_trunk_scales_bytes_to_normalised_pixels():
    """(pixel/255 − mean) / std, per channel."""
    model = model_of(1, True)
    seen = []
    model.net.trunk.layers.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.net.trunk(torch.full((1, 8, 8, 3), 255, dtype=torch.uint8))

    assert seen[0].shape == (1, 3, 8, 8)
    torch.testing.assert_close(seen[0], torch.full((1, 3, 8, 8), 2.0))


def test_cosine_classifier_ignores_lengths():
    """Logits are scale times the cosine: between −30 and 30, whatever the length of features or weights."""
    classifier = CosineClassifier(4, 3, 30)
    features = torch.randn(5, 4)
    with torch.no_grad():
        plain = classifier(features)
        classifier.weight.mul_(7)
        scaled = classifier(3 * features)

    torch.testing.assert_close(plain, scaled)
    assert plain.abs().max() <= 30 + 1e-4


def test_widening_shortcut_keeps_every_second_pixel_and_pads_channels_on_both_sides():
    """Option A: no parameters, zeros in the new channels."""
    block = BasicBlock(2, 4, stride=2)
    torch.nn.init.zeros_(block.bn2.weight)  # only the shortcut is left
    x = torch.rand(1, 2, 4, 4)

    out = block(x)

    torch.testing.assert_close(out[:, 1:3], x[:, :, ::2, ::2])
    assert not out[:, [0, 3]].any()


def test_linear_classifiers_begin_with_the_gain_of_relu():
    """Normal, variance 2/D; those drawn afresh are uniform within ±1/√D, as torch's."""
    classifier = LinearClassifier(64, 100)
    assert classifier.weight.var().item() * 64 / 2 == pytest.approx(1, abs=0.12)

    classifier.reset_parameters()
    assert classifier.weight.abs().max().item() <= 1 / 8
    assert classifier.weight.var().item() * 64 * 3 == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(("backbone", "narrow"), [("resnet10", True), ("resnet32_cifar", False)])
def test_linear_classifiers_of_large_networks_begin_as_torchs(backbone, narrow):
    """As in the public code of the methods on large sets; on CIFAR as in LDAM's, which is wider."""
    recipe = Recipe(name="test", method="single", backbone=backbone, classifier="linear")
    weight = build_model(recipe, 50, (0.5,) * 3, (0.25,) * 3).net.experts[0].classifier.weight

    assert (weight.abs().max().item() <= 1 / weight.shape[1] ** 0.5) == narrow


def test_cosine_weights_begin_as_directions_to_all_sides():
    """Of unit length; as many numbers below 0 as above."""
    weight = CosineClassifier(64, 100, 30).weight

    assert weight.norm(dim=1).tolist() == pytest.approx([1] * 100)
    assert (weight > 0).float().mean().item() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_that_shortcut_as_a_convolution_is_the_same_to_the_bit(dtype):
    """Odd and even sides; every channel is copied once or zero."""
    shortcut = BasicBlock(16, 24, stride=2).shortcut
    for side in (8, 9):
        x = torch.randn(2, 16, side, side).to(dtype)
        assert shortcut.as_convolution().to(dtype)(x).equal(shortcut(x))


def test_routers_share_their_output_layer_and_see_the_mean_logits_sorted():
    """A router's logit from its parts, worked by hand; k never exceeds the number of classes."""
    routers = Routers(n_experts=3, n_features=4, n_classes=5, top_k=30, n_hidden=2)
    feature, sums = torch.randn(6, 4), torch.randn(6, 5)

    unit = feature / feature.norm(dim=1, keepdim=True)
    hidden = torch.relu(unit @ routers.hidden[1].weight.T + routers.hidden[1].bias)
    largest = (sums / 2).sort(dim=1, descending=True).values
    expected = torch.cat([largest, hidden], dim=1) @ routers.output.weight[0] + routers.output.bias

    assert routers.top_k == 5
    torch.testing.assert_close(routers.decide(1, feature, sums), expected)


def test_each_router_is_asked_about_its_own_expert_and_those_before_it():
    """All at once as one by one: the feature of expert i, the logits of experts 0 to i; divided by the temperature."""
    routers = Routers(n_experts=3, n_features=4, n_classes=5, top_k=3, n_hidden=2)
    logits, features = torch.randn(3, 6, 5), torch.randn(3, 6, 4)

    asked = routers(Outputs(logits, features))

    one_by_one = [routers.decide(0, features[0], logits[0]), routers.decide(1, features[1], logits[0] + logits[1])]
    torch.testing.assert_close(asked, torch.stack(one_by_one))
    routers.temperature = 4.0
    torch.testing.assert_close(routers.score(0, features[0], logits[0]), torch.sigmoid(one_by_one[0] / 4))


def test_convolutions_of_cifar_nets_begin_with_the_gain_of_relu():
    """Normal, variance 2/(k² · inputs), in each of the 31; the widths change from stage to stage."""
    net = model_of(1, False).net
    kernels = [module.weight for module in net.modules() if isinstance(module, torch.nn.Conv2d)]

    relative = [kernel.var().item() * kernel[0].numel() / 2 for kernel in kernels]
    assert relative == pytest.approx([1] * 31, abs=0.4)


@pytest.mark.parametrize(("name", "relative"), [("ride-cifar100", 2), ("ride-imagenet-lt-r10", 1 / 3)])
def test_routers_begin_as_in_the_authors_code(name, relative):
    """Those of CIFAR nets with the gain of ReLU, variance 2/inputs; others as torch has it, 1/(3 · inputs)."""
    routers = build_model(RECIPES[name], 100, *MEAN_STD).routers

    for hidden in routers.hidden:
        assert hidden.weight.var().item() * hidden.in_features == pytest.approx(relative, rel=0.25)
