"""LFME on CIFAR-100-LT."""

from training.recipe import Recipe

LFME_CIFAR100 = Recipe(
    # Three teachers, one for each split, and a student under the common recipe, CIFAR-100-LT with imbalance 100.
    # Paper: arXiv:2001.01536; 43.8 % top-1 as RIDE's authors report it. Teachers as published for ImageNet-LT;
    # the student's schedule is the common one.
    # Run:   ride-train lfme-cifar100    Ours: training/RESULTS.md
    name="lfme-cifar100", method="lfme", loss="ce", classifier="linear",
)  # fmt: skip
