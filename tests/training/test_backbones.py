"""Every backbone is the published net, cut where it should be."""

import dataclasses
import functools
import typing
from unittest.mock import patch

import pytest
import torch
import torchvision
from torch._subclasses import FakeTensorMode

from training.evaluate import macs_of, mean_macs
from training.methods.method import Model, build_model
from training.models.backbones import BACKBONES
from training.models.macs import count_macs
from training.recipe import Recipe, RecipeError
from training.recipes import RECIPES

MEAN_STD = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
CLASSES = {"imagenet": 1000, "inaturalist": 8142}


def recipe_of(backbone: str, n_experts: int, **fields: object) -> Recipe:
    """RIDE's net: one expert stands for the plain one, of full width with a linear classifier."""
    plain = {"classifier": "linear"} if n_experts == 1 else {"reduced": True}
    return Recipe(**{"name": "test", "method": "ride", "backbone": backbone, "n_experts": n_experts, **plain, **fields})


@functools.cache
def weightless(backbone: str, n_experts: int, n_classes: int) -> tuple[Model, tuple[int, list[int], list[int]]]:
    """The model and its costs; with shapes alone, so that it takes neither memory nor arithmetic."""
    with FakeTensorMode(), patch("torch.nn.init.trunc_normal_"):  # which looks at the numbers that it draws
        model = build_model(recipe_of(backbone, n_experts), n_classes, *MEAN_STD)
        return model, macs_of(model, BACKBONES[backbone].image_size)


@pytest.mark.parametrize(
    ("backbone", "data", "n_experts", "giga"),
    [("resnet50", "imagenet", 1, "4.111"), ("resnet50", "imagenet", 2, "4.476"), ("resnet50", "imagenet", 3, "5.800"),
     ("resnet50", "imagenet", 4, "7.123"),
     ("resnext50", "imagenet", 1, "4.259"), ("resnext50", "imagenet", 2, "4.679"),
     ("resnext50", "imagenet", 3, "6.088"), ("resnext50", "imagenet", 4, "7.498"),
     ("resnet50", "inaturalist", 1, "4.126"), ("resnet50", "inaturalist", 2, "4.498"),
     ("resnet50", "inaturalist", 3, "5.833"), ("resnet50", "inaturalist", 4, "7.167")],
)  # fmt: skip
def test_macs_of_large_nets_are_the_published_ones(backbone, data, n_experts, giga):
    """All experts, to the published digit."""
    _, (trunk, experts, _) = weightless(backbone, n_experts, CLASSES[data])

    assert f"{(trunk + sum(experts)) / 1e9:.3f}" == giga


@pytest.mark.parametrize(
    ("backbone", "data", "mean_experts", "giga"),
    [("resnet50", "imagenet", (1.42, 1.91, 2.51), (3.71, 4.36, 5.15)),
     ("resnext50", "imagenet", (1.46, 2.01, 2.36), (3.92, 4.69, 5.19)),
     ("resnet50", "inaturalist", (1.38, 1.75, 2.01), (3.67, 4.17, 4.51))],
)  # fmt: skip
def test_routed_costs_of_the_tables_follow_from_the_mean_number_of_experts(backbone, data, mean_experts, giga):
    """RIDE's routed rows with 2, 3 and 4 experts; the mean is known to two digits, which is 0.007 G, the cost too."""
    _, (trunk, experts, _) = weightless(backbone, 2, CLASSES[data])

    for mean, published in zip(mean_experts, giga, strict=True):
        assert (trunk + mean * experts[0]) / 1e9 == pytest.approx(published, abs=0.012)


@pytest.mark.parametrize(("n_experts", "giga"), [(1, "11.56"), (3, "13.18")])
def test_macs_on_places_lt_are_the_published_ones(n_experts, giga):
    """ResNet-152 of full width: the table of SADE's authors, whose experts have the third stage in common."""
    recipe = dataclasses.replace(RECIPES["sade-places-lt-r152"], method="ride", n_experts=n_experts)
    with FakeTensorMode():
        trunk, experts, _ = macs_of(build_model(recipe, 365, *MEAN_STD), 224)

    assert f"{(trunk + sum(experts)) / 1e9:.2f}" == giga


