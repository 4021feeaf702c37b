"""Tau-normalised classifier on CIFAR-100-LT."""

from training.recipe import Recipe

TAU_NORM_CIFAR100 = Recipe(
    # Cross-entropy, then class weights divided by their length to the power tau, CIFAR-100-LT with imbalance 100.
    # Paper: arXiv:1910.09217; 43.2 % top-1 as RIDE's authors report it. Tau is chosen on held-out images.
    # Run:   ride-train tau-norm-cifar100 --set first_stage=runs/ce-cifar100    Ours: training/RESULTS.md
    #        (without first_stage it trains the same cross-entropy model first)
    name="tau-norm-cifar100", method="single", loss="ce", classifier="linear", retrain="tau_norm", retrain_epochs=1,
)  # fmt: skip
