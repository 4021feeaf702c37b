"""RIDE on ImageNet-LT with ResNet-10."""

import dataclasses

from training.recipes.ride_imagenet_lt_r50 import RIDE_IMAGENET_LT_R50

RIDE_IMAGENET_LT_R10 = dataclasses.replace(
    # RIDE, 3 experts of reduced width, ResNet-10, ImageNet-LT; all else as with ResNet-50 but for the routers' input.
    # Source: the authors' public configuration; no figure of it is in the paper's tables that we know.
    # Run:   ride-train ride-imagenet-lt-r10 --data path/to/imagenet-lt
    RIDE_IMAGENET_LT_R50, name="ride-imagenet-lt-r10", backbone="resnet10", router_top_k=30,
)  # fmt: skip
