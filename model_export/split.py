"""A trained model as the modules that a bundle holds: trunk, experts, routers, with the bundle's inputs and outputs."""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor, nn

from training.methods.method import Model
from training.models.multi_expert import Expert, Trunk
from training.models.resnet_cifar import Subsampled
from training.models.router import Routers


class TrunkGraph(nn.Module):
    """
    uint8 images (N, H, W, 3) -> features (N, ...) in the type of the layers; the normalisation is fp32 always.

    Mean and standard deviation are repeated along the width. As one number per channel they would be broadcast over an
    innermost axis of three once a runtime has turned the image to channels-last, as onnxruntime does around 8-bit
    convolutions: that takes 17 us an image of 32x32, a row at a time takes 1.3 us, and the values are the same.

    Args:
        width: W, of the images.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, trunk: Trunk, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers, self.dtype = _in(dtype, trunk.layers), dtype
        self.register_buffer("mean", trunk.mean.repeat(1, 1, 1, width))
        self.register_buffer("std", trunk.std.repeat(1, 1, 1, width))

    def forward(self, images: Tensor) -> Tensor:
        """(N, H, W, 3) -> (N, ...)."""
        normalised = (images.permute(0, 3, 1, 2).float() - self.mean) / self.std  # (N, 3, H, W)
        return cast(Tensor, self.layers(normalised.to(self.dtype)))


class ExpertGraph(nn.Module):
    """
    features (N, ...), logits_sum (N, C) of the experts before -> logits_sum with this one, expert feature (N, D).

    Args:
        addition: how this expert joins the sum.

    The layers run in the type of the features; what follows them, and every other tensor, is fp32.
    """

    def __init__(self, expert: Expert, addition: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.expert = Expert(_in(dtype, expert.layers), expert.classifier)
        self.addition = addition

    def forward(self, features: Tensor, logits_sum: Tensor) -> tuple[Tensor, Tensor]:
        """(N, ...), (N, C) -> (N, C), (N, D)."""
        logits, expert_feature = self.expert(features)
        return self.addition(logits_sum, logits), expert_feature


class GlobalMean(nn.Module):
    """What AdaptiveAvgPool2d(1) computes."""

    def forward(self, features: Tensor) -> Tensor:
        """(N, D, H, W) -> (N, D, 1, 1)."""
        return features.mean(dim=(2, 3), keepdim=True)


class RouterGraph(nn.Module):
    """expert feature (N, D), logits_sum (N, C) of the experts so far -> score (N,) in [0, 1]."""

    def __init__(self, routers: Routers, index: int) -> None:
        super().__init__()
        self.routers, self.index = routers, index

    def forward(self, expert_feature: Tensor, logits_sum: Tensor) -> Tensor:
        """(N, D), (N, C) -> (N,)."""
        return self.routers.score(self.index, expert_feature, logits_sum)


def split(
    model: Model, width: int, dtype: torch.dtype = torch.float32
) -> tuple[TrunkGraph, list[ExpertGraph], list[RouterGraph]]:
    """
    Trunk, E experts, E − 1 routers, in evaluation mode, with the weights of `model`.

    Args:
        width: of the images.
        dtype: of the features and of the layers of trunk and experts.
    """
    model.eval()
    trunk = TrunkGraph(model.net.trunk, width, dtype).eval()
    experts = [
        ExpertGraph(cast(Expert, expert), model.net.addition(index), dtype).eval()
        for index, expert in enumerate(model.net.experts)
    ]
    routers = model.routers
    asked = [RouterGraph(routers, index).eval() for index in range(len(experts) - 1)] if routers is not None else []
    return trunk, experts, asked


def _in(dtype: torch.dtype, layers: nn.Module) -> nn.Module:
    """
    A copy of the layers that computes in `dtype`; the layers themselves stay as they are.

    Shortcuts that subsample become convolutions, which compute the same: onnxruntime then keeps a whole expert
    channels-last, and takes 92 instead of 101 us an image in int8, 312 instead of 333 in fp32. The pooling to one pixel
    becomes a mean, which is one node where the exporter would write ten.
    """
    copied = copy.deepcopy(layers)
    for name, module in list(copied.named_modules()):
        if isinstance(module, Subsampled):
            copied.set_submodule(name, module.as_convolution())
        elif isinstance(module, nn.AdaptiveAvgPool2d):
            copied.set_submodule(name, GlobalMean())
    return copied.to(dtype)
