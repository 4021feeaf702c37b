"""Recipes: overrides, refusals, and what the published ones say."""

import dataclasses
import math
import re
import typing

import pytest

from training.methods.method import scheduled_lr
from training.recipe import Recipe, RecipeError, refuse_without_effect
from training.recipes import RECIPES

# What the methods of one plain expert need of RIDE's recipe.
PLAIN = {
    "n_experts": "1", "diversity_weight": "0", "loss": "ce", "classifier": "linear", "deferred_from": "none",
    "rotation": "0",
}  # fmt: skip


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Recipe)])
def test_every_field_is_described(field):
    """The README sends people there."""
    assert re.search(rf"\b{field}\b", Recipe.__doc__)


@pytest.mark.parametrize(
    "field",
    [field for field, hint in typing.get_type_hints(Recipe).items() if re.search(r"\b(int|float)\b", str(hint))],
)
def test_every_number_has_its_limits(field):
    """Alone, beside None and in a tuple."""
    number = math.nan if isinstance(getattr(RECIPES["ace-cifar100"], field), float | int | None) else (math.nan,)

    with pytest.raises(RecipeError, match=f"^{field}=.*nan.*: (must be|method 'ace' with 3 experts needs) "):
        dataclasses.replace(RECIPES["ace-cifar100"], **{field: number})


