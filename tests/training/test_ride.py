"""RIDE's switches: pairwise diversity, priors per expert, distillation, routers with output layers of their own."""

import dataclasses
import itertools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.training.test_losses import COUNTS, EXACT, LABELS, golden_logits
from training.checkpoint import CheckpointError, checkpoints_of
from training.data.samplers import class_balanced, shuffled
from training.evaluate import macs_of
from training.methods.losses import class_temperatures, distillation_loss, pairwise_diversity_loss
from training.methods.method import build_model
from training.methods.ride import RideLoss, build
from training.models.multi_expert import Outputs
from training.models.router import Routers
from training.recipe import RecipeError
from training.recipes import RECIPES
from training.train import train, trained_model

RIDE = RECIPES["ride-cifar100"]
MEAN_STD = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def teacher_logits() -> torch.Tensor:
    """(4, 100), float64: the teacher of the golden values."""
    image, label = torch.arange(4, dtype=torch.float64).view(4, 1), torch.arange(100, dtype=torch.float64)
    return 6 * torch.cos(0.5 + image + 0.21 * label)


def test_distillation_has_its_golden_value():
    """On the mean logits, with temperature 1.5."""
    assert distillation_loss(golden_logits().mean(0), teacher_logits(), 1.5).item() == pytest.approx(3.590634, **EXACT)


@pytest.mark.parametrize(("times_experts", "total"), [(True, 156.327830), (False, 156.327830 / 3)])
def test_the_distilled_total_is_the_codes_or_a_third_of_it(times_experts, total):
    """The public code adds the same terms once for every expert; the switch says whether we do."""
    recipe = dataclasses.replace(RECIPES["ride-distilled-cifar100"], loss_times_experts=times_experts)
    logits = golden_logits()
    losses = RideLoss(recipe, COUNTS)(Outputs(logits, logits, teacher_logits=teacher_logits()), LABELS, 0)

    assert losses["loss"].item() == pytest.approx(total, **EXACT)
    assert losses["distillation"].item() == pytest.approx(3.590634, **EXACT)


def test_the_papers_temperatures_have_their_golden_values():
    """β + 1 − max β of the classes with 500, 48 and 5 images, and their mean."""
    temperatures = class_temperatures(COUNTS, 0.05, divided=False)

    assert temperatures[[0, 50, 99]].tolist() == pytest.approx([1, 0.791647, 0.771826], abs=1e-6)
    assert temperatures.mean().item() == pytest.approx(0.819522, abs=1e-6)
    with pytest.raises(RecipeError, match=r"diversity_gamma=0.3: the paper's temperature of the rarest class is -0.3"):
        class_temperatures(COUNTS, 0.3, divided=False)


@pytest.mark.parametrize("n_experts", [2, 3])
def test_pairwise_diversity_is_that_of_every_pair(n_experts):
    """Against a loop over pairs, images and classes in NumPy; 0 where all agree."""
    logits, temperatures = golden_logits()[:n_experts], class_temperatures(COUNTS, 0.05, divided=False).double()
    z = logits.numpy() / temperatures.numpy()
    p = np.exp(z) / np.exp(z).sum(axis=2, keepdims=True)
    pairs = itertools.permutations(p, 2)
    expected = sum((one * np.log(one / other)).sum() for one, other in pairs) / (n_experts - 1) / 4

    assert pairwise_diversity_loss(logits, temperatures).item() == pytest.approx(expected)
    agreed = logits[:1].expand(n_experts, -1, -1)
    assert pairwise_diversity_loss(agreed, temperatures).item() == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="two experts or more, there is 1"):
        pairwise_diversity_loss(logits[:1], temperatures)


def test_both_experts_of_a_pair_have_a_gradient():
    """As of the sum over pairs written out; none of the two is a teacher."""
    logits = golden_logits().requires_grad_()
    logs = logits.log_softmax(dim=2)
    pairs = [(logs[i].exp() * (logs[i] - logs[j])).sum() / 2 / 4 for i in range(3) for j in range(3) if i != j]

    (found,) = torch.autograd.grad(pairwise_diversity_loss(logits, torch.ones(100).double()), logits, retain_graph=True)

    torch.testing.assert_close(found, torch.autograd.grad(sum(pairs), logits)[0])


