"""Learnable weight scaling, LWS, on CIFAR-100-LT."""

from training.recipe import Recipe

LWS_CIFAR100 = Recipe(
    # Cross-entropy, then one learnt scale per class on class-aware samples, CIFAR-100-LT with imbalance 100.
    # Paper: arXiv:1910.09217, which has no figure for this set; on ImageNet-LT LWS is within a point of cRT.
    # Run:   ride-train lws-cifar100 --set first_stage=runs/ce-cifar100    Ours: training/RESULTS.md
    #        (without first_stage it trains the same cross-entropy model first)
    name="lws-cifar100", method="single", loss="ce", classifier="linear",
    retrain="lws", retrain_epochs=5, retrain_loss="ce", retrain_sampler="class_aware",
    retrain_lr=0.2, retrain_batch_size=512, retrain_weight_decay=5e-4, retrain_warmup_epochs=0,
)  # fmt: skip
