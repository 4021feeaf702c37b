"""The class-balanced focal loss on CIFAR-100-LT."""

from training.recipe import Recipe

CB_FOCAL_CIFAR100 = Recipe(
    # Focal loss with effective-number class weights throughout, linear classifier, CIFAR-100-LT with imbalance 100.
    # Paper: arXiv:1901.05555, 39.6 % top-1, with a sigmoid focal loss and gamma from 0.5, 1, 2; here softmax, gamma 1.
    # Run:   ride-train cb-focal-cifar100    Ours: training/RESULTS.md
    name="cb-focal-cifar100", method="single", loss="focal", focal_gamma=1.0, classifier="linear",
    deferred_from=0.0,  # the weights apply from the first epoch
)  # fmt: skip