def test_the_recipe_says_which_diversity():
    """The pairwise form enters with λ, and with the paper's temperatures from the deferred epoch on."""
    recipe = dataclasses.replace(RIDE, diversity_form="pairwise")
    logits = golden_logits()
    losses = [RideLoss(recipe, COUNTS)(Outputs(logits, logits), LABELS, epoch)["diversity"] for epoch in (0, 160)]

    for loss, temperatures in zip(
        losses, (torch.ones(100), class_temperatures(COUNTS, 0.05, divided=False)), strict=True
    ):
        assert loss.item() == pytest.approx(-0.45 * pairwise_diversity_loss(logits, temperatures).item(), **EXACT)


def test_each_expert_may_have_a_prior_of_its_own():
    """Σ of cross-entropies of logits plus τ_i · log p; with one τ for all it is the plain loss."""
    plain = dataclasses.replace(RIDE, loss="logit_adjusted", diversity_weight=0.0, deferred_from=None, logit_tau=2.0)
    own = dataclasses.replace(plain, expert_taus=(0.0, 1.0, 2.5))
    same = dataclasses.replace(plain, expert_taus=(2.0, 2.0, 2.0))
    logits = golden_logits()
    log_prior = torch.log(torch.tensor(COUNTS, dtype=torch.float64) / sum(COUNTS))
    loss, equal, shared = (
        RideLoss(recipe, COUNTS)(Outputs(logits, logits), LABELS, 0)["loss"].item() for recipe in (own, same, plain)
    )

    entropy = torch.nn.functional.cross_entropy
    expected = sum(entropy(z + tau * log_prior, LABELS).item() for z, tau in zip(logits, (0, 1, 2.5), strict=True))
    assert loss == pytest.approx(expected, **EXACT)
    assert equal == pytest.approx(shared)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"expert_taus": (1.0, 2.0), "loss": "logit_adjusted"}, "must be 3, one for each expert, or empty"),
        ({"expert_taus": (0.0, 1.0, 2.0)}, "only for loss='logit_adjusted'"),
        ({"distill_each": True}, "there is no teacher to learn from"),
        ({"teacher": "runs/x", "method": "shike", "diversity_weight": 0.0}, "only method 'ride' distils"),
        ({"method": "shike"}, "loss_times_experts: only for method 'ride', this is 'shike'"),
    ],
)
def test_switches_that_would_do_nothing_are_refused(fields, message):
    """By name and value, before any epoch."""
    with pytest.raises(RecipeError, match=message):
        dataclasses.replace(RIDE, **fields)


def test_routers_may_have_output_layers_of_their_own():
    """E − 1 of them; each decides by its own, and costs as much as with a shared one."""
    own = Routers(n_experts=3, n_features=4, n_classes=5, top_k=2, n_hidden=2, shared=False)
    feature, sums = torch.randn(6, 4), torch.randn(6, 5)
    before = own.decide(0, feature, sums), own.decide(1, feature, sums)
    with torch.no_grad():
        own.output_of(1).bias.add_(3)

    torch.testing.assert_close(own.decide(0, feature, sums), before[0])
    torch.testing.assert_close(own.decide(1, feature, sums), before[1] + 3)
    shared, separate = (
        build_model(dataclasses.replace(RIDE, router_shared=share), 100, *MEAN_STD) for share in (True, False)
    )
    assert macs_of(shared, 32) == macs_of(separate, 32)
    assert (
        sum(p.numel() for p in separate.routers.parameters())
        == sum(p.numel() for p in shared.routers.parameters()) + 47
    )


TAUGHT = [32, 20, 10, 4]  # images by class of `folder`, without those that are held out or tested


@pytest.fixture(scope="module")
def teacher(folder, tmp_path_factory):
    """A finished run of two experts, and the recipe of a student of its."""
    run = tmp_path_factory.mktemp("teacher") / "run"
    recipe = dataclasses.replace(
        RECIPES["ride-own"], data=str(folder), n_experts=2, epochs=1, warmup_epochs=1, router_epochs=0, image_size=16,
        batch_size=32, compile=False, precision="fp32", evaluate_every=1,
    )  # fmt: skip
    train(recipe, run)
    return run, dataclasses.replace(recipe, teacher=str(run), n_experts=3)


