"""RIDE with other numbers of experts on ImageNet-LT and iNaturalist 2018: the distilled rows, and their teachers."""

import dataclasses

from training.recipes.ride_imagenet_lt_r50 import RIDE_IMAGENET_LT_R50
from training.recipes.ride_imagenet_lt_x50 import RIDE_IMAGENET_LT_X50
from training.recipes.ride_inaturalist_r50 import RIDE_INATURALIST_R50
from training.recipes.ride_swin_s import RIDE_SWIN_S
from training.recipes.ride_swin_t import RIDE_SWIN_T

THREE_EXPERTS = (RIDE_IMAGENET_LT_R50, RIDE_IMAGENET_LT_X50, RIDE_INATURALIST_R50)

RIDE_LARGE = (
    # Paper: arXiv:2010.01809, whose rows on these sets are distilled from six experts; figures: published.py.
    # Run:   ride-train ride-6-imagenet-lt-r50 --data path/to/imagenet-lt
    #        ride-train ride-3-distilled-imagenet-lt-r50 --data path/to/imagenet-lt, and so on
    *(
        dataclasses.replace(three, name=three.name.replace("ride", "ride-6", 1), n_experts=6, router_epochs=0)
        for three in THREE_EXPERTS
    ),
    *(
        dataclasses.replace(
            three,
            name=three.name.replace("ride", f"ride-{n_experts}-distilled", 1),
            n_experts=n_experts,
            teacher=f"runs/{three.name.replace('ride', 'ride-6', 1)}",
            loss_times_experts=True,  # as the public code; that it warms up for longer is known of CIFAR only
        )
        for three in THREE_EXPERTS
        for n_experts in (2, 3, 4)
    ),
    *(
        dataclasses.replace(three, name=three.name.replace("ride", "ride-2", 1), n_experts=2)
        for three in (RIDE_SWIN_T, RIDE_SWIN_S)
    ),
)
