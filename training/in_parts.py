"""A network that takes a large batch a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from training.distributed import batch_axis


class InParts(nn.Module):
    """
    Gradient accumulation that any loss can be used with: outputs for the whole batch, activations for one part.

    Each part's activations are forgotten after its forward pass and computed again when its gradient is due, so the
    price is one more forward pass, and weights move as for the whole batch. Batch norms alone differ: they normalise
    each part by its own statistics, and their running statistics follow part after part.

    Args:
        network: from (B, ...) to a named tuple of tensors (E, B, ...) or (B, C), or None.
        parts: how many, of equal size or one row less; fewer where a part would have a single row, which has no
            variance to normalise by.

    Source: activation checkpointing, arXiv:1604.06174.
    """

    def __init__(self, network: nn.Module, parts: int) -> None:
        super().__init__()
        self.network, self.parts = network, parts

    def forward(self, images: Tensor, fewest: int) -> Any:
        """
        The network's outputs for `images` (B, ...).

        Args:
            fewest: the least B of all processes, which must take equally many parts: their batch norms meet in each.
        """
        parts = images.tensor_split(max(1, min(self.parts, fewest // 2)))
        outputs = [
            checkpoint(self.network, part, use_reentrant=False, context_fn=self._contexts)
            if torch.is_grad_enabled()
            else self.network(part)
            for part in parts
        ]
        return type(outputs[0])(
            *(None if each[0] is None else torch.cat(each, batch_axis(each[0])) for each in zip(*outputs, strict=True))
        )

    def _contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _running_statistics_kept(self)


@contextmanager
def _running_statistics_kept(network: nn.Module) -> Iterator[None]:
    """Batch norms normalise as before, but what they have seen is not counted a second time."""
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    kept = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in kept:
                buffer.copy_(before)
