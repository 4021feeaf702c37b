"""SADE and ACE on ImageNet-LT and iNaturalist 2018, SADE and RIDE on Places-LT."""

import dataclasses

from training.recipe import IMAGENET_MEAN, IMAGENET_STD, Recipe
from training.recipes.ride_imagenet_lt_r50 import RIDE_IMAGENET_LT_R50
from training.recipes.ride_inaturalist_r50 import RIDE_INATURALIST_R50

SADE_IMAGENET_LT_X50 = Recipe(
    # SADE, 3 experts of reduced width, ResNeXt-50, ImageNet-LT, tested by the mean of the experts.
    # Paper: arXiv:2107.09249; its authors' page has 58.8 % top-1 at 6.08 G. The routers are ours.
    # Run:   ride-train sade-imagenet-lt-x50 --data path/to/imagenet-lt
    name="sade-imagenet-lt-x50", method="sade", loss="ce", data="", profile="natural",
    image_size=224, mean=IMAGENET_MEAN, std=IMAGENET_STD, backbone="resnext50", n_experts=3, reduced=True,
    epochs=180, batch_size=64, lr=0.025, schedule="cosine", warmup_epochs=0, nesterov=True, weight_decay=5e-4,
    crop="resized", colour_jitter=0.4, test_fit="inner_crop",
    router_top_k=50,
)  # fmt: skip

SADE_INATURALIST_R50 = dataclasses.replace(
    # All else as RIDE there.
    RIDE_INATURALIST_R50, name="sade-inaturalist-r50", method="sade", loss="ce", reversed_tau=1.0,
    deferred_from=None, diversity_weight=0.0, diversity_gamma=Recipe.diversity_gamma,
)  # fmt: skip

SADE_PLACES_LT_R152 = Recipe(
    # SADE, 3 experts of full width with three stages in common, pre-trained ResNet-152, Places-LT by its list files.
    # Its public configuration says that the third stage is not shared; its table's 13.18 G are those of one that is.
    # The pre-trained weights are torchvision's newest (IMAGENET1K_V2); the authors' are Caffe's.
    # Run:   ride-train sade-places-lt-r152 --data path/to/places-lt
    name="sade-places-lt-r152", method="sade", loss="ce", data="", profile="natural",
    image_size=224, mean=IMAGENET_MEAN, std=IMAGENET_STD, backbone="resnet152", pretrained="torchvision",
    n_experts=3, share_stage3=True, reversed_tau=1.0,
    epochs=30, batch_size=128, lr=0.01, features_lr_factor=0.1, warmup_epochs=0, nesterov=True, weight_decay=4e-4,
    lr_drops=(1 / 3, 2 / 3), lr_drop_factor=0.1,
    crop="resized", colour_jitter=0.4, test_fit="inner_crop",
    router_top_k=50,
)  # fmt: skip

RIDE_PLACES_LT_R152 = dataclasses.replace(
    # RIDE in the same setting, which SADE's authors report; its own settings there are not published, so that the loss
    # is that of ImageNet-LT, with the class weights from the second drop on, as there.
    SADE_PLACES_LT_R152, name="ride-places-lt-r152", method="ride", loss="ldam", deferred_from=2 / 3,
    reversed_tau=RIDE_IMAGENET_LT_R50.reversed_tau,
    diversity_weight=RIDE_IMAGENET_LT_R50.diversity_weight, diversity_gamma=RIDE_IMAGENET_LT_R50.diversity_gamma,
)  # fmt: skip

ACE_IMAGENET_LT_R50 = dataclasses.replace(
    # ACE, 3 experts of full width, for all classes, the 615 and the 136 rarest. Its paper's settings are not known to
    # us, not even the number of experts: schedule and views are RIDE's, the loss is that of `ace-cifar100`, but its
    # second term weighs less: with features of 2048 numbers the second expert would diverge within a few steps.
    # Paper: arXiv:2108.02385; figures: published.py. The routers are ours.
    # Run:   ride-train ace-imagenet-lt-r50 --data path/to/imagenet-lt
    RIDE_IMAGENET_LT_R50, name="ace-imagenet-lt-r50", method="ace", loss="ce", classifier="linear", reduced=False,
    group_shares=(0.615, 0.136), complementary_weight=0.01,
    deferred_from=None, diversity_weight=0.0, diversity_gamma=Recipe.diversity_gamma, nesterov=False,
)  # fmt: skip

ACE_INATURALIST_R50 = dataclasses.replace(
    ACE_IMAGENET_LT_R50, name="ace-inaturalist-r50", group_shares=(0.897, 0.396), complementary_weight=0.003,
    holdout_share=RIDE_INATURALIST_R50.holdout_share, mean=RIDE_INATURALIST_R50.mean, std=RIDE_INATURALIST_R50.std,
    colour_jitter=0.0, batch_size=RIDE_INATURALIST_R50.batch_size, lr=RIDE_INATURALIST_R50.lr,
)  # fmt: skip

MULTI_EXPERT_LARGE = (
    SADE_IMAGENET_LT_X50, SADE_INATURALIST_R50, SADE_PLACES_LT_R152, RIDE_PLACES_LT_R152,
    ACE_IMAGENET_LT_R50,
    dataclasses.replace(ACE_IMAGENET_LT_R50, name="ace-imagenet-lt-x50", backbone="resnext50"),
    ACE_INATURALIST_R50,
)  # fmt: skip
