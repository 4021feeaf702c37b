"""Multiply-accumulates of a module for one image, by the convention of the published tables."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

OPERATIONS_PER_BATCH_NORM_ELEMENT = 2


def count_macs(module: nn.Module, *inputs: Tensor) -> int:
    """
    Run `module` once and count: convolutions, linear layers and other products of matrices such as an attention's, plus
    2 per batch-norm output element.

    Activations, additions, pooling, softmax and layer norms are free. This reproduces the published 69.5 M of ResNet-32
    and 4.11 G of ResNet-50.

    Args:
        inputs: of a batch of one.

    Source: fvcore's total in evaluation mode; thop of 2020 counts the same.
    """
    batch_norms = 0

    def count(layer: nn.Module, layer_inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal batch_norms
        batch_norms += output.numel() * OPERATIONS_PER_BATCH_NORM_ELEMENT

    hooks = [
        layer.register_forward_hook(count)
        for layer in module.modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm)
    ]
    training = module.training
    module.eval()
    products = FlopCounterMode(display=False)
    try:
        with torch.no_grad(), products:
            module(*inputs)
    finally:
        module.train(training)
        for hook in hooks:
            hook.remove()
    return products.get_total_flops() // 2 + batch_norms