def test_overrides_take_the_type_of_the_field():
    """Text from a command line becomes numbers, tuples, booleans, None."""
    recipe = RECIPES["ride-cifar100"].override(
        {
            "epochs": "20",
            "lr": "0.05",
            "lr_drops": "0.5,0.75",
            "compile": "false",
            "mean": "none",
            "std": "none",
            "data": "x",
        }
    )

    assert (recipe.epochs, recipe.lr, recipe.lr_drops, recipe.compile) == (20, 0.05, (0.5, 0.75), False)
    assert (recipe.mean, recipe.std, recipe.data) == (None, None, "x")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": "1"}, "learning_rate: no such recipe field; ride-train --help lists them all"),
        ({"weight_decays": "1"}, "no such recipe field; did you mean weight_decay or "),
        ({"name": ""}, "name='': names a directory"),
        ({"name": "../elsewhere"}, "name='../elsewhere': names a directory"),
        ({"epochs": "many"}, "epochs=many: must be a whole number"),
        ({"lr": "fast"}, "lr=fast: must be a number"),
        ({"epochs": "0"}, "epochs=0: must be from 1"),
        ({"lr": "-0.1"}, "lr=-0.1: must be from"),
        ({"lr": "nan"}, "lr=nan: must be from"),
        ({"n_experts": "7"}, "n_experts=7: must be from 1 to 6"),
        ({"method": "magic"}, "method='magic': must be one of ride, single"),
        ({"profile": "log"}, "profile='log': must be one of exp, step, natural"),
        ({"compile": "maybe"}, "compile=maybe: must be true or false"),
        ({"lr_drops": "0.9,0.8"}, "must be ascending shares"),
        ({"lr_drops": "160,180"}, "must be ascending shares"),
        ({"mean": "none"}, "mean and std: give both"),
        ({"mean": "0.5"}, "must be three numbers"),
        ({"mean": "nan,0,0"}, "must be three numbers"),
        ({"std": "1,inf,1"}, "must be three numbers"),
        ({"std": "0,1,1"}, "must be positive"),
        ({"method": "single"}, "method 'single' trains one expert"),
        ({"warmup_start": "0.5", "schedule": "cosine"}, "warmup_start=0.5: only schedule='step' has it"),
        ({"momentum": "0"}, "momentum=0: Nesterov's momentum must be above 0; or take nesterov=false"),
        ({"lr_min": "0.01"}, "lr_min=0.01: only schedule='cosine' ends there"),
        ({"n_experts": "1"}, "diversity_weight=-0.45: one expert cannot disagree; take 0"),
        ({"method": "single", "n_experts": "1"}, "only for method 'ride', this is 'single'; take 0 and false"),
        (
            {"method": "bbn", "n_experts": "1", "diversity_weight": "0", "deferred_from": "0.5"},
            "deferred_from=0.5: method 'bbn' has no such epoch; take none",
        ),
        (
            PLAIN | {"method": "bbn", "depth_fusion": "true"},
            "depth_fusion=true: method 'bbn' takes the last layers apart; take false",
        ),
        (
            PLAIN | {"method": "lfme", "pretrained": "a.pth"},
            "pretrained=a.pth: method 'lfme' has layers or networks besides, which would begin afresh; take none",
        ),
        (
            PLAIN | {"method": "oltr", "backbone": "swin_t"},
            "backbone='swin_t': method 'oltr' is built for ResNets and ResNeXts",
        ),
        (
            {
                "method": "ace",
                "group_shares": "0.6,0.3",
                "backbone": "swin_t",
                "diversity_weight": "0",
                "classifier": "linear",
                "loss": "ce",
            },
            "backbone='swin_t': all experts share its last norm",
        ),
        ({"loss": "ldam", "classifier": "linear"}, "need the cosine classifier"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    """The message names the field, the value and what is possible."""
    with pytest.raises(RecipeError, match=message.replace("(", r"\(")):
        RECIPES["ride-cifar100"].override(settings)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("ce-cifar100", {"transfer_weight": "3"}, "transfer_weight=3: has no effect on ce-cifar100 without method="),
        ("ce-cifar100", {"mutual_weight": "3"}, "without method='shike'"),
        ("ride-cifar100", {"reversed_tau": "1"}, "without method='sade'"),
        ("bbn-cifar100", {"features_lr_factor": "0.1"}, "without another method"),
        ("lfme-cifar100", {"features_lr_factor": "0.1"}, "without another method"),
        ("shike-cifar100", {"group_answer": "all"}, "without method='ace'"),
        ("sade-cifar100", {"complementary_weight": "2"}, "without method='ace'"),
        ("ce-cifar100", {"oltr_lr": "0.1"}, "without method='oltr'"),
        ("oltr-cifar100", {"lfme_epochs": "3"}, "without method='lfme'"),
        ("ldam-drw-cifar100", {"m2m_gamma": "0.5"}, "without method='m2m'"),
        ("ride-cifar100", {"distill_weight": "2"}, "without a teacher"),
        ("ride-cifar100", {"diversity_gamma": "0.1", "diversity_weight": "0"}, "without a diversity_weight"),
        ("shike-cifar100", {"method": "ride", "diversity_weight": "0.6", "diversity_gamma": "0.1"}, "without deferred"),
        ("ride-cifar100", {"n_experts": "1", "diversity_weight": "0", "collaborative": "true"}, "without two experts"),
        ("ride-2-cifar100", {"router_shared": "true"}, "without three experts or more"),
        ("ce-cifar100", {"retrain_lr": "0.2"}, "without retrain_epochs"),
        ("ce-cifar100", {"retrain": "lws"}, "without retrain_epochs"),
        ("crt-cifar100", {"tau": "1"}, "without retrain='tau_norm'"),
        ("tau-norm-cifar100", {"tau": "1", "retrain_epochs": "0"}, "tau=1: .* without retrain_epochs"),
        ("crt-cifar100", {"ncm_features": "un"}, "without retrain='ncm'"),
        ("ce-cifar100", {"router_lr": "0.1"}, "without routers to train, and router_epochs"),
        ("ride-cifar100", {"router_lr": "0.1", "router_epochs": "0"}, "without routers to train, and router_epochs"),
        ("ce-cifar100", {"max_margin": "0.3"}, "without loss='ldam'"),
        ("ce-cifar100", {"focal_gamma": "2"}, "without a focal loss"),
        ("balanced-softmax-cifar100", {"logit_tau": "2"}, "without loss='logit_adjusted'"),
        (
            "logit-adjustment-cifar100",
            {"logit_tau": "2", "method": "ride", "expert_taus": "1"},
            "without an empty expert_taus",
        ),
        ("ce-cifar100", {"effective_beta": "0.9"}, "without deferred_from"),
        ("shike-cifar100", {"lr_drops": "0.5"}, "without schedule='step'"),
        ("ride-retrained-cifar100", {"lr_drop_factor": "0.5"}, "without schedule='step'"),
        ("ace-cifar100", {"features_lr_factor": "0.1"}, "or 'ace' with group_lr_scaling"),
        ("bbn-cifar100", {"warmup_start": "0.5", "warmup_epochs": "0"}, "warmup_start=0.5: .* without warmup_epochs"),
        ("ce-cifar100", {"cosine_scale": "20"}, "without classifier='cosine'"),
        ("ce-cifar100", {"router_epochs": "3"}, "without several experts"),
        ("ride-swin-t", {"momentum": "0.8"}, "without optimiser='sgd'"),
        ("ride-swin-t", {"crop_padding": "2"}, "without crop='padded'"),
        ("ride-cifar100", {"crop_interpolation": "bicubic"}, "without crop='resized'"),
        ("ace-cifar100", {"group_norm_rows": "all", "group_norm_power": "0"}, "without a group_norm_power"),
        (
            "ace-cifar100",
            {"complementary_form": "length", "complementary_weight": "0"},
            "without a complementary_weight",
        ),
        ("ce-cifar100", {"train_list": "a.txt"}, "without images of your own"),
        ("tau-norm-cifar100", {"retrain_lr": "0.2"}, "without retrain='crt' or 'lws'"),
        ("ncm-cifar100", {"retrain_loss": "ldam"}, "without retrain='crt' or 'lws'"),
        ("ride-own", {"imbalance": "10"}, "without profile='exp' or 'step'"),
        ("ride-cifar100", {"test_share": "0.2"}, "without profile='natural'"),
    ],
)
def test_a_setting_without_effect_is_refused(name, settings, message):
    """Or somebody would compare two trainings that are the same."""
    with pytest.raises(RecipeError, match=message):
        refuse_without_effect([RECIPES[name].override(settings)], settings)


