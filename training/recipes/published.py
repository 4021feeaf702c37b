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


RIDE = "RIDE, arXiv:2010.01809"
ACE = "ACE, arXiv:2108.02385"
LDAM = "LDAM, arXiv:1906.07413"
CB_FOCAL = "class-balanced loss, arXiv:1901.05555"
BBN = "BBN, arXiv:1912.02413"
M2M = "M2m, arXiv:2004.00431"
DECOUPLED = "decoupling, arXiv:1910.09217"
UNCHECKED = ", not re-checked"

# By name of the recipe; the row that a recipe aims at comes first.
PUBLISHED: dict[str, tuple[Published, ...]] = {
    "ride-cifar100": (
        Published(RIDE, 48.0, 68.1, 49.2, 23.9, macs=77.8, routed=True),
        Published("its authors' later rerun", 48.6, 67.0, 49.9, 25.7, routed=True),
    ),
    "ride-2-cifar100": (Published(RIDE, 47.0, 67.9, 48.4, 21.8, macs=64.8, routed=True),),
    "ride-4-cifar100": (
        Published("RIDE, arXiv:2010.01809, with distillation", 49.1, 69.3, 49.3, 26.0, macs=91.9, routed=True),
    ),
    "ride-6-cifar100": (Published("RIDE's authors, the teacher", 50.2, 69.3, 52.1, 25.8),),
    "ride-distilled-cifar100": (Published("RIDE's authors, later rerun", 49.0, 67.6, 50.9, 25.2, routed=True),),
    "ride-4-distilled-cifar100": (Published("RIDE's authors, later rerun", 49.4, 67.7, 51.3, 25.7, routed=True),),
    "shike-cifar100": (Published("SHIKE, arXiv:2304.01279", 56.3),),
    "shike-cifar100-50": (Published("SHIKE, arXiv:2304.01279", 59.8),),
    "ace-cifar100": (Published(ACE + UNCHECKED, 49.4),),
    "ace-4-cifar100": (Published(ACE, 49.6, 66.3, 52.8, 27.2),),
    "ace-cifar100-50": (Published(ACE + UNCHECKED, 50.7),),
    "ace-cifar10": (Published(ACE + UNCHECKED, 81.2),),
    "ace-cifar10-50": (Published(ACE + UNCHECKED, 84.3),),
    "sade-cifar100": (Published("SADE, arXiv:2107.09249", 49.8),),
    "sade-cifar100-50": (Published("SADE, arXiv:2107.09249, not re-checked", 53.9),),
    "ce-cifar100": (
        Published(LDAM, 38.3, macs=69.5),
        Published(RIDE, 39.1, 66.1, 37.3, 10.6, macs=69.5),
    ),
    "focal-cifar100": (Published(LDAM, 38.4, macs=69.5),),
    "cb-focal-cifar100": (Published(CB_FOCAL, 39.6, macs=69.5),),
    "ldam-drw-cifar100": (
        Published("LDAM, arXiv:1906.07413; splits from RIDE", 42.0, 61.5, 41.7, 20.2, macs=69.5),
    ),
    "oltr-cifar100": (Published("RIDE's authors' run, arXiv:2010.01809", 41.2, 61.8, 41.4, 17.6),),
    "bbn-cifar100": (Published(BBN, 42.6, macs=74.3),),
    "crt-cifar100": (Published("RIDE's authors' run, arXiv:2010.01809", 43.3, 64.0, 44.8, 18.1, macs=69.5),),
    "tau-norm-cifar100": (Published("RIDE's authors' run, arXiv:2010.01809", 43.2, 65.7, 43.6, 17.3, macs=69.5),),
    "m2m-cifar100": (Published(M2M, 43.5),),
    "lfme-cifar100": (Published(RIDE, 43.8),),
    "ride-imagenet-lt-x50": (Published("RIDE's authors, later rerun", 55.7, 67.0, 52.2, 36.0, routed=True),),
    "ride-inaturalist-r50": (Published("RIDE's authors, later rerun", 71.2, 70.2, 71.2, 71.6, routed=True),),
    "ride-2-distilled-imagenet-lt-r50": (Published(RIDE, 54.4, macs=3710.0, routed=True),),
    "ride-3-distilled-imagenet-lt-r50": (Published(RIDE, 54.9, macs=4360.0, routed=True),),
    "ride-4-distilled-imagenet-lt-r50": (Published(RIDE, 55.4, macs=5150.0, routed=True),),
    "ride-2-distilled-imagenet-lt-x50": (Published(RIDE, 55.9, macs=3920.0, routed=True),),
    "ride-3-distilled-imagenet-lt-x50": (Published(RIDE, 56.4, macs=4690.0, routed=True),),
    "ride-4-distilled-imagenet-lt-x50": (Published(RIDE, 56.8, 68.3, 53.5, 35.9, macs=5190.0, routed=True),),
    "ride-6-imagenet-lt-x50": (Published("RIDE's authors, the teacher", 57.5, 68.9, 54.3, 36.5),),
    "ride-2-distilled-inaturalist-r50": (Published(RIDE, 71.4, 70.2, 71.3, 71.7, macs=3670.0, routed=True),),
    "ride-3-distilled-inaturalist-r50": (Published(RIDE, 72.2, 70.2, 72.2, 72.7, macs=4170.0, routed=True),),
    "ride-4-distilled-inaturalist-r50": (Published(RIDE, 72.6, 70.9, 72.4, 73.1, macs=4510.0, routed=True),),
    "ride-6-inaturalist-r50": (Published("RIDE's authors, the teacher", 72.9, 71.1, 72.9, 73.3),),
    "ride-2-swin-t": (Published("RIDE's authors", 53.6, 65.0, 50.0, 34.2),),
    "ride-swin-t": (Published("RIDE's authors", 54.4, 65.7, 50.7, 35.5),),
    "ride-2-swin-s": (Published("RIDE's authors", 56.3, 67.4, 52.9, 37.0),),
    "ride-swin-s": (Published("RIDE's authors", 56.2, 67.0, 53.0, 37.5),),
    "ace-4-cifar100-50": (Published(ACE, 51.9),),
    "ace-4-cifar10": (Published(ACE, 81.4),),
    "ace-4-cifar10-50": (Published(ACE, 84.9),),
    "ce-cifar100-50": (Published(LDAM + UNCHECKED, 43.9),),
    "ce-cifar10": (Published(LDAM + UNCHECKED, 70.4),),
    "ce-cifar10-50": (Published(LDAM + UNCHECKED, 74.8),),
    "focal-cifar100-50": (Published(LDAM + UNCHECKED, 44.3),),
    "focal-cifar10": (Published(LDAM + UNCHECKED, 70.4),),
    "focal-cifar10-50": (Published(LDAM + UNCHECKED, 76.7),),
    "cb-focal-cifar100-50": (Published(CB_FOCAL + UNCHECKED, 45.2),),
    "cb-focal-cifar10": (Published(CB_FOCAL + UNCHECKED, 74.6),),
    "cb-focal-cifar10-50": (Published(CB_FOCAL + UNCHECKED, 79.3),),
    "ldam-drw-cifar100-50": (Published(LDAM + UNCHECKED, 46.6),),
    "ldam-drw-cifar10": (Published(LDAM + UNCHECKED, 77.0),),
    "ldam-drw-cifar10-50": (Published(LDAM + UNCHECKED, 81.0),),
    "bbn-cifar100-50": (Published(BBN + UNCHECKED, 47.0),),
    "bbn-cifar10": (Published(BBN + UNCHECKED, 79.8),),
    "bbn-cifar10-50": (Published(BBN + UNCHECKED, 82.2),),
    "m2m-cifar10": (Published(M2M + UNCHECKED, 79.1),),
    "sade-cifar10": (Published("SADE's authors", 83.8),),
    "ce-imagenet-lt-r10": (Published(DECOUPLED + UNCHECKED, 34.8),),
    "ce-imagenet-lt-r50": (Published(DECOUPLED, 41.6),),
    "ce-imagenet-lt-x50": (Published(DECOUPLED, 44.4),),
    "ce-inaturalist-r50": (Published(DECOUPLED, 61.7),),
    "ncm-imagenet-lt-r10": (Published(DECOUPLED + UNCHECKED, 35.5),),
    "ncm-imagenet-lt-r50": (Published(DECOUPLED, 44.3),),
    "ncm-imagenet-lt-x50": (Published(DECOUPLED, 47.3),),
    "ncm-inaturalist-r50": (Published(DECOUPLED + UNCHECKED, 58.2),),
    "crt-imagenet-lt-r10": (Published(DECOUPLED + UNCHECKED, 41.8),),
    "crt-imagenet-lt-r50": (Published(DECOUPLED, 47.3),),
    "crt-imagenet-lt-x50": (Published(DECOUPLED, 49.6, 61.8, 46.2, 27.4),),
    "crt-inaturalist-r50": (Published(DECOUPLED, 65.2),),
    "tau-norm-imagenet-lt-r10": (Published(DECOUPLED + UNCHECKED, 40.6),),
    "tau-norm-imagenet-lt-r50": (Published(DECOUPLED, 46.7),),
    "tau-norm-imagenet-lt-x50": (Published(DECOUPLED, 49.4, 59.1, 46.9, 30.7),),
    "tau-norm-inaturalist-r50": (Published(DECOUPLED, 65.6),),
    "lws-imagenet-lt-r10": (Published(DECOUPLED + UNCHECKED, 41.4),),
    "lws-imagenet-lt-r50": (Published(DECOUPLED, 47.7),),
    "lws-imagenet-lt-x50": (Published(DECOUPLED, 49.9, 60.2, 47.2, 30.3),),
    "lws-inaturalist-r50": (Published(DECOUPLED, 65.9),),
    "sade-imagenet-lt-x50": (Published("SADE's authors", 58.8, macs=6080.0),),
    "sade-inaturalist-r50": (Published("SADE's authors", 72.9, macs=5800.0),),
    "sade-places-lt-r152": (Published("SADE's authors", 40.9, macs=13180.0),),
    "ride-places-lt-r152": (Published("SADE's authors' run of RIDE", 40.3, macs=13180.0),),
    "ace-imagenet-lt-r50": (Published(ACE + UNCHECKED, 54.7),),
    "ace-imagenet-lt-x50": (Published(ACE, 56.6),),
    "ace-inaturalist-r50": (Published(ACE, 72.9),),
    "ldam-drw-inaturalist-r50": (Published(LDAM, 64.6),),
    "cb-focal-inaturalist-r50": (Published(CB_FOCAL, 61.1),),
    "bbn-inaturalist-r50": (Published(BBN, 66.3),),
    "bbn-2x-inaturalist-r50": (Published(BBN + UNCHECKED, 69.6),),
    "oltr-imagenet-lt-r10": (Published("OLTR, arXiv:1904.05160" + UNCHECKED, 35.6),),
    "oltr-imagenet-lt-x50": (Published(DECOUPLED + ", its run of OLTR", 46.3),),
    "oltr-inaturalist-r50": (Published(DECOUPLED + ", its run of OLTR", 63.9),),
    "lfme-imagenet-lt-r10": (Published("LFME, arXiv:2001.01536" + UNCHECKED, 38.8),),
}  # fmt: skip
