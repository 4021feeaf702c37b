"""ACE on CIFAR-10-LT with imbalance 50."""

import dataclasses

from training.recipes.ace_cifar10 import ACE_CIFAR10

ACE_CIFAR10_50 = dataclasses.replace(
    ACE_CIFAR10,
    # ACE, 3 experts, CIFAR-10-LT with imbalance 50.
    # Paper: arXiv:2108.02385, 84.3 % top-1; with four experts 84.9 %.
    # Run:   ride-train ace-cifar10-50       Ours: training/RESULTS.md
    name="ace-cifar10-50", imbalance=50,
)  # fmt: skip
