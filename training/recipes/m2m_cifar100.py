"""M2m on CIFAR-100-LT."""

from training.recipe import Recipe

M2M_CIFAR100 = Recipe(
    # LDAM, and from epoch 160 images translated into rare classes, CIFAR-100-LT with imbalance 100.
    # Paper: arXiv:2004.00431, 43.5 % top-1 with LDAM as the loss. Beta, lambda and gamma as published for CIFAR-10-LT.
    # The images of a class are drawn; the public code takes the first ones in the file.
    # Run:   ride-train m2m-cifar100 --set first_stage=runs/ce-cifar100    Ours: training/RESULTS.md
    #        (without first_stage it trains the same cross-entropy generator first)
    name="m2m-cifar100", method="m2m", loss="ldam",
)  # fmt: skip
