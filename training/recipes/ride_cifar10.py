"""RIDE on CIFAR-10-LT."""

import dataclasses

from training.recipes.ride_cifar100 import RIDE_CIFAR100

RIDE_CIFAR10 = dataclasses.replace(
    RIDE_CIFAR100,
    # RIDE, 3 experts, CIFAR-10-LT with imbalance 100, expert assignment.
    # Not in the paper; full width and the lower learning rate are what SADE's authors take for ten classes.
    # Run:   ride-train ride-cifar10         Ours: training/RESULTS.md
    name="ride-cifar10", data="cifar10", reduced=False, lr=0.05,
)  # fmt: skip
