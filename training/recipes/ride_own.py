"""RIDE on a user's own images."""

from training.recipe import Recipe

RIDE_OWN = Recipe(
    # RIDE, 3 experts, on a folder of class folders or a parquet set as unevenly filled as it is.
    # Not a published row: the CIFAR recipe with the data's own frequencies, mean and deviation, and milder rotation.
    # Run:   ride-train ride-own --data path/to/folder
    name="ride-own", method="ride", loss="ldam", data="", profile="natural", mean=None, std=None,
    n_experts=3, reduced=True, nesterov=True, weight_decay=5e-4, rotation=10.0,
    deferred_from=0.8, diversity_weight=-0.45,
)  # fmt: skip