def test_a_setting_need_have_an_effect_on_one_recipe_only():
    """A sweep gives all of its recipes the same ones."""
    settings = {
        "lfme_epochs": "12",
        "focal_gamma": "2",
        "retrain_lr": "0.2",
        "retrain_loss": "ldam",
        "max_margin": "0.4",
    }
    recipes = [
        RECIPES[name].override(settings | {"classifier": "cosine"}) for name in ("focal-cifar100", "crt-cifar100")
    ]
    refuse_without_effect([*recipes, RECIPES["lfme-cifar100"]], settings)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_a_recipe_survives_its_checkpoint(recipe):
    """JSON and back gives the same recipe."""
    import json

    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_ride_recipe_is_the_published_one():
    """What is most easily got wrong: drops at 160 and 180 by 0.01, DRW at 160, rotation, Nesterov, weight decay."""
    from training.methods.method import scheduled_lr

    recipe = RECIPES["ride-cifar100"]

    assert [recipe.epoch_of(share) for share in (*recipe.lr_drops, recipe.deferred_from)] == [160, 180, 160]
    rates = [scheduled_lr(recipe, epoch) for epoch in (0, 4, 5, 159, 160, 180)]
    assert rates == pytest.approx([0.02, 0.1, 0.1, 0.1, 1e-3, 1e-5])
    assert (recipe.nesterov, recipe.weight_decay, recipe.rotation) == (True, 5e-4, 15)
    assert (RECIPES["ldam-drw-cifar100"].weight_decay, RECIPES["ldam-drw-cifar100"].rotation) == (2e-4, 0)


