"""ACE with 4 experts on CIFAR-100-LT."""

import dataclasses

from training.recipes.ace_cifar100 import ACE_CIFAR100

ACE_4_CIFAR100 = dataclasses.replace(
    ACE_CIFAR100,
    # ACE, 4 experts, CIFAR-100-LT with imbalance 100; the fourth group is a choice of ours.
    # Paper: arXiv:2108.02385, 49.6 % top-1.
    # Run:   ride-train ace-4-cifar100       Ours: training/RESULTS.md
    name="ace-4-cifar100", n_experts=4, group_shares=(0.65, 0.3, 0.15),
)  # fmt: skip
