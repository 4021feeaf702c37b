"""RIDE on ImageNet-LT with ResNeXt-50."""

import dataclasses

from training.recipes.ride_imagenet_lt_r50 import RIDE_IMAGENET_LT_R50

RIDE_IMAGENET_LT_X50 = dataclasses.replace(
    # RIDE, 3 experts of reduced width, ResNeXt-50 (32x4d), ImageNet-LT; all else as with ResNet-50.
    # Paper: arXiv:2010.01809, 56.4 % top-1 at 4.69 G with distillation; the authors' page has 55.7 % without.
    # Run:   ride-train ride-imagenet-lt-x50 --data path/to/imagenet-lt
    RIDE_IMAGENET_LT_R50, name="ride-imagenet-lt-x50", backbone="resnext50",
)  # fmt: skip