@pytest.mark.parametrize("name", ["ride-imagenet-lt-r10", "ride-imagenet-lt-r50", "ride-imagenet-lt-x50"])
def test_imagenet_lt_recipes_are_the_published_ones(name):
    """Drops at 60 and 80 by 0.1, DRW with the second of them, colour jitter, no rotation."""
    from training.methods.method import scheduled_lr

    recipe = RECIPES[name]

    rates = [scheduled_lr(recipe, epoch) for epoch in (0, 4, 59, 60, 79, 80, 99)]
    assert rates == pytest.approx([0.02, 0.1, 0.1, 0.01, 0.01, 1e-3, 1e-3])
    assert recipe.epoch_of(recipe.deferred_from) == 80
    assert (recipe.batch_size, recipe.weight_decay, recipe.nesterov, recipe.momentum) == (256, 2e-4, True, 0.9)
    assert (recipe.diversity_weight, recipe.diversity_gamma) == (-0.2, 0.02)
    assert (recipe.image_size, recipe.crop, recipe.colour_jitter, recipe.rotation) == (224, "resized", 0.4, 0)
    assert recipe.router_top_k == (30 if name.endswith("r10") else 50)
    assert (recipe.n_experts, recipe.reduced) == (3, True)


def test_sade_on_large_sets_is_as_its_public_configurations_say():
    """Smaller batches along a cosine on ImageNet-LT; RIDE's schedule on iNaturalist; slow features on Places-LT."""
    imagenet, inaturalist, places = (
        RECIPES[f"sade-{where}"] for where in ("imagenet-lt-x50", "inaturalist-r50", "places-lt-r152")
    )
    assert (imagenet.batch_size, imagenet.weight_decay, imagenet.nesterov, imagenet.reversed_tau) == (64, 5e-4, True, 2)
    assert [scheduled_lr(imagenet, epoch) for epoch in (0, 90)] == pytest.approx([0.025, 0.0125])
    assert inaturalist.reversed_tau == 1
    different = {"name", "method", "loss", "reversed_tau", "deferred_from", "diversity_weight", "diversity_gamma"}
    assert set(inaturalist.differences(RECIPES["ride-inaturalist-r50"], ())) == different
    assert [scheduled_lr(places, epoch) for epoch in (0, 9, 10, 20, 29)] == pytest.approx(
        [0.01, 0.01, 1e-3, 1e-4, 1e-4]
    )
    assert (places.features_lr_factor, places.weight_decay, places.reduced) == (0.1, 4e-4, False)
    assert places.reversed_tau == 1
    assert (places.pretrained, places.batch_size, places.epochs) == ("torchvision", 128, 30)
    ride = RECIPES["ride-places-lt-r152"]
    assert ride.epoch_of(ride.deferred_from) == 20


def test_bbn_and_oltr_on_large_sets_are_as_their_public_configurations_say():
    """BBN's is the one of twice the usual epochs; OLTR's classes of the second stage are drawn as on CIFAR."""
    bbn, longer = RECIPES["bbn-inaturalist-r50"], RECIPES["bbn-2x-inaturalist-r50"]
    oltr = RECIPES["oltr-imagenet-lt-r10"]
    assert set(bbn.differences(longer, ())) == {"name", "epochs"}
    rates = [scheduled_lr(longer, epoch) for epoch in (0, 119, 120, 160)]
    assert rates == pytest.approx([0.05, 0.05, 5e-3, 5e-4])
    assert (longer.batch_size, longer.weight_decay, longer.nesterov, longer.colour_jitter) == (128, 1e-4, True, 0)
    assert [scheduled_lr(oltr, epoch) for epoch in (0, 9, 10, 20)] == pytest.approx([0.1, 0.1, 0.01, 1e-3])
    assert (oltr.epochs, oltr.batch_size, oltr.weight_decay, oltr.colour_jitter) == (30, 128, 5e-4, 0.4)
    assert (oltr.oltr_epochs, oltr.oltr_lr, oltr.oltr_classifier_lr) == (60, 0.01, 0.1)


