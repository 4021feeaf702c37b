"""SADE on CIFAR-100-LT."""

from training.recipe import Recipe

SADE_CIFAR100 = Recipe(
    # SADE, 3 experts of reduced width, CIFAR-100-LT with imbalance 100, tested by the mean of the experts.
    # Paper: arXiv:2107.09249, 49.8 % top-1. The routers after it are ours.
    # Run:   ride-train sade-cifar100        Ours: training/RESULTS.md
    name="sade-cifar100", method="sade", loss="ce", n_experts=3, reduced=True,
    nesterov=True, weight_decay=5e-4, rotation=15.0,
    lr_drop_factor=0.1,  # RIDE, on whose code it is built, has 0.01
)  # fmt: skip
