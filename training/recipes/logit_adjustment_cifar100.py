"""Logit adjustment on CIFAR-100-LT."""

from training.recipe import Recipe

LOGIT_ADJUSTMENT_CIFAR100 = Recipe(
    # The logit-adjusted loss with tau 1, one expert of full width, linear classifier, CIFAR-100-LT with imbalance 100.
    # Paper: arXiv:2007.07314, which has its own recipe. With tau 1 the loss is that of balanced softmax.
    # Run:   ride-train logit-adjustment-cifar100    Ours: training/RESULTS.md
    name="logit-adjustment-cifar100", method="single", loss="logit_adjusted", logit_tau=1.0, classifier="linear",
)  # fmt: skip
