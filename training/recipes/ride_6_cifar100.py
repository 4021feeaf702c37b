"""RIDE with 6 experts on CIFAR-100-LT: the teacher of the distilled rows."""

import dataclasses

from training.recipes.ride_cifar100 import RIDE_CIFAR100

RIDE_6_CIFAR100 = dataclasses.replace(
    RIDE_CIFAR100,
    # RIDE, 6 experts of reduced width, CIFAR-100-LT with imbalance 100; published with all experts.
    # Source: the authors' model zoo, 50.2 % top-1 at 178.1 M.
    # Run:   ride-train ride-6-cifar100      Ours: training/RESULTS.md
    name="ride-6-cifar100", n_experts=6,
)  # fmt: skip