@pytest.mark.parametrize(("n_experts", "mean", "published"), [(2, 1.577, 64.8), (3, 2.084, 77.8), (4, 2.634, 91.9)])
def test_routed_costs_of_the_cifar_table(n_experts, mean, published):
    """64.8, 77.8 and 91.9 M for the mean numbers of experts that they imply."""
    _, macs = weightless("resnet32_cifar", n_experts, 100)
    whole = int(mean)  # an image uses `whole` experts or one more
    share = [0.0] * (whole - 1) + [whole + 1 - mean, mean - whole]

    assert mean_macs(macs, share) / 1e6 == pytest.approx(published, abs=0.05)


def test_parts_of_the_reduced_cifar_net_cost_what_is_published():
    """Trunk 24.396 M, one expert 25.625 M."""
    _, (trunk, experts, _) = weightless("resnet32_cifar", 3, 100)

    assert (f"{trunk / 1e6:.3f}", {f"{macs / 1e6:.3f}" for macs in experts}) == ("24.396", {"25.625"})


@pytest.mark.parametrize(
    ("backbone", "n_experts", "millions"),
    [("resnet50", 1, "25.6"), ("resnet50", 2, "29.6"), ("resnet50", 3, "43.7"), ("resnet50", 4, "57.8"),
     ("resnext50", 2, "29.1"), ("resnext50", 3, "42.9"), ("resnext50", 4, "56.7"),
     ("resnet10", 2, "6.4"), ("resnet10", 3, "9.4"), ("resnet10", 4, "12.4"),
     ("resnet101", 1, "44.5"), ("resnet152", 1, "60.2"), ("resnext101", 1, "44.2"),
     ("swin_t", 1, "28.3"), ("swin_s", 1, "49.6")],
)  # fmt: skip
def test_parameter_counts_of_large_nets_are_the_published_ones(backbone, n_experts, millions):
    """1000 classes, routers apart."""
    model, _ = weightless(backbone, n_experts, 1000)

    assert f"{sum(parameter.numel() for parameter in model.net.parameters()) / 1e6:.1f}" == millions


@pytest.mark.parametrize(
    ("backbone", "thousands"),
    [("resnet20_cifar", 270), ("resnet32_cifar", 464), ("resnet44_cifar", 659), ("resnet56_cifar", 853)],
)
def test_cifar_resnets_of_all_depths_have_their_published_sizes(backbone, thousands):
    """arXiv:1512.03385, table 6: 0.27, 0.46, 0.66 and 0.85 M with ten classes."""
    model, _ = weightless(backbone, 1, 10)

    assert round(sum(parameter.numel() for parameter in model.net.parameters()) / 1000) == thousands


@pytest.mark.parametrize(("name", "giga"), [("swin_t", "4.491"), ("swin_s", "8.741")])
def test_attention_counts_as_products_of_matrices(name, giga):
    """torchvision's documented cost of its Swin transformers, whose linear layers are called by their weights."""
    weights = torchvision.models.get_model_weights(name).DEFAULT
    _, (trunk, experts, _) = weightless(name, 1, 1000)

    assert f"{(trunk + experts[0]) / 1e9:.3f}" == giga
    assert (trunk + experts[0]) / 1e9 == pytest.approx(weights.meta["_ops"], abs=0.01)


def test_a_grouped_convolution_costs_its_share():
    """8 of 8 channels in 4 groups: two inputs, 3x3, for every output number."""
    convolution = torch.nn.Conv2d(8, 8, 3, padding=1, groups=4)

    assert count_macs(convolution, torch.zeros(1, 8, 5, 5)) == 8 * 25 * 2 * 9


@pytest.mark.parametrize("name", ["resnet10", "resnet50", "resnext50", "swin_t"])
def test_trunk_and_expert_together_are_the_net_of_torchvision(name):
    """The same names, the same answers: its weights at full width fit without being renamed."""
    if name == "resnet10":
        block = torchvision.models.resnet.BasicBlock
        theirs = torchvision.models.resnet.ResNet(block, [1, 1, 1, 1], num_classes=7).eval()
    else:
        theirs = torchvision.models.get_model(BACKBONES[name].torchvision, num_classes=7).eval()
    model = build_model(recipe_of(name, 1), 7, *MEAN_STD).eval()
    trunk, expert = model.net.trunk, model.net.experts[0]
    head = {"fc.weight", "fc.bias", "head.weight", "head.bias"} & theirs.state_dict().keys()
    assert trunk.layers.state_dict().keys() | expert.layers.state_dict().keys() | head == theirs.state_dict().keys()

    for part in (trunk.layers, expert.layers):
        part.load_state_dict({key: theirs.state_dict()[key] for key in part.state_dict()})
    weight, bias = sorted(head, reverse=True)
    expert.classifier.load_state_dict({"weight": theirs.state_dict()[weight], "bias": theirs.state_dict()[bias]})
    images = torch.randint(0, 256, (2, 70, 70, 3), dtype=torch.uint8)
    with torch.no_grad():
        expected = theirs(images.permute(0, 3, 1, 2) / 63.75 - 2)
        found = model.net(images).expert_logits[0]

    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_registry_holds_what_a_recipe_can_name():
    """One list of names in both places."""
    assert list(BACKBONES) == list(typing.get_args(typing.get_type_hints(Recipe)["backbone"]))


