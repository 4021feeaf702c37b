"""Plain cross-entropy on CIFAR-100-LT."""

from training.recipe import Recipe

CE_CIFAR100 = Recipe(
    # Cross-entropy, one expert of full width, linear classifier, CIFAR-100-LT with imbalance 100.
    # Published: 38.3 % top-1 (LDAM's paper), 39.1 % (RIDE's authors).
    # Run:   ride-train ce-cifar100          Ours: training/RESULTS.md
    name="ce-cifar100", method="single", loss="ce", classifier="linear",
)  # fmt: skip
