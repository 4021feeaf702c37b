"""Cross-entropy, and classifiers on its features, on ImageNet-LT and iNaturalist 2018."""

import dataclasses
from typing import Any

from training.recipe import IMAGENET_MEAN, IMAGENET_STD, Recipe

CE_IMAGENET_LT = Recipe(
    # Paper: arXiv:1910.09217; figures: published.py. The views, colour jitter on ImageNet-LT alone, are from memory.
    # The public code is one epoch ahead along each cosine, so that it trains the last one at a rate of 0.
    # Run:   ride-train ce-imagenet-lt-r50 --data path/to/imagenet-lt
    #        ride-train crt-imagenet-lt-r50 --data path/to/imagenet-lt --set first_stage=runs/ce-imagenet-lt-r50
    #        (without first_stage it trains the same cross-entropy model first)
    name="ce-imagenet-lt-r50", method="single", loss="ce", classifier="linear", data="", profile="natural",
    image_size=224, mean=IMAGENET_MEAN, std=IMAGENET_STD, backbone="resnet50",
    epochs=90, batch_size=512, lr=0.2, schedule="cosine", warmup_epochs=0, weight_decay=5e-4,
    crop="resized", colour_jitter=0.4, test_fit="inner_crop",
)  # fmt: skip

CE_LARGE = {
    "imagenet-lt-r10": dataclasses.replace(CE_IMAGENET_LT, name="ce-imagenet-lt-r10", backbone="resnet10"),
    "imagenet-lt-r50": CE_IMAGENET_LT,
    "imagenet-lt-x50": dataclasses.replace(CE_IMAGENET_LT, name="ce-imagenet-lt-x50", backbone="resnext50"),
    "inaturalist-r50": dataclasses.replace(
        CE_IMAGENET_LT,
        name="ce-inaturalist-r50",
        holdout_share=0.01,
        mean=(0.466, 0.471, 0.380),
        std=(0.195, 0.194, 0.192),
        weight_decay=1e-4,
        colour_jitter=0.0,
    ),
}


def _with_classifiers(first: Recipe, where: str, method: str) -> Recipe:
    """The recipe whose first stage is `first`."""
    later: dict[str, dict[str, Any]] = {
        "ncm": {"retrain": "ncm", "retrain_epochs": 1},
        "tau-norm": {"retrain": "tau_norm", "retrain_epochs": 1},  # tau is chosen on held-out images
        "crt": {"retrain": "crt", "retrain_epochs": 30 if where.startswith("inaturalist") else 10},
        "lws": {"retrain": "lws", "retrain_epochs": 5},
    }
    trained: dict[str, Any] = {
        "retrain_loss": "ce", "retrain_sampler": "class_aware", "retrain_lr": 0.2, "retrain_batch_size": 512,
        "retrain_weight_decay": first.weight_decay, "retrain_warmup_epochs": 0,
    }  # fmt: skip
    fields = later[method] | (trained if method in ("crt", "lws") else {})
    return dataclasses.replace(first, name=f"{method}-{where}", **fields)


DECOUPLED_LARGE = (
    *CE_LARGE.values(),
    *(
        _with_classifiers(first, where, method)
        for where, first in CE_LARGE.items()
        for method in ("ncm", "crt", "tau-norm", "lws")
    ),
)
