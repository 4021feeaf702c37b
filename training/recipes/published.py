"""What the recipes' papers report, to stand beside what was measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """
    One row of a published table. Accuracies are percent on the test images; None: not stated.

    Attributes:
        source: paper, or whose rerun it is.
        all, many, medium, few: means of per-class accuracies, over all classes and by split.
        macs: mean multiply-accumulates of an image, millions.
        routed: routers chose the number of experts; else every expert ran.
    """

    source: str
    all: float
    many: float | None = None
    medium: float | None = None
    few: float | None = None
    macs: float | None = None
    routed: bool = False


# By name of the recipe; the row that a recipe aims at comes first.
PUBLISHED: dict[str, tuple[Published, ...]] = {
    "ride-cifar100": (
        Published("RIDE, arXiv:2010.01809", 48.0, 68.1, 49.2, 23.9, macs=77.8, routed=True),
        Published("its authors' later rerun", 48.6, 67.0, 49.9, 25.7, routed=True),
    ),
    "ldam-drw-cifar100": (
        Published("LDAM, arXiv:1906.07413; splits from RIDE", 42.0, 61.5, 41.7, 20.2, macs=69.5),
    ),
    "ce-cifar100": (
        Published("LDAM, arXiv:1906.07413", 38.3, macs=69.5),
        Published("RIDE, arXiv:2010.01809", 39.1, 66.1, 37.3, 10.6, macs=69.5),
    ),
}  # fmt: skip
