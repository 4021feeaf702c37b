"""One-expert methods with losses, branches or memories of their own on ImageNet-LT and iNaturalist 2018."""

import dataclasses

from training.recipe import IMAGENET_MEAN, IMAGENET_STD, Recipe
from training.recipes.decoupled_large import CE_LARGE

INATURALIST, R10 = CE_LARGE["inaturalist-r50"], CE_LARGE["imagenet-lt-r10"]

LDAM_DRW_INATURALIST_R50 = dataclasses.replace(
    # Paper: arXiv:1906.07413, 64.6 % top-1; when its learning rate drops there is from memory.
    # Run:   ride-train ldam-drw-inaturalist-r50 --data path/to/inaturalist-2018
    INATURALIST, name="ldam-drw-inaturalist-r50", loss="ldam", classifier="cosine", deferred_from=2 / 3,
    schedule="step", batch_size=256, lr=0.1, weight_decay=2e-4, lr_drops=(2 / 3, 8 / 9), lr_drop_factor=0.1,
)  # fmt: skip

CB_FOCAL_INATURALIST_R50 = dataclasses.replace(
    # Paper: arXiv:1901.05555, 61.1 % top-1; settings of the public code, where batch norms and biases do not decay.
    # Run:   ride-train cb-focal-inaturalist-r50 --data path/to/inaturalist-2018
    INATURALIST, name="cb-focal-inaturalist-r50", loss="sigmoid_focal", focal_gamma=0.5, effective_beta=0.999,
    deferred_from=0.0,  # the weights apply from the first epoch
    nesterov=True, schedule="step", batch_size=1024, lr=1.6, warmup_epochs=5,
    lr_drops=(1 / 3, 2 / 3, 8 / 9), lr_drop_factor=0.1,
)  # fmt: skip

BBN_INATURALIST_R50 = dataclasses.replace(
    # Paper: arXiv:1912.02413, 66.3 % top-1 in 90 epochs and 69.6 % in 180, for which the public configuration is.
    # Run:   ride-train bbn-inaturalist-r50 --data path/to/inaturalist-2018
    INATURALIST, name="bbn-inaturalist-r50", method="bbn", nesterov=True, mean=IMAGENET_MEAN, std=IMAGENET_STD,
    schedule="step", batch_size=128, lr=0.05, lr_drops=(2 / 3, 8 / 9), lr_drop_factor=0.1,
)  # fmt: skip

OLTR_IMAGENET_LT_R10 = dataclasses.replace(
    # Paper: arXiv:1904.05160, 35.6 % top-1; settings of the public code.
    # Run:   ride-train oltr-imagenet-lt-r10 --data path/to/imagenet-lt
    R10, name="oltr-imagenet-lt-r10", method="oltr",
    epochs=30, batch_size=128, lr=0.1, schedule="step", lr_drops=(1 / 3, 2 / 3), lr_drop_factor=0.1,
)  # fmt: skip


def _oltr(where: str) -> Recipe:
    """As the decoupling paper's authors ran it; their settings are not known to us: its second stage on their CE."""
    return dataclasses.replace(CE_LARGE[where], name=f"oltr-{where}", method="oltr")


LFME_IMAGENET_LT_R10 = dataclasses.replace(
    # Paper: arXiv:2001.01536, 37.2 to 38.8 % top-1; settings of the public code, whose networks have one more layer of
    # 512 before the classifier.
    # Run:   ride-train lfme-imagenet-lt-r10 --data path/to/imagenet-lt
    R10, name="lfme-imagenet-lt-r10", method="lfme",
    batch_size=256, lr=0.1, schedule="step", lr_drops=(5 / 9, 8 / 9), lr_drop_factor=0.1,
)  # fmt: skip

BASELINES_LARGE = (
    LDAM_DRW_INATURALIST_R50, CB_FOCAL_INATURALIST_R50, BBN_INATURALIST_R50,
    dataclasses.replace(BBN_INATURALIST_R50, name="bbn-2x-inaturalist-r50", epochs=180),
    OLTR_IMAGENET_LT_R10, _oltr("imagenet-lt-x50"), _oltr("inaturalist-r50"),
    LFME_IMAGENET_LT_R10,
)  # fmt: skip
