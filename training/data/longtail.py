"""Long-tailed subsets of balanced sets, and which classes count as many, medium and few."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

MANY_ABOVE = 100
FEW_BELOW = 20
SPLITS = ("many", "medium", "few")
SCOPES = ("all", *SPLITS)  # what figures are of


def class_counts(n_max: int, imbalance: float, n_classes: int, profile: Literal["exp", "step"] = "exp") -> list[int]:
    """
    How many images each class keeps.

    exp: n_c = ⌊n_max · (1/imbalance)^(c/(C−1))⌋. The power is computed directly: raising the ratio of neighbours to c,
    as some code does, loses an image where the exact value is whole. step: the second half has ⌊n_max/imbalance⌋.

    Raises:
        ValueError: where the rarest class would be left without an image.

    Source: LDAM, arXiv:1906.07413, section 4; profile as in its public code.
    """
    if profile == "exp":
        last = max(n_classes - 1, 1)
        counts = [int(n_max * (1.0 / imbalance) ** (c / last) + 1e-9) for c in range(n_classes)]  # 49/49 is 1
    else:
        counts = [n_max] * (n_classes // 2) + [int(n_max / imbalance)] * (n_classes - n_classes // 2)
    if min(counts) < 1:
        raise ValueError(
            f"imbalance={imbalance:g} with n_max={n_max} leaves the rarest class without an image; "
            f"the factor can be {n_max} at most"
        )
    return counts


def rarest_first(class_counts: Sequence[int]) -> list[int]:
    """The labels by frequency; of classes of the same size the one with the higher index counts as the rarer."""
    return sorted(range(len(class_counts)), key=lambda label: (class_counts[label], -label))


def draw_subset(
    labels: np.ndarray, counts: Sequence[int], seed: int, order: Literal["shuffled", "first"] = "shuffled"
) -> np.ndarray:
    """
    The positions of a long-tailed subset, class by class.

    "shuffled" is the draw of LDAM, RIDE and BBN: a legacy Mersenne Twister, one permutation per class in increasing
    label order over the class's positions in file order. "first" is SHIKE's and M2m's: the first in file order,
    which must say nothing about the images: sorted by name, the first whales may be of one kind alone.

    Args:
        labels: (N,), integers from 0.
        counts: (C,), images to keep.
        seed: of the generator; LDAM's is 0.

    Returns:
        (sum of counts,), positions into `labels`.

    Raises:
        ValueError: where a class has fewer images than asked for.
    """
    generator = np.random.RandomState(seed)
    chosen = []
    for label, count in enumerate(counts):
        positions = np.flatnonzero(labels == label)
        if len(positions) < count:
            raise ValueError(f"class {label} has {len(positions)} images, the profile asks for {count}; lower n_max")
        if order == "shuffled":
            generator.shuffle(positions)
        chosen.append(positions[:count])
    return np.concatenate(chosen)


def split_of(count: int) -> str:
    """The split of a class with `count` training images: many > 100, few < 20, medium between (RIDE's bounds)."""
    if count > MANY_ABOVE:
        return "many"
    return "few" if count < FEW_BELOW else "medium"