def test_the_teacher_is_frozen_and_in_evaluation_mode(teacher):
    """Its answers do not depend on the batch, take no gradient, and leave it as it was."""
    _, recipe = teacher
    _, (stage,) = build(recipe, TAUGHT, *MEAN_STD)
    images = torch.randint(0, 256, (6, 16, 16, 3), dtype=torch.uint8)
    before = {name: value.clone() for name, value in stage.teacher.nets.state_dict().items()}
    together = stage.teacher(images)

    assert not together.requires_grad
    torch.testing.assert_close(torch.cat([stage.teacher(images[:1]), stage.teacher(images[1:])]), together)
    assert all(before[name].equal(value) for name, value in stage.teacher.nets.state_dict().items())


def test_several_teachers_speak_as_one(teacher):
    """The mean of their mean logits; one run named twice says what it says alone."""
    run, recipe = teacher
    other = dataclasses.replace(recipe, teacher=f"{run}, {run}")
    images = torch.randint(0, 256, (6, 16, 16, 3), dtype=torch.uint8)
    alone, twice = (build(each, TAUGHT, *MEAN_STD)[1][0].teacher for each in (recipe, other))
    torch.testing.assert_close(twice(images), alone(images))

    with torch.no_grad():
        twice.nets[1].experts[0].classifier.weight.mul_(-1)
    each = [net(images).expert_logits.mean(dim=0) for net in twice.nets]
    torch.testing.assert_close(twice(images), (each[0] + each[1]) / 2)
    assert not torch.allclose(each[0], each[1])


def test_every_expert_can_learn_from_the_teacher_on_its_own():
    """The sum over experts of each one's divergence; else that of their mean."""
    logits, taught = golden_logits(), teacher_logits()
    outputs = Outputs(logits, logits, teacher_logits=taught)
    recipe = dataclasses.replace(RIDE, teacher="runs/x", distill_weight=2.0)
    each = RideLoss(dataclasses.replace(recipe, distill_each=True), COUNTS)(outputs, LABELS, 0)["distillation"]
    mean = RideLoss(recipe, COUNTS)(outputs, LABELS, 0)["distillation"]

    assert each.item() == pytest.approx(2 * sum(distillation_loss(own, taught, 1.5).item() for own in logits), **EXACT)
    assert mean.item() == pytest.approx(2 * 3.590634, **EXACT)


def test_a_teacher_of_other_images_is_refused(teacher, folder, tmp_path):
    """As many of each class, but one has another name, and so another place in the draw."""
    _, recipe = teacher
    images = tmp_path / "images"
    shutil.copytree(folder, images)
    first = sorted(images.rglob("*.png"))[0]
    first.rename(first.with_name("zzz.png"))
    for path in sorted(Path(recipe.teacher).rglob("checkpoint.json")):
        moved = tmp_path / "teacher" / path.relative_to(recipe.teacher)
        shutil.copytree(path.parent, moved.parent)
        moved.write_text(path.read_text().replace(str(folder), str(images)))
    other = dataclasses.replace(recipe, data=str(images), teacher=str(tmp_path / "teacher"))

    with pytest.raises(CheckpointError, match=r"teacher: .* was trained on other images, as many, but some have"):
        train(other, tmp_path / "student")


def test_a_teacher_s_images_may_lie_elsewhere_now(teacher, folder, tmp_path):
    """As those of a training that is resumed."""
    _, recipe = teacher
    moved = shutil.copytree(folder, tmp_path / "moved")
    train(dataclasses.replace(recipe, data=str(moved)), tmp_path / "student")

    assert trained_model(tmp_path / "student")[0].epochs_done == 1


def test_a_first_stage_is_taken_whatever_the_routers_are_like(teacher, folder, tmp_path):
    """Those of the other run are not its experts' business, nor is where the images lie."""
    run, recipe = teacher
    moved = shutil.copytree(folder, tmp_path / "moved")
    fields = {"first_stage": str(run), "router_epochs": 1, "router_top_k": 3, "router_hidden": 5, "data": str(moved)}
    train(dataclasses.replace(recipe, teacher="", n_experts=2, **fields), tmp_path / "run")

    ours, theirs = (trained_model(each)[1].net.state_dict() for each in (tmp_path / "run", run))
    assert [name for name in theirs if not ours[name].equal(theirs[name])] == []


