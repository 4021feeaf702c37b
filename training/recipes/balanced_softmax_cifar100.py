"""Balanced softmax on CIFAR-100-LT."""

from training.recipe import Recipe

BALANCED_SOFTMAX_CIFAR100 = Recipe(
    # Balanced softmax, one expert of full width, linear classifier, CIFAR-100-LT with imbalance 100.
    # Paper: arXiv:2007.10740. The 50.8 % that others report has AutoAugment, Cutout and 400 epochs; under this common
    # recipe there is no published figure.
    # Run:   ride-train balanced-softmax-cifar100    Ours: training/RESULTS.md
    name="balanced-softmax-cifar100", method="single", loss="balanced_softmax", classifier="linear",
)  # fmt: skip
