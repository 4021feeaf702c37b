"""RIDE with 4 experts on CIFAR-100-LT."""

import dataclasses

from training.recipes.ride_cifar100 import RIDE_CIFAR100

RIDE_4_CIFAR100 = dataclasses.replace(
    RIDE_CIFAR100,
    # RIDE, 4 experts of reduced width, CIFAR-100-LT with imbalance 100, expert assignment.
    # Paper: arXiv:2010.01809, 49.1 % top-1 at 91.9 M, with distillation; users: 49.6 %
    # with all experts.
    # Run:   ride-train ride-4-cifar100      Ours: training/RESULTS.md
    name="ride-4-cifar100", n_experts=4,
)  # fmt: skip
