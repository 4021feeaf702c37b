"""Every kind of backbone trains, resumes, and starts from pre-trained weights."""

import dataclasses
import json
import shutil

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file

from training import loop
from training.checkpoint import CheckpointError, checkpoints_of
from training.data.sets import load_data
from training.data.sources import unnamed_classes
from training.methods.method import Stage, build_model
from training.methods.ride import build
from training.models import backbones
from training.models.backbones import BACKBONES
from training.models.resnet_imagenet import ResNet
from training.models.swin import Swin
from training.optimiser import optimiser_of
from training.pretrained import start_from
from training.recipe import RecipeError
from training.recipes import RECIPES
from training.train import train, trained_model

MEAN_STD = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
COUNTS = (40, 24, 12, 6)
BASE = dataclasses.replace(
    RECIPES["ride-imagenet-lt-r50"], image_size=32, n_experts=2, epochs=3, router_epochs=1, batch_size=16,
    warmup_epochs=1, compile=False, precision="bf16",
)  # fmt: skip
SWIN = {"backbone": "swin_t", "drop_path": 0.5, "optimiser": "adamw", "schedule": "cosine", "lr": 1e-3,
        "clip_norm": 5.0, "mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1, "rand_augment": True,
        "colour_jitter": 0.0}  # fmt: skip


@pytest.fixture
def small_nets(monkeypatch):
    """The same families, a hundredth of the size."""
    for name, block in (("resnet50", torchvision.models.resnet.Bottleneck),
                        ("resnext50", torchvision.models.resnet.Bottleneck)):  # fmt: skip
        groups = (32, 4) if name == "resnext50" else (1, 64)
        monkeypatch.setitem(BACKBONES, name, backbones._resnet(ResNet(block, (1, 1, 1, 1), *groups), name))
    monkeypatch.setitem(BACKBONES, "swin_t", backbones._swin(Swin((2, 1, 2, 1), width=12), "swin_t"))


@pytest.mark.parametrize(
    "fields",
    [{"backbone": "resnet20_cifar"}, {"backbone": "resnet10"}, {"backbone": "resnet10", "share_stage3": True},
     {"backbone": "resnet50", "classifier": "linear", "loss": "ce"}, {"backbone": "resnext50"}, SWIN,
     SWIN | {"classifier": "linear", "loss": "ce"}],
    ids=["cifar", "resnet10", "shared", "linear", "resnext", "swin", "swin-linear"],
)  # fmt: skip
def test_every_family_learns(small_nets, fields):
    """In bf16: steps on the same sixteen images lower the loss; every parameter has a gradient; logits are fp32."""
    recipe = dataclasses.replace(BASE, **{"lr": 0.01} | fields | {"mixup": 0.0, "cutmix": 0.0})
    torch.manual_seed(0)
    model, (stage, _) = build(recipe, COUNTS, *MEAN_STD)
    network, optimiser = loop.forward_of(model, stage, recipe), optimiser_of(stage)
    images = torch.randint(0, 256, (16, 32, 32, 3), dtype=torch.uint8)
    labels = torch.arange(16) % 4
    model.net.train()

    losses = []
    for _ in range(6):
        parts, _ = loop.train_step(network, stage, optimiser, images, labels, 0, torch.Generator())
        losses.append(float(parts["individual"].detach()))

    assert losses[-1] < losses[0]
    assert all(parameter.grad is not None for parameter in model.net.parameters())
    assert network(images).expert_logits.dtype == torch.float32


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
@pytest.mark.parametrize("family", [{"backbone": "resnet50"}, {"backbone": "swin_t", "colour_jitter": 0.0}])
def test_features_learn_at_a_share_of_the_classifiers_rate(small_nets, optimiser, family):
    """The first step moves them a tenth as far, the classifiers as far as ever."""
    steps = {}
    for factor in (1.0, 0.1):
        recipe = dataclasses.replace(
            BASE, **family, features_lr_factor=factor, optimiser=optimiser, weight_decay=0.0, precision="fp32"
        )
        torch.manual_seed(0)
        model, (stage, _) = build(recipe, COUNTS, *MEAN_STD)
        stepping, network = optimiser_of(stage), loop.forward_of(model, stage, recipe)
        for group in stepping.param_groups:
            group["lr"] = group["factor"] * stage.lr(0)
        before = {name: value.clone() for name, value in model.net.named_parameters()}
        images = torch.randint(0, 256, (16, 32, 32, 3), dtype=torch.uint8)
        model.net.train()
        loop.train_step(network, stage, stepping, images, torch.arange(16) % 4, 0, torch.Generator())
        steps[factor] = {name: (value - before[name]).detach() for name, value in model.net.named_parameters()}

    for name, whole in steps[1.0].items():
        share = 1.0 if ".classifier." in name else 0.1
        torch.testing.assert_close(steps[0.1][name], share * whole, rtol=2e-3, atol=1e-6)
    for part in ("trunk.", "experts.1.layers", "experts.1.classifier"):
        assert any(whole.abs().max() > 1e-5 for name, whole in steps[1.0].items() if name.startswith(part))


