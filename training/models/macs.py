"""Multiply-accumulates of a module for one image, by the convention of the published tables."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

OPERATIONS_PER_BATCH_NORM_ELEMENT = 2


def count_macs(module: nn.Module, *inputs: Tensor) -> int:
    """
    Run `module` once and count: convolutions and linear layers, plus 2 per batch-norm output element.

    Activations, additions, pooling, softmax and norms are free. This reproduces the published 69.5 M of ResNet-32.

    Args:
        inputs: of a batch of one.

    Source: fvcore's total in evaluation mode; thop of 2020 counts the same.
    """
    total = 0

    def count(layer: nn.Module, layer_inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        if isinstance(layer, nn.Conv2d):
            total += output.numel() * layer.weight[0].numel()
        elif isinstance(layer, nn.modules.batchnorm._BatchNorm):
            total += output.numel() * OPERATIONS_PER_BATCH_NORM_ELEMENT
        else:  # a classifier or a linear layer: one product for every weight
            total += output.shape[0] * cast(Tensor, layer.weight).numel()

    hooks = [
        layer.register_forward_hook(count)
        for layer in module.modules()
        if isinstance(layer, nn.Conv2d | nn.modules.batchnorm._BatchNorm) or _is_linear(layer)
    ]
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            module(*inputs)
    finally:
        module.train(training)
        for hook in hooks:
            hook.remove()
    return total


def _is_linear(layer: nn.Module) -> bool:
    weight = getattr(layer, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.dim() == 2 and not list(layer.children())
