"""Exponential moving average of a model's weights."""

from __future__ import annotations

import copy

import torch

from training.methods.method import Model


class WeightAverage:
    """
    A model whose weights, and running statistics of batch norms, are averages over the steps of a stage.

    After step t, from 0: average ← d·average + (1 − d)·weights with d = min(decay, (1 + t)/(10 + t)), so that the
    weights that a stage began with are soon forgotten. The statistics are averaged like the weights that make them.

    Attributes:
        model: with the averages; in evaluation mode, learns nothing.
        updates: steps so far.

    Source: the rising decay is that of TensorFlow's ExponentialMovingAverage.
    """

    def __init__(self, model: Model, decay: float) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, model: Model) -> None:
        """Take the weights of `model` after a step into the average."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        current = model.state_dict()
        once = {averaged.data_ptr(): (averaged, name) for name, averaged in self.model.state_dict().items()}
        for averaged, name in once.values():  # layers that experts share have several names
            if averaged.is_floating_point():
                averaged.lerp_(current[name], 1 - decay)
            else:  # how many batches a norm has seen
                averaged.copy_(current[name])