def weights_of(run):
    return load_file(run / "checkpoints" / "routers-0001" / "model.safetensors")


def test_a_killed_swin_training_resumes_to_the_same_weights(small_nets, folder, tmp_path, monkeypatch):
    """Dropped paths, mixed images and the optimiser's two moments included; the shared norm stays one."""
    recipe = dataclasses.replace(BASE, data=str(folder), **SWIN, precision="fp32", evaluate_every=9)
    train(recipe, tmp_path / "whole")

    class Killed(Exception):
        pass

    def save_and_die(*arguments):
        save(*arguments)
        raise Killed

    save = loop.save_checkpoint
    with monkeypatch.context() as patched:
        patched.setattr(loop, "save_checkpoint", save_and_die)
        with pytest.raises(Killed):
            train(recipe, tmp_path / "killed")
    train(recipe, tmp_path / "killed")

    whole, killed = weights_of(tmp_path / "whole"), weights_of(tmp_path / "killed")
    assert all(whole[name].equal(killed[name]) for name in whole)
    norms = [whole[f"net.experts.{index}.layers.norm.weight"] for index in range(2)]
    assert norms[0].equal(norms[1])
    assert not norms[0].equal(torch.ones_like(norms[0]))
    _, model = trained_model(tmp_path / "whole")
    assert model.net.experts[0].layers.norm is model.net.experts[1].layers.norm


def test_resuming_gives_adam_its_steps_and_moments_back(small_nets, folder, tmp_path):
    """As they were saved, each for its parameter."""
    recipe = dataclasses.replace(BASE, data=str(folder), **SWIN, epochs=1, router_epochs=0)
    train(recipe, tmp_path)
    model, (stage,) = build(recipe, (26, 15, 8, 4), *MEAN_STD)
    optimiser = optimiser_of(stage)
    checkpoint = checkpoints_of(tmp_path)["experts"]
    checkpoint.load_into(model, optimiser)
    steps = -(-sum(checkpoint.class_counts) // recipe.batch_size)

    assert len(optimiser.state) == len(list(model.net.parameters()))
    for parameter, state in optimiser.state.items():
        assert (state.keys(), int(state["step"])) == ({"step", "exp_avg", "exp_avg_sq"}, steps)
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == parameter.shape


def test_adamw_spares_biases_norms_and_position_biases(small_nets):
    """All else decays."""
    recipe = dataclasses.replace(BASE, **SWIN, weight_decay=0.2)
    model, (stage, router_stage) = build(recipe, COUNTS, *MEAN_STD)
    decayed, spared = optimiser_of(stage).param_groups
    names = {id(parameter): name for name, parameter in model.net.named_parameters()}

    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.2, 0)
    assert decayed["betas"] == (0.9, 0.999)
    for parameter in spared["params"]:
        assert names[id(parameter)].endswith("bias_table") or parameter.dim() == 1
    for parameter in decayed["params"]:
        assert names[id(parameter)].endswith(".weight")
        assert parameter.dim() >= 2
    assert len(decayed["params"]) + len(spared["params"]) == len(names)
    assert isinstance(optimiser_of(router_stage), torch.optim.SGD)


