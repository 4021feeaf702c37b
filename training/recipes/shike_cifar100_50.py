"""SHIKE on CIFAR-100-LT with imbalance 50."""

import dataclasses

from training.recipes.shike_cifar100 import SHIKE_CIFAR100

SHIKE_CIFAR100_50 = dataclasses.replace(
    SHIKE_CIFAR100,
    # SHIKE, 3 experts, CIFAR-100-LT with imbalance 50.
    # Paper: arXiv:2304.01279, 59.8 % top-1 with all experts.
    # Run:   ride-train shike-cifar100-50    Ours: training/RESULTS.md
    name="shike-cifar100-50", imbalance=50,
)  # fmt: skip
