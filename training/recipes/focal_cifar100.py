"""The focal loss on CIFAR-100-LT."""

from training.recipe import Recipe

FOCAL_CIFAR100 = Recipe(
    # Focal loss with gamma 1, one expert of full width, linear classifier, CIFAR-100-LT with imbalance 100.
    # Paper: arXiv:1708.02002; 38.4 % top-1 as LDAM's authors report it, arXiv:1906.07413.
    # Run:   ride-train focal-cifar100    Ours: training/RESULTS.md
    name="focal-cifar100", method="single", loss="focal", focal_gamma=1.0, classifier="linear",
)  # fmt: skip