@pytest.mark.parametrize("loss_scale", [1.0, 1024.0])
def test_long_gradients_are_scaled_down(loss_scale):
    """To the given length, all parameters together; short ones stay. What fp16 scales the loss by does not count."""
    layer = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.zeros_(layer.weight)

    def stage(clip_norm):
        return Stage(
            "experts", 1, 1, layer, lambda outputs, labels, epoch: {"loss": 30 * outputs.expert_logits.sum()},
            lambda labels, generator: labels, lambda epoch: 1.0, 0.0, False, 0.0, clip_norm=clip_norm,
        )  # fmt: skip

    class Answer:
        def __init__(self, images):
            self.expert_logits = layer(images).unsqueeze(0)

    for clip_norm, length in ((5.0, 5.0), (1000.0, 30 * 5**0.5), (None, 30 * 5**0.5)):
        optimiser = torch.optim.SGD(layer.parameters(), 0.0)
        images = torch.tensor([[1.0, 2.0]])
        scaler = torch.amp.GradScaler("cpu", loss_scale)
        loop.train_step(Answer, stage(clip_norm), optimiser, images, torch.tensor([0]), 0, torch.Generator(), scaler)
        assert float(layer.weight.grad.norm()) == pytest.approx(length, rel=1e-4)


def write_weights(file, backbone, **changes):
    """A file as torchvision's are, of the backbone at full width, with a classifier for five classes."""
    recipe = dataclasses.replace(BASE, backbone=backbone, reduced=False, n_experts=1, diversity_weight=0.0)
    net = build_model(recipe, 5, *MEAN_STD).net
    weights = {**net.trunk.layers.state_dict(), **net.experts[0].layers.state_dict()} | {"fc.weight": torch.ones(5, 9)}
    weights = {key: torch.randn(value.shape) if value.is_floating_point() else value for key, value in weights.items()}
    weights = {key: tensor for key, tensor in (weights | changes).items() if tensor is not None}
    torch.save(weights, file) if file.suffix == ".pth" else save_file(weights, file)
    return weights


