"""RIDE on ImageNet-LT with ResNet-50."""

from training.recipe import IMAGENET_MEAN, IMAGENET_STD, Recipe

RIDE_IMAGENET_LT_R50 = Recipe(
    # RIDE, 3 experts of reduced width, ResNet-50, ImageNet-LT by its list files, expert assignment.
    # Paper: arXiv:2010.01809, 54.9 % top-1 at 4.36 G with distillation; users report 51.8 to 53.3 % without.
    # Run:   ride-train ride-imagenet-lt-r50 --data path/to/imagenet-lt
    name="ride-imagenet-lt-r50", method="ride", loss="ldam", data="", profile="natural",
    image_size=224, mean=IMAGENET_MEAN, std=IMAGENET_STD, backbone="resnet50", n_experts=3, reduced=True,
    epochs=100, batch_size=256, lr=0.1, nesterov=True, weight_decay=2e-4,
    lr_drops=(0.6, 0.8), lr_drop_factor=0.1,
    crop="resized", colour_jitter=0.4, test_fit="inner_crop",
    deferred_from=0.8,        # with the second drop; on CIFAR it is the first
    diversity_weight=-0.2, diversity_gamma=0.02,
    router_top_k=50,
)  # fmt: skip
