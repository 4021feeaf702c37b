"""OLTR on CIFAR-100-LT."""

from training.recipe import Recipe

OLTR_CIFAR100 = Recipe(
    # Cross-entropy, then attention and a memory of centroids, CIFAR-100-LT with imbalance 100.
    # Paper: arXiv:1904.05160; 41.2 % top-1 as RIDE's authors report it. Stage 2 as published for
    # ImageNet-LT.
    # Run:   ride-train oltr-cifar100 --set first_stage=runs/ce-cifar100    Ours: training/RESULTS.md
    #        (without first_stage it trains the same cross-entropy model first)
    name="oltr-cifar100", method="oltr", loss="ce", classifier="linear",
)  # fmt: skip
