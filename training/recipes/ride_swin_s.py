"""RIDE on ImageNet-LT with Swin-S."""

import dataclasses

from training.recipes.ride_swin_t import RIDE_SWIN_T

RIDE_SWIN_S = dataclasses.replace(
    # RIDE, 3 experts of reduced width, Swin-S, ImageNet-LT, no routers; all else as with Swin-T.
    # Published by the authors: 56.2 % top-1 (many 67.0, medium 53.0, few 37.5); 56.3 % with 2 experts.
    # Run:   ride-train ride-swin-s --data path/to/imagenet-lt
    RIDE_SWIN_T, name="ride-swin-s", backbone="swin_s", drop_path=0.3, weight_decay=0.3,
)  # fmt: skip
