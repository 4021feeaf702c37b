"""The optimiser of a stage."""

from __future__ import annotations

from typing import Any

import torch

from training.methods.method import Stage

ADAM_BETAS = (0.9, 0.999)
ATTENTION_BIAS = "relative_position_bias_table"


def optimiser_of(stage: Stage) -> torch.optim.Optimizer:
    """
    SGD, with weight decay on all parameters; or AdamW, which spares biases, norms and the attention's position biases.

    Source: RIDE's and Swin's public code.
    """
    if stage.optimiser == "sgd":
        return torch.optim.SGD(
            stage.part.parameters(), stage.lr(0), stage.momentum,
            weight_decay=stage.weight_decay, nesterov=stage.nesterov,
        )  # fmt: skip
    spared: list[torch.nn.Parameter] = []
    decayed: list[torch.nn.Parameter] = []
    for name, parameter in stage.part.named_parameters():
        (spared if parameter.dim() < 2 or name.endswith(ATTENTION_BIAS) else decayed).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, stage.lr(0), ADAM_BETAS, weight_decay=stage.weight_decay)
