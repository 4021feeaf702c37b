"""The class-balanced focal loss on CIFAR-100-LT."""

from training.recipe import Recipe

CB_FOCAL_CIFAR100 = Recipe(
    # Sigmoid focal loss with effective-number class weights throughout, linear classifier, CIFAR-100-LT, imbalance 100.
    # Paper: arXiv:1901.05555, 39.6 % top-1 with this loss, beta 0.9 and gamma 1, chosen by cross-validation. There the
    # classifier's bias does not decay.
    # Run:   ride-train cb-focal-cifar100    Ours: training/RESULTS.md
    name="cb-focal-cifar100", method="single", loss="sigmoid_focal", focal_gamma=1.0, classifier="linear",
    effective_beta=0.9, deferred_from=0.0,  # the weights apply from the first epoch
)  # fmt: skip
