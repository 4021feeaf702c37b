"""Nearest class mean on CIFAR-100-LT."""

from training.recipe import Recipe

NCM_CIFAR100 = Recipe(
    # Cross-entropy, then the nearest class mean of the features, CIFAR-100-LT with imbalance 100.
    # Paper: arXiv:1910.09217, which has no figure for this set. The kind of features is chosen on held-out images.
    # Run:   ride-train ncm-cifar100 --set first_stage=runs/ce-cifar100    Ours: training/RESULTS.md
    #        (without first_stage it trains the same cross-entropy model first)
    name="ncm-cifar100", method="single", loss="ce", classifier="linear", retrain="ncm", retrain_epochs=1,
)  # fmt: skip
