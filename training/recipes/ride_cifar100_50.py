"""RIDE on CIFAR-100-LT with imbalance 50."""

import dataclasses

from training.recipes.ride_cifar100 import RIDE_CIFAR100

RIDE_CIFAR100_50 = dataclasses.replace(
    RIDE_CIFAR100,
    # RIDE, 3 experts of reduced width, CIFAR-100-LT with imbalance 50, expert assignment.
    # Not in the paper.
    # Run:   ride-train ride-cifar100-50     Ours: training/RESULTS.md
    name="ride-cifar100-50", imbalance=50,
)  # fmt: skip
