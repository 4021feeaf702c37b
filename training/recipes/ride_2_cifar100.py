"""RIDE with 2 experts on CIFAR-100-LT."""

import dataclasses

from training.recipes.ride_cifar100 import RIDE_CIFAR100

RIDE_2_CIFAR100 = dataclasses.replace(
    RIDE_CIFAR100,
    # RIDE, 2 experts of reduced width, CIFAR-100-LT with imbalance 100, expert assignment.
    # Paper: arXiv:2010.01809, 47.0 % top-1 at 64.8 M.
    # Run:   ride-train ride-2-cifar100      Ours: training/RESULTS.md
    name="ride-2-cifar100", n_experts=2,
)  # fmt: skip
