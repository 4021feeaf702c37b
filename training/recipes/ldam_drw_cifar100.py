"""LDAM with deferred re-weighting on CIFAR-100-LT."""

from training.recipe import Recipe

LDAM_DRW_CIFAR100 = Recipe(
    # LDAM-DRW, one expert of full width, CIFAR-100-LT with imbalance 100.
    # Paper: arXiv:1906.07413, 42.0 % top-1.
    # Run:   ride-train ldam-drw-cifar100    Ours: training/RESULTS.md
    name="ldam-drw-cifar100", method="single", loss="ldam", deferred_from=0.8,
)  # fmt: skip