@pytest.mark.parametrize("backbone", ["resnet10", "swin_t"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_nets_of_full_width_start_from_pretrained_weights_whole(small_nets, tmp_path, backbone, suffix):
    """Trunk and every expert; the classifiers stay fresh; random numbers that follow are as without."""
    file = tmp_path / f"weights{suffix}"
    weights = write_weights(file, backbone)
    recipe = dataclasses.replace(BASE, backbone=backbone, reduced=False, pretrained=str(file))
    net = build_model(recipe, 4, *MEAN_STD).net
    state = torch.get_rng_state()

    said = start_from(net, recipe)

    assert torch.equal(torch.get_rng_state(), state)
    assert said["fresh"] == []
    assert {key.split("layers.")[1] for key in said["taken"]} == weights.keys() - {"fc.weight"}
    tensors = net.state_dict()
    assert all(tensors[key].equal(weights[key.split("layers.")[1]]) for key in said["taken"])


def test_of_reduced_nets_only_the_trunk_is_taken(small_nets, tmp_path):
    """Stage by stage, none in part: with a shared third stage that one stays fresh as well."""
    weights = write_weights(tmp_path / "w.pth", "resnet10")
    for shared in (False, True):
        recipe = dataclasses.replace(BASE, backbone="resnet10", share_stage3=shared, pretrained=str(tmp_path / "w.pth"))
        net = build_model(recipe, 4, *MEAN_STD).net
        said = start_from(net, recipe)

        stages = {key.split(".")[2] for key in said["taken"]}
        assert stages == {"conv1", "bn1", "layer1", "layer2"}
        assert all(key.startswith(("experts", "trunk.layers.layer3")) for key in said["fresh"])
        assert net.trunk.layers.conv1.weight.equal(weights["conv1.weight"])


def test_a_run_says_what_it_started_from(small_nets, folder, tmp_path):
    """In its results and in every checkpoint."""
    write_weights(tmp_path / "w.pth", "resnet10")
    recipe = dataclasses.replace(
        BASE, data=str(folder), backbone="resnet10", epochs=1, router_epochs=0, pretrained=str(tmp_path / "w.pth")
    )
    train(recipe, tmp_path / "run")

    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert "trunk.layers.conv1.weight" in results["pretrained"]["taken"]
    stored = json.loads((tmp_path / "run" / "checkpoints" / "experts-0001" / "checkpoint.json").read_text())
    assert stored["pretrained"] == results["pretrained"]


def test_a_training_starts_from_a_run_of_ours(small_nets, folder, tmp_path):
    """Trunk and expert by expert; classifiers are fresh. Other layers and other images of the same set are refused."""
    named = shutil.copytree(folder, tmp_path / "named")
    for directory in list(named.iterdir()):
        directory.rename(named / directory.name.replace("class", "kind"))
    recipe = dataclasses.replace(BASE, data=str(named), backbone="resnet20_cifar", epochs=1, router_epochs=0)
    train(recipe, tmp_path / "first")
    theirs = trained_model(tmp_path / "first")[1].net.state_dict()
    second = dataclasses.replace(recipe, pretrained=str(tmp_path / "first"))
    net = build_model(second, 4, *MEAN_STD).net

    digest = checkpoints_of(tmp_path / "first")["experts"].images_digest

    assert start_from(net, second, digest)["taken"] == [key for key in theirs if "classifier" not in key]
    for key, tensor in net.state_dict().items():
        assert tensor.equal(theirs[key]) == ("classifier" not in key), key
    wider = dataclasses.replace(second, reduced=not recipe.reduced)
    with pytest.raises(CheckpointError, match=r"tensor experts.0.layers\S+ is \(\d+.*\), this recipe wants \(\d+"):
        start_from(build_model(wider, 4, *MEAN_STD).net, wider, digest)
    with pytest.raises(CheckpointError, match=r"first: trained on other images of .* than this training has"):
        train(dataclasses.replace(second, subset_seed=1), tmp_path / "second")
    with pytest.raises(CheckpointError, match=r"first: trained on other images of .* than this training has"):
        start_from(net, dataclasses.replace(second, data=f"{named.parent}/./{named.name}/"), "another")
    copied = shutil.copytree(named, tmp_path / "copied")
    with pytest.raises(CheckpointError, match=r"first: trained on other images of .* than this training has"):
        train(dataclasses.replace(second, data=str(copied), subset_seed=1), tmp_path / "second")
    file = tmp_path / "first" / "checkpoints" / "experts-0001" / "checkpoint.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"classes": unnamed_classes(4)}))
    start_from(net, dataclasses.replace(second, data="another"), "another", unnamed_classes(4))  # any set has these
    with pytest.raises(CheckpointError, match=r"pretrained: .*: no checkpoints there"):
        start_from(net, dataclasses.replace(second, pretrained=str(tmp_path)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"layer1.0.conv2.weight": torch.ones(64, 64, 1, 1)},
      r"tensor layer1.0.conv2.weight is \(64, 64, 1, 1\), resnet10 at full width wants \(64, 64, 3, 3\)"),
     ({"bn1.bias": None}, r"tensor bn1.bias is missing, resnet10 at full width wants \(64,\)"),
     ({"layer1.1.conv1.weight": torch.ones(2)}, r"tensor layer1.1.conv1.weight is \(2,\), resnet10 .* wants none"),
     ({"bn1.bias": torch.ones(2), "layer4.0.bn1.bias": torch.ones(1)}, r"tensor bn1.bias is \(2,\)")],
)  # fmt: skip
def test_weights_of_another_net_are_refused_by_the_first_difference(tmp_path, changes, message):
    """With both shapes; nothing is taken."""
    write_weights(tmp_path / "w.pth", "resnet10", **changes)
    recipe = dataclasses.replace(BASE, backbone="resnet10", pretrained=str(tmp_path / "w.pth"))
    with pytest.raises(CheckpointError, match=message):
        start_from(build_model(recipe, 4, *MEAN_STD).net, recipe)