def test_a_finished_student_needs_its_teacher_no_more(teacher, tmp_path):
    """Its model is there without the teacher's run, and its routers can still be trained."""
    run, recipe = teacher
    moved = tmp_path / "teacher"
    shutil.copytree(run, moved)
    recipe = dataclasses.replace(recipe, teacher=str(moved), router_epochs=1)
    student = tmp_path / "student"
    train(recipe, student)
    shutil.rmtree(moved)
    assert trained_model(student)[0].epochs_done == 1

    shutil.rmtree(student / "checkpoints" / "routers-0001")
    train(recipe, student)
    assert trained_model(student)[1].routers is not None


def test_a_distilled_training_logs_what_it_learns_from_its_teacher(teacher, tmp_path):
    """The term is there, finite, and the checkpoint holds no weights of the teacher."""
    _, recipe = teacher
    train(recipe, tmp_path / "student")
    metrics = checkpoints_of(tmp_path / "student")["experts"].metrics
    assert math.isfinite(metrics["distillation"])
    assert metrics["distillation"] > 0
    assert metrics["loss"] == pytest.approx(sum(metrics[k] for k in ("individual", "diversity", "distillation")))


def test_routers_that_were_never_trained_are_not_reported(teacher):
    """Neither in the figures nor as a part of the model; its experts are."""
    run, _ = teacher
    results = json.loads((run / "results.json").read_text())
    checkpoint, model = trained_model(run)

    assert len(results["experts"]) == len(model.net.experts) == 2
    assert "routed" not in results
    assert "routed" not in checkpoint.metrics.get("test", {})
    assert model.routers is None


def test_a_teacher_that_does_not_fit_is_refused(teacher, tmp_path):
    """Missing, of other classes, of other images, of another image size."""
    _, recipe = teacher
    with pytest.raises(CheckpointError, match=r"teacher: .*none: no checkpoints there"):
        build(dataclasses.replace(recipe, teacher=str(tmp_path / "none")), TAUGHT, *MEAN_STD)
    with pytest.raises(CheckpointError, match="has classes 4, this training 3"):
        build(recipe, TAUGHT[:3], *MEAN_STD)
    with pytest.raises(CheckpointError, match=r"images by class \[32, 20, 10, 4\], this training \[32, 20, 10, 5\]"):
        build(recipe, [32, 20, 10, 5], *MEAN_STD)
    with pytest.raises(CheckpointError, match="has subset_seed 0, this training 1; it must have seen the same"):
        build(dataclasses.replace(recipe, subset_seed=1), TAUGHT, *MEAN_STD)
    with pytest.raises(CheckpointError, match="has image_size 16, this training 32"):
        build(dataclasses.replace(recipe, image_size=32), TAUGHT, *MEAN_STD)


def test_images_are_mixed_and_gradients_clipped_as_the_recipe_says():
    """In the experts' stage alone; the routers' images stay as they are."""
    recipe = dataclasses.replace(RIDE, mixup=0.8, cutmix=1.0, label_smoothing=0.1, clip_norm=5.0)
    _, (experts, routers) = build(recipe, COUNTS, *MEAN_STD)

    mixing = experts.mixing
    assert (mixing.n_classes, mixing.mixup, mixing.cutmix, mixing.smoothing) == (100, 0.8, 1.0, 0.1)
    assert experts.clip_norm == 5
    assert routers.mixing is routers.clip_norm is None


def test_experts_see_every_image_and_routers_classes_alike():
    """As published: 200 epochs, batches of 128; 5 of 512, a rate along a cosine, a decay of the routers' own."""
    _, (experts, routers) = build(dataclasses.replace(RIDE, weight_decay=1e-4), COUNTS, *MEAN_STD)

    assert (experts.sampler, routers.sampler) == (shuffled, class_balanced)
    assert [(s.epochs, s.batch_size, s.momentum, s.nesterov, s.weight_decay) for s in (experts, routers)] == [
        (200, 128, 0.9, True, 1e-4), (5, 512, 0.9, True, 5e-4)
    ]  # fmt: skip
    assert [routers.lr(epoch) for epoch in range(5)] == pytest.approx(
        [0.005 * (1 + math.cos(math.pi * epoch / 5)) for epoch in range(5)]
    )
