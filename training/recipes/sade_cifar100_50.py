"""SADE on CIFAR-100-LT with imbalance 50."""

import dataclasses

from training.recipes.sade_cifar100 import SADE_CIFAR100

SADE_CIFAR100_50 = dataclasses.replace(
    SADE_CIFAR100,
    # SADE, 3 experts of reduced width, CIFAR-100-LT with imbalance 50.
    # Paper: arXiv:2107.09249, 53.9 % top-1.
    # Run:   ride-train sade-cifar100-50     Ours: training/RESULTS.md
    name="sade-cifar100-50", imbalance=50,
)  # fmt: skip