def test_files_that_hold_no_weights_are_refused(tmp_path):
    """Code in a file is not run; what is no table of tensors is not guessed at."""

    class Harm:
        def __reduce__(self):
            return (print, ("run",))

    (tmp_path / "damaged.safetensors").write_bytes(b"no")
    torch.save({"w": Harm()}, tmp_path / "harm.pth")
    torch.save({"state_dict": {}}, tmp_path / "nested.pth")
    (tmp_path / "image.pth").write_bytes(b"PAR1")
    messages = dict.fromkeys(("damaged.safetensors", "harm.pth", "image.pth"), "cannot be read")
    messages |= {"none.pth": "no such run or file", "nested.pth": "tensors by name and nothing else"}
    for name, message in messages.items():
        recipe = dataclasses.replace(BASE, backbone="resnet10", pretrained=str(tmp_path / name))
        with pytest.raises(CheckpointError, match=message) as refusal:
            start_from(build_model(recipe, 4, *MEAN_STD).net, recipe)
        assert "\n" not in str(refusal.value)
        assert "weights_only" not in str(refusal.value)


def test_torchvision_is_asked_only_for_what_it_has(monkeypatch):
    """Its default weights of the same net; a backbone without any is refused with those that have."""
    asked = []

    def get_state_dict(weights, **options):
        asked.append(str(weights))
        raise OSError("no network in a test")

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", get_state_dict)
    for backbone, message in (("resnet10", "it has no resnet10; it has resnet50, "), ("swin_t", "cannot be fetched")):
        recipe = dataclasses.replace(BASE, backbone=backbone, pretrained="torchvision")
        with pytest.raises(CheckpointError, match=message):
            start_from(torch.nn.Identity(), recipe)
    assert asked == ["Swin_T_Weights.IMAGENET1K_V1"]
    with pytest.raises(RecipeError, match="pretrained=torchvision: it has no resnet32_cifar; name a run of ours"):
        dataclasses.replace(RECIPES["ride-cifar100"], pretrained="torchvision")


def test_a_network_for_large_images_on_small_ones_is_no_surprise(small_nets, folder, tmp_path, capsys):
    """ride-own has 32x32 images unless told otherwise; a ResNet-50 on them would disappoint without a word."""
    recipe = dataclasses.replace(BASE, data=str(folder), epochs=1, router_epochs=1, crop="padded", colour_jitter=0.0)
    train(recipe, tmp_path / "run")
    assert "image_size=32: resnet50 is usually trained on images of 224x224 pixels: --set" in capsys.readouterr().err
    train(dataclasses.replace(recipe, backbone="resnet20_cifar"), tmp_path / "cifar")
    assert "is usually trained" not in capsys.readouterr().err


@pytest.mark.parametrize(("left", "accumulate"), [(1, 1), (5, 4)])
def test_one_image_left_over_ends_no_training(small_nets, folder, tmp_path, left, accumulate):
    """At 32x32 a ResNet's last feature map is one pixel, which batch norm cannot normalise for an image alone."""
    recipe = dataclasses.replace(BASE, data=str(folder), epochs=1, router_epochs=1, crop="padded", colour_jitter=0.0)
    recipe = dataclasses.replace(
        recipe, batch_size=len(load_data(recipe).train) - left, router_batch_size=16, accumulate=accumulate
    )
    assert train(recipe, tmp_path / "run")["experts"]


def test_weights_of_which_none_fit_are_refused(tmp_path):
    """SHIKE's layers are other ones than the backbone's; a start from nothing would look like one from the file."""
    write_weights(tmp_path / "w.pth", "resnet32_cifar")
    recipe = dataclasses.replace(RECIPES["shike-cifar100"], pretrained=str(tmp_path / "w.pth"))

    with pytest.raises(CheckpointError, match="none of its tensors has a place in this recipe's network"):
        start_from(build_model(recipe, 4, *MEAN_STD).net, recipe)
