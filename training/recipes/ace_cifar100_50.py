"""ACE on CIFAR-100-LT with imbalance 50."""

import dataclasses

from training.recipes.ace_cifar100 import ACE_CIFAR100

ACE_CIFAR100_50 = dataclasses.replace(
    ACE_CIFAR100,
    # ACE, 3 experts, for all classes, the 59 and the 18 rarest, CIFAR-100-LT with imbalance 50.
    # Paper: arXiv:2108.02385, 50.7 % top-1; with four experts 51.9 %.
    # Run:   ride-train ace-cifar100-50      Ours: training/RESULTS.md
    name="ace-cifar100-50", imbalance=50, group_shares=(0.59, 0.18),
)  # fmt: skip
