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

    Every group of parameters has a "factor" of the learning rate.

    Source: RIDE's and Swin's public code.
    """
    groups = parameter_groups(stage)
    if stage.optimiser == "sgd":
        return torch.optim.SGD(
            groups, stage.lr(0), stage.momentum, weight_decay=stage.weight_decay, nesterov=stage.nesterov
        )
    without = {
        parameter
        for name, parameter in stage.part.named_parameters()
        if parameter.dim() < 2 or name.endswith(ATTENTION_BIAS)
    }
    split: list[dict[str, Any]] = []
    for group in groups:
        decayed = [parameter for parameter in group["params"] if parameter not in without]
        spared = [parameter for parameter in group["params"] if parameter in without]
        split += [{**group, "params": decayed}, {**group, "params": spared, "weight_decay": 0.0}]
    return torch.optim.AdamW(split, stage.lr(0), ADAM_BETAS, weight_decay=stage.weight_decay)


def parameter_groups(stage: Stage) -> list[dict[str, Any]]:
    """What `stage` trains, by the "factor" of its rate: what `lr_factors` does not name, then each that it does."""
    named = [(list(module.parameters()), factor) for module, factor in stage.lr_factors]
    taken = {parameter for parameters, _ in named for parameter in parameters}
    others = [parameter for parameter in stage.part.parameters() if parameter not in taken]
    return [{"params": parameters, "factor": factor} for parameters, factor in [(others, 1.0), *named] if parameters]
