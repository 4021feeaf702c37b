"""RIDE's network with plain experts, stronger views and retrained classifiers, on CIFAR-100-LT."""

from training.recipe import Recipe

RIDE_RETRAINED_CIFAR100 = Recipe(
    # Our own, not a published row: RIDE's three experts of reduced width and its routers, but features learnt by plain
    # cross-entropy under AutoAugment and Cutout in three cosine cycles, then fresh classifiers under balanced softmax,
    # as SHIKE (arXiv:2304.01279) trains its own.
    # Run:   ride-train ride-retrained-cifar100        Ours: training/RESULTS.md
    name="ride-retrained-cifar100", method="ride", n_experts=3, reduced=True,
    nesterov=True, weight_decay=5e-4, epochs=300, schedule="cosine", cycles=3,
    auto_augment=True, cutout=16,
    retrain_epochs=20, retrain_loss="balanced_softmax",
)  # fmt: skip
