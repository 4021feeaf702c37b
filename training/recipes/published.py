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
    "ride-2-cifar100": (Published("RIDE, arXiv:2010.01809", 47.0, 67.9, 48.4, 21.8, macs=64.8, routed=True),),
    "ride-4-cifar100": (
        Published("RIDE, arXiv:2010.01809, with distillation", 49.1, 69.3, 49.3, 26.0, macs=91.9, routed=True),
    ),
    "ride-6-cifar100": (Published("RIDE's authors, the teacher", 50.2, 69.3, 52.1, 25.8),),
    "ride-distilled-cifar100": (Published("RIDE's authors, later rerun", 49.0, 67.6, 50.9, 25.2, routed=True),),
    "ride-4-distilled-cifar100": (Published("RIDE's authors, later rerun", 49.4, 67.7, 51.3, 25.7, routed=True),),
    "shike-cifar100": (Published("SHIKE, arXiv:2304.01279", 56.3),),
    "shike-cifar100-50": (Published("SHIKE, arXiv:2304.01279", 59.8),),
    "ace-cifar100": (Published("ACE, arXiv:2108.02385, not re-checked", 49.4),),
    "ace-4-cifar100": (Published("ACE, arXiv:2108.02385", 49.6, 66.3, 52.8, 27.2),),
    "ace-cifar100-50": (Published("ACE, arXiv:2108.02385, not re-checked", 50.7),),
    "ace-cifar10": (Published("ACE, arXiv:2108.02385, not re-checked", 81.2),),
    "ace-cifar10-50": (Published("ACE, arXiv:2108.02385, not re-checked", 84.3),),
    "sade-cifar100": (Published("SADE, arXiv:2107.09249", 49.8),),
    "sade-cifar100-50": (Published("SADE, arXiv:2107.09249, not re-checked", 53.9),),
    "ce-cifar100": (
        Published("LDAM, arXiv:1906.07413", 38.3, macs=69.5),
        Published("RIDE, arXiv:2010.01809", 39.1, 66.1, 37.3, 10.6, macs=69.5),
    ),
    "focal-cifar100": (Published("LDAM, arXiv:1906.07413", 38.4, macs=69.5),),
    "cb-focal-cifar100": (Published("class-balanced loss, arXiv:1901.05555", 39.6, macs=69.5),),
    "ldam-drw-cifar100": (
        Published("LDAM, arXiv:1906.07413; splits from RIDE", 42.0, 61.5, 41.7, 20.2, macs=69.5),
    ),
    "oltr-cifar100": (Published("RIDE's authors' run, arXiv:2010.01809", 41.2, 61.8, 41.4, 17.6),),
    "bbn-cifar100": (Published("BBN, arXiv:1912.02413", 42.6, macs=74.3),),
    "crt-cifar100": (Published("RIDE's authors' run, arXiv:2010.01809", 43.3, 64.0, 44.8, 18.1, macs=69.5),),
    "tau-norm-cifar100": (Published("RIDE's authors' run, arXiv:2010.01809", 43.2, 65.7, 43.6, 17.3, macs=69.5),),
    "m2m-cifar100": (Published("M2m, arXiv:2004.00431", 43.5),),
    "lfme-cifar100": (Published("RIDE, arXiv:2010.01809", 43.8),),
    "ride-imagenet-lt-r50": (Published("RIDE, arXiv:2010.01809, with distillation", 54.9, macs=4360.0, routed=True),),
    "ride-imagenet-lt-x50": (
        Published("RIDE's authors, later rerun", 55.7, 67.0, 52.2, 36.0, routed=True),
        Published("RIDE, arXiv:2010.01809, with distillation", 56.4, macs=4690.0, routed=True),
    ),
    "ride-inaturalist-r50": (
        Published("RIDE's authors, later rerun", 71.2, 70.2, 71.2, 71.6, routed=True),
        Published("RIDE, arXiv:2010.01809, with distillation", 72.2, 70.2, 72.2, 72.7, macs=4170.0, routed=True),
    ),
    "ride-swin-t": (Published("RIDE's authors", 54.4, 65.7, 50.7, 35.5),),  # 3 experts; 2: 53.6 (65.0/50.0/34.2)
    "ride-swin-s": (Published("RIDE's authors", 56.2, 67.0, 53.0, 37.5),),  # 3 experts; 2: 56.3 (67.4/52.9/37.0)
}  # fmt: skip
