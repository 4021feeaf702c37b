"""BBN on CIFAR-100-LT."""

from training.recipe import Recipe

BBN_CIFAR100 = Recipe(
    # Two branches with cumulative learning, CIFAR-100-LT with imbalance 100.
    # Paper: arXiv:1912.02413, 42.6 % top-1 at 74.3 M. The public configuration is for imbalance 50; Nesterov's momentum
    # is as in the public code.
    # Run:   ride-train bbn-cifar100    Ours: training/RESULTS.md
    name="bbn-cifar100", method="bbn", loss="ce", classifier="linear", nesterov=True,
    warmup_start=1 / 3, lr_drops=(0.6, 0.8),  # at epochs 120 and 160
)  # fmt: skip
