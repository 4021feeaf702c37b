"""What is published on CIFAR-100-LT with imbalance 50 and on CIFAR-10-LT beside RIDE, SHIKE and ACE's three experts."""

import dataclasses
from typing import Any

from training.recipes.ace_4_cifar100 import ACE_4_CIFAR100
from training.recipes.bbn_cifar100 import BBN_CIFAR100
from training.recipes.cb_focal_cifar100 import CB_FOCAL_CIFAR100
from training.recipes.ce_cifar100 import CE_CIFAR100
from training.recipes.focal_cifar100 import FOCAL_CIFAR100
from training.recipes.ldam_drw_cifar100 import LDAM_DRW_CIFAR100
from training.recipes.m2m_cifar100 import M2M_CIFAR100
from training.recipes.sade_cifar100 import SADE_CIFAR100

SETS: dict[str, dict[str, Any]] = {
    "cifar100-50": {"imbalance": 50},
    "cifar10": {"data": "cifar10"},
    "cifar10-50": {"data": "cifar10", "imbalance": 50},
}
GROUPS_OF_TEN = (0.7, 0.4, 0.2)  # 7, 4 and 2 classes; as all groups of four experts a choice of ours

BASELINES_CIFAR = (
    # As on CIFAR-100-LT with imbalance 100, also what a paper may have chosen anew for each set (beta and gamma of
    # CB-focal, say). Papers and figures: published.py.
    # Run:   ride-train ce-cifar10-50, and so on
    *(
        dataclasses.replace(recipe, name=recipe.name.replace("cifar100", where), **images)
        for recipe in (CE_CIFAR100, FOCAL_CIFAR100, CB_FOCAL_CIFAR100, LDAM_DRW_CIFAR100, BBN_CIFAR100)
        for where, images in SETS.items()
    ),
    dataclasses.replace(M2M_CIFAR100, name="m2m-cifar10", data="cifar10"),
    # Full width and the lower learning rate are what SADE's authors take for ten classes.
    dataclasses.replace(SADE_CIFAR100, name="sade-cifar10", data="cifar10", reduced=False, lr=0.05),
    dataclasses.replace(ACE_4_CIFAR100, name="ace-4-cifar100-50", imbalance=50, group_shares=(0.59, 0.35, 0.18)),
    dataclasses.replace(ACE_4_CIFAR100, name="ace-4-cifar10", data="cifar10", group_shares=GROUPS_OF_TEN),
    dataclasses.replace(
        ACE_4_CIFAR100, name="ace-4-cifar10-50", data="cifar10", imbalance=50, group_shares=GROUPS_OF_TEN
    ),
)
