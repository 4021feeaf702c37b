"""The backbones by name: how each is cut into a trunk and the layers of an expert."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from training.models import resnet_cifar, resnet_imagenet
from training.models.multi_expert import Expert
from training.models.resnet_imagenet import ResNet
from training.models.swin import Swin
from training.recipe import Recipe


@dataclass(frozen=True)
class Backbone:
    """
    How a backbone is cut into trunk and experts.

    Attributes:
        trunk: recipe -> normalised images (B, 3, H, W) to features (B, ...).
        expert: recipe -> features (B, ...) to (B, D).
        n_features: D, by whether the experts are reduced.
        image_size: side of the images of the published tables, pixels.
        initialise: gives a block that is added to an expert fresh weights, as its others have; None: none can be added.
        shared: those of an expert's layers that all experts have in common, by name.
        torchvision: whose pre-trained weights fit the backbone at full width; None: torchvision has none.
    """

    trunk: Callable[[Recipe], nn.Module]
    expert: Callable[[Recipe], nn.Module]
    n_features: Callable[[bool], int]
    image_size: int
    initialise: Callable[[nn.Module], None] | None = None
    shared: tuple[str, ...] = ()
    torchvision: str | None = None

    def share_layers(self, experts: Sequence[Expert]) -> None:
        """Give all experts the first one's module for each of `shared`."""
        for expert in experts:
            for name in self.shared:
                setattr(expert.layers, name, getattr(experts[0].layers, name))


def _resnet_cifar(blocks: int) -> Backbone:
    return Backbone(
        trunk=lambda recipe: resnet_cifar.trunk(blocks),
        expert=lambda recipe: resnet_cifar.expert_layers(recipe.reduced, blocks),
        n_features=lambda reduced: 48 if reduced else 64, image_size=32, initialise=resnet_cifar.initialise,
    )  # fmt: skip


def _resnet(net: ResNet, torchvision: str | None = None) -> Backbone:
    return Backbone(
        trunk=lambda recipe: net.trunk(recipe.reduced, recipe.share_stage3),
        expert=lambda recipe: net.expert(recipe.reduced, recipe.share_stage3),
        n_features=net.n_features, image_size=224, initialise=resnet_imagenet.initialise, torchvision=torchvision,
    )  # fmt: skip


def _swin(net: Swin, torchvision: str) -> Backbone:
    return Backbone(
        trunk=lambda recipe: net.trunk(recipe.reduced, recipe.drop_path),
        expert=lambda recipe: net.expert(recipe.reduced, recipe.drop_path),
        n_features=net.n_features, image_size=224, shared=("norm",), torchvision=torchvision,
    )  # fmt: skip


_resnext = partial(ResNet, Bottleneck, groups=32, group_width=4)

BACKBONES: dict[str, Backbone] = {
    "resnet20_cifar": _resnet_cifar(3),
    "resnet32_cifar": _resnet_cifar(5),
    "resnet44_cifar": _resnet_cifar(7),
    "resnet56_cifar": _resnet_cifar(9),
    "resnet10": _resnet(ResNet(BasicBlock, (1, 1, 1, 1))),
    "resnet50": _resnet(ResNet(Bottleneck, (3, 4, 6, 3)), "resnet50"),
    "resnet101": _resnet(ResNet(Bottleneck, (3, 4, 23, 3)), "resnet101"),
    "resnet152": _resnet(ResNet(Bottleneck, (3, 8, 36, 3)), "resnet152"),
    "resnext50": _resnet(_resnext((3, 4, 6, 3)), "resnext50_32x4d"),
    "resnext101": _resnet(_resnext((3, 4, 23, 3))),
    "swin_t": _swin(Swin((2, 2, 6, 2)), "swin_t"),
    "swin_s": _swin(Swin((2, 2, 18, 2)), "swin_s"),
}
