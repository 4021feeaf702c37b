"""RIDE on CIFAR-10-LT with imbalance 50."""

import dataclasses

from training.recipes.ride_cifar10 import RIDE_CIFAR10

RIDE_CIFAR10_50 = dataclasses.replace(
    RIDE_CIFAR10,
    # RIDE, 3 experts, CIFAR-10-LT with imbalance 50, expert assignment.
    # Not in the paper.
    # Run:   ride-train ride-cifar10-50      Ours: training/RESULTS.md
    name="ride-cifar10-50", imbalance=50,
)  # fmt: skip
