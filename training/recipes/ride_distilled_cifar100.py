"""RIDE with 3 experts, distilled, on CIFAR-100-LT."""

import dataclasses

from training.recipes.ride_cifar100 import RIDE_CIFAR100

RIDE_DISTILLED_CIFAR100 = dataclasses.replace(
    RIDE_CIFAR100,
    # RIDE, 3 experts that also learn from the mean logits of six, CIFAR-100-LT with imbalance 100, expert assignment.
    # Source: the authors' model zoo, 49.0 % top-1.
    # Run:   ride-train ride-6-cifar100, then ride-train ride-distilled-cifar100      Ours: training/RESULTS.md
    name="ride-distilled-cifar100", teacher="runs/ride-6-cifar100",
    loss_times_experts=True,  # as the public code, which also warms up for longer
    warmup_epochs=20,
)  # fmt: skip