def test_inaturalist_recipe_is_the_published_one():
    """Twice the rate and batch of ImageNet-LT, its own mean and deviation, no colour jitter."""
    recipe = RECIPES["ride-inaturalist-r50"]

    assert (recipe.lr, recipe.batch_size, recipe.diversity_gamma, recipe.colour_jitter) == (0.2, 512, 0.015, 0)
    assert (recipe.mean, recipe.std) == ((0.466, 0.471, 0.380), (0.195, 0.194, 0.192))


def test_features_may_be_slower_under_ace_without_rates_of_its_own():
    """With them, the experts' rates are theirs."""
    settings = {"features_lr_factor": "0.1", "group_lr_scaling": "false"}

    refuse_without_effect([RECIPES["ace-cifar100"].override(settings)], settings)


def test_recipes_on_inaturalist_hold_out_as_little_as_they_can():
    """A hundredth, but one of a class at least: its validation images are the test images already."""
    shares = {recipe.holdout_share for name, recipe in RECIPES.items() if "inaturalist" in name}
    assert shares == {0.01}


@pytest.mark.parametrize(("where", "decay", "epochs"), [("imagenet-lt-x50", 5e-4, 10), ("inaturalist-r50", 1e-4, 30)])
def test_recipes_of_retrained_classifiers_on_large_sets_are_the_published_ones(where, decay, epochs):
    """90 epochs along a cosine from 0.2 to 0 at full width, then classifiers on class-aware samples."""
    first, crt, lws = (RECIPES[f"{method}-{where}"] for method in ("ce", "crt", "lws"))

    rates = [scheduled_lr(first, epoch) for epoch in (0, 45, 89)]
    assert rates == pytest.approx([0.2, 0.1, 0.2 * (1 + math.cos(math.pi * 89 / 90)) / 2])
    assert (first.batch_size, first.weight_decay, first.nesterov, first.reduced) == (512, decay, False, False)
    assert set(first.differences(crt, ("retrain",))) == {"name"}
    assert (crt.retrain_epochs, crt.retrain_lr, crt.retrain_weight_decay, lws.retrain_epochs) == (epochs, 0.2, decay, 5)


@pytest.mark.parametrize(
    "recipe", [recipe for recipe in RECIPES.values() if "distilled" in recipe.name], ids=lambda recipe: recipe.name
)
def test_the_teacher_of_a_distilled_row_is_six_experts_on_the_same_images(recipe):
    """A recipe that is there; beside their number and what distilling needs, nothing is different."""
    teacher = RECIPES[recipe.teacher.removeprefix("runs/")]

    assert teacher.n_experts == 6
    different = {"name", "n_experts", "teacher", "loss_times_experts"}
    assert set(recipe.differences(teacher, ("router_epochs", "warmup_epochs"))) == different


def test_ride_with_four_experts_is_distilled_on_all_sets():
    """As the published rows are; and there are as many experts as their names say."""
    for name in ("cifar100", "imagenet-lt-r50", "imagenet-lt-x50", "inaturalist-r50"):
        assert RECIPES[f"ride-4-distilled-{name}"].n_experts == 4


@pytest.mark.parametrize("method", ["ce", "focal", "cb-focal", "ldam-drw", "bbn"])
def test_baselines_differ_between_cifar_sets_in_their_images_alone(method):
    """Their name, the set and the imbalance."""
    first = RECIPES[f"{method}-cifar100"]
    for where, images in (
        ("cifar100-50", ("cifar100", 50)),
        ("cifar10", ("cifar10", 100)),
        ("cifar10-50", ("cifar10", 50)),
    ):
        recipe = RECIPES[f"{method}-{where}"]
        assert (recipe.data, recipe.imbalance) == images
        assert set(recipe.differences(first, ())) <= {"name", "data", "imbalance"}


