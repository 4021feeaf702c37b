"""RIDE's network, each expert taught by SHIKE and by an earlier training of its own, on CIFAR-100-LT."""

from training.recipe import Recipe

RIDE_TAUGHT_CIFAR100 = Recipe(
    # Our own, not a published row: RIDE's three experts of reduced width and its routers, going on from the layers of
    # ride-retrained-cifar100 under balanced softmax; each expert learns from the mean logits of that run and of SHIKE
    # (arXiv:2304.01279); then fresh classifiers, as both of them have. Its routers weigh both answers alike and learn
    # for longer: RIDE's, as published, spend more experts for the same accuracy.
    # Run:   ride-train ride-retrained-cifar100, ride-train shike-cifar100, then ride-train ride-taught-cifar100
    # Ours:  training/RESULTS.md; the model that ships
    name="ride-taught-cifar100", method="ride", loss="balanced_softmax", n_experts=3, reduced=True,
    nesterov=True, weight_decay=5e-4, epochs=80, schedule="cosine",
    auto_augment=True, cutout=16, mixup=0.2,
    pretrained="runs/ride-retrained-cifar100",
    teacher="runs/shike-cifar100,runs/ride-retrained-cifar100",
    distill_each=True, distill_temperature=2.0, distill_weight=4.0,
    retrain_epochs=20, retrain_loss="balanced_softmax",
    router_epochs=30, router_positive_weight=1.0,
)  # fmt: skip
