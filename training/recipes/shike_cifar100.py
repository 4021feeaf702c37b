"""SHIKE on CIFAR-100-LT."""

from training.recipe import Recipe

SHIKE_CIFAR100 = Recipe(
    # SHIKE, 3 experts, CIFAR-100-LT with imbalance 100: 180 epochs of experts, 20 of balanced classifiers.
    # Paper: arXiv:2304.01279, 56.3 % top-1 with all experts; its log has 48.1 % before the classifiers are retrained.
    # The routers after them are ours. Its code takes the first images of each class in the order of CIFAR's archive,
    # which is as good as random; files sorted by name begin with images of one kind, so here they are drawn.
    # AutoAugment is torchvision's, which turns both ways, shears without interpolation, and shifts by whole pixels; the
    # authors' file does none of these. Half of the turned images, 1.4 % of all, turn the other way.
    # Run:   ride-train shike-cifar100       Ours: training/RESULTS.md
    name="shike-cifar100", method="shike", loss="ce", n_experts=3, depth_fusion=True,
    auto_augment=True, cutout=16,
    epochs=180, schedule="cosine", lr=0.15, weight_decay=5e-4,
    retrain_epochs=20, retrain_lr=0.1, retrain_loss="balanced_softmax",
)  # fmt: skip