@pytest.mark.parametrize("name", ["resnet32_cifar", "resnet10", "resnext50", "swin_t"])
def test_the_stated_feature_width_is_the_true_one(name):
    """`n_features` is what an expert's layers give; reduced is 3/4."""
    backbone = BACKBONES[name]
    with FakeTensorMode(), patch("torch.nn.init.trunc_normal_"):
        for reduced in (False, True):
            recipe = recipe_of(name, 2, reduced=reduced)
            feature = backbone.expert(recipe)(backbone.trunk(recipe)(torch.zeros(2, 3, 32, 32)))
            assert feature.shape == (2, backbone.n_features(reduced))

    assert 4 * backbone.n_features(True) == 3 * backbone.n_features(False)


def test_stage_three_can_be_shared():
    """It moves from the experts to the trunk; one expert alone is the same net."""
    cut_early, cut_late = (
        build_model(recipe_of("resnet10", 2, share_stage3=late), 7, *MEAN_STD).net for late in (False, True)
    )

    assert {"layer3", "layer4"} <= dict(cut_early.experts[0].layers.named_children()).keys()
    assert "layer3" not in dict(cut_late.experts[1].layers.named_children())
    assert cut_late.trunk.layers.layer3[0].conv1.weight.shape == (192, 128, 3, 3)
    assert cut_late(torch.zeros(2, 32, 32, 3, dtype=torch.uint8)).expert_features.shape == (2, 2, 384)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"backbone": "resnet32_cifar", "share_stage3": True}, "share_stage3=True: only ResNets of four stages"),
     ({"backbone": "swin_t", "share_stage3": True}, "share_stage3=True: only ResNets of four stages"),
     ({"backbone": "resnet50", "drop_path": 0.2}, "drop_path=0.2: only Swin transformers"),
     ({"backbone": "resnet18"}, "backbone='resnet18': must be one of resnet20_cifar, ")],
)  # fmt: skip
def test_impossible_backbones_are_refused(fields, message):
    """Each names the field, the value and what is possible."""
    with pytest.raises(RecipeError, match=message):
        Recipe(name="test", method="ride", **fields)


def test_large_resnets_begin_with_the_gain_of_relu():
    """Convolutions: normal, variance 2/(k² · outputs); the widths change at every stage."""
    net = build_model(recipe_of("resnet10", 1), 7, *MEAN_STD).net
    kernels = [module.weight for module in net.modules() if isinstance(module, torch.nn.Conv2d)]

    relative = [kernel.var().item() * kernel.shape[0] * kernel[0, 0].numel() / 2 for kernel in kernels]
    assert relative == pytest.approx([1] * 12, abs=0.1)


def test_dropped_paths_grow_evenly_from_the_first_block_to_the_last():
    """Of twelve blocks in trunk and expert together."""
    with FakeTensorMode(), patch("torch.nn.init.trunc_normal_"):
        net = build_model(recipe_of("swin_t", 1, drop_path=0.22), 7, *MEAN_STD).net
    shares = [module.p for module in net.modules() if isinstance(module, torchvision.ops.StochasticDepth)]

    assert shares == pytest.approx([0.02 * block for block in range(12)])


def test_linear_layers_of_transformers_begin_small():
    """Deviation 0.02, biases 0."""
    expert = build_model(recipe_of("swin_t", 2), 7, *MEAN_STD).net.experts[1]
    layers = [module for module in expert.layers.modules() if isinstance(module, torch.nn.Linear)]

    assert [layer.weight.std().item() for layer in layers] == pytest.approx([0.02] * len(layers), rel=0.02)
    assert not any(layer.bias.any() for layer in layers if layer.bias is not None)
