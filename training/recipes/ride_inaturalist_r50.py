"""RIDE on iNaturalist 2018 with ResNet-50."""

from training.recipe import Recipe

RIDE_INATURALIST_R50 = Recipe(
    # RIDE, 3 experts of reduced width, ResNet-50, iNaturalist 2018 by its list files, expert assignment.
    # Its validation images are the test images, so training images are held out, here and in all recipes on this set:
    # one of a class, or a hundredth, on which published rows train, too. Classes of 20 and of 101 change their split.
    # Paper: arXiv:2010.01809, 72.2 % top-1 at 4.17 G with distillation; the authors' page has 71.2 % without.
    # Run:   ride-train ride-inaturalist-r50 --data path/to/inaturalist-2018
    name="ride-inaturalist-r50", method="ride", loss="ldam", data="", profile="natural", holdout_share=0.01,
    image_size=224, mean=(0.466, 0.471, 0.380), std=(0.195, 0.194, 0.192), backbone="resnet50",
    n_experts=3, reduced=True,
    epochs=100, batch_size=512, lr=0.2, nesterov=True, weight_decay=2e-4,
    lr_drops=(0.6, 0.8), lr_drop_factor=0.1,
    crop="resized", test_fit="inner_crop",
    deferred_from=0.8, diversity_weight=-0.2, diversity_gamma=0.015,
    router_top_k=50,
)  # fmt: skip
