"""RIDE on CIFAR-100-LT."""

from training.recipe import Recipe

RIDE_CIFAR100 = Recipe(
    # RIDE, 3 experts of reduced width, CIFAR-100-LT with imbalance 100, expert assignment.
    # Paper: arXiv:2010.01809, 48.0 % top-1 at 77.8 M; the authors' later rerun: 48.6 %.
    # Run:   ride-train ride-cifar100        Ours: training/RESULTS.md
    name="ride-cifar100", method="ride", loss="ldam", n_experts=3, reduced=True,
    nesterov=True, weight_decay=5e-4,
    rotation=15.0,            # RIDE's own; LDAM, BBN and SHIKE have none
    deferred_from=0.8,
    diversity_weight=-0.45,   # negative: experts are paid for disagreeing
)  # fmt: skip