def test_a_cosine_of_two_cycles_begins_with_that_of_one():
    """A finished run is the first cycle of a longer one; the second starts at the full rate, without a warm-up."""
    from training.methods.method import scheduled_lr

    once = RECIPES["ride-retrained-cifar100"].override({"epochs": "20", "cycles": "1"})
    twice = once.override({"epochs": "40", "cycles": "2"})

    assert [scheduled_lr(twice, epoch) for epoch in range(20)] == [scheduled_lr(once, epoch) for epoch in range(20)]
    second = [scheduled_lr(twice, epoch) for epoch in range(20, 40)]
    assert second[:1] + second[10:11] == pytest.approx([0.1, 0.05])
    assert second == sorted(second, reverse=True)


@pytest.mark.parametrize(
    ("name", "epochs", "rates"),
    [
        ("ride-distilled-cifar100", 20, {0: 0.01, 9: 0.1, 10: 0.1, 15: 0.1, 16: 1e-3, 18: 1e-5, 19: 1e-5}),
        ("ce-cifar100", 2, {0: 0.1, 1: 0.1}),
        ("ce-cifar100", 1, {0: 0.1}),
        ("ride-swin-t", 20, {0: 1e-4, 9: 1e-3, 10: 1e-3}),
    ],
)
def test_a_short_training_leaves_its_warm_up(name, epochs, rates):
    """Half of the epochs at most, so that what comes after it, comes."""
    recipe = RECIPES[name].override({"epochs": str(epochs)})
    assert {epoch: scheduled_lr(recipe, epoch) for epoch in rates} == pytest.approx(rates)
    assert scheduled_lr(recipe, epochs - 1) <= recipe.lr


def test_a_drop_within_the_warm_up_is_a_drop():
    """Both factors apply, as in RIDE's code."""
    recipe = RECIPES["ride-cifar100"].override({"epochs": "20", "lr_drops": "0.1,0.9"})
    assert [scheduled_lr(recipe, epoch) for epoch in (1, 2, 5)] == pytest.approx([0.04, 0.0006, 0.001])


def test_swin_recipes_are_the_published_ones():
    """20 epochs up to 1e-3, then the cosine to 1e-5; decay and dropped paths by size; diversity as a mean."""
    from training.methods.method import scheduled_lr

    tiny, small = RECIPES["ride-swin-t"], RECIPES["ride-swin-s"]

    rates = [scheduled_lr(tiny, epoch) for epoch in (0, 19, 20, 160, 299)]
    assert rates == pytest.approx([5e-5, 1e-3, 1e-3, 5.05e-4, 1.003e-5], rel=1e-3)
    assert [(r.backbone, r.weight_decay, r.drop_path) for r in (tiny, small)] == [
        ("swin_t", 0.2, 0.2), ("swin_s", 0.3, 0.3)
    ]  # fmt: skip
    assert (tiny.epoch_of(tiny.deferred_from), tiny.diversity_mean, tiny.clip_norm) == (240, True, 5)
    assert (tiny.mixup, tiny.cutmix, tiny.label_smoothing, tiny.random_erasing) == (0.8, 1.0, 0.1, 0.25)
    assert list(tiny.stage_epochs()) == ["experts"]


def test_a_mean_of_the_diversity_is_its_sum_over_the_experts():
    """Divided by their number; the individual losses stay."""
    import torch

    from training.methods.ride import RideLoss
    from training.models.multi_expert import Outputs

    outputs = Outputs(torch.randn(3, 4, 5), torch.zeros(3, 4, 2))
    summed, averaged = (
        RideLoss(RECIPES["ride-cifar100"].override({"diversity_mean": text}), (9, 7, 5, 3, 1))(
            outputs, torch.tensor([0, 1, 2, 3]), 0
        )
        for text in ("false", "true")
    )

    torch.testing.assert_close(averaged["diversity"], summed["diversity"] / 3)
    torch.testing.assert_close(averaged["individual"], summed["individual"])
