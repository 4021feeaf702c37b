"""Classifier retraining, cRT, on CIFAR-100-LT."""

from training.recipe import Recipe

CRT_CIFAR100 = Recipe(
    # Cross-entropy, then a fresh classifier on class-aware samples, CIFAR-100-LT with imbalance 100.
    # Paper: arXiv:1910.09217; 43.3 % top-1 as RIDE's authors report it. Rate, batch and decay are those of ImageNet-LT,
    # the 30 epochs those of iNaturalist: an epoch has 22 batches here.
    # Run:   ride-train crt-cifar100 --set first_stage=runs/ce-cifar100    Ours: training/RESULTS.md
    #        (without first_stage it trains the same cross-entropy model first)
    name="crt-cifar100", method="single", loss="ce", classifier="linear",
    retrain="crt", retrain_epochs=30, retrain_loss="ce", retrain_sampler="class_aware",
    retrain_lr=0.2, retrain_batch_size=512, retrain_weight_decay=5e-4, retrain_warmup_epochs=0,
)  # fmt: skip
