"""RIDE's network, each expert taught by SHIKE, on CIFAR-100-LT."""

from training.recipe import Recipe

RIDE_TAUGHT_CIFAR100 = Recipe(
    # Our own, not a published row: RIDE's three experts of reduced width and its routers, but balanced softmax, and
    # each expert learns from the mean logits of SHIKE (arXiv:2304.01279), which ends with balanced classifiers.
    # Run:   ride-train shike-cifar100, then ride-train ride-taught-cifar100
    # Ours:  training/RESULTS.md, on other images, as its teacher there
    name="ride-taught-cifar100", method="ride", loss="balanced_softmax", n_experts=3, reduced=True,
    nesterov=True, weight_decay=5e-4, epochs=120, schedule="cosine",
    auto_augment=True, cutout=16, mixup=0.2,
    teacher="runs/shike-cifar100", distill_each=True, distill_temperature=2.0, distill_weight=4.0,
)  # fmt: skip
