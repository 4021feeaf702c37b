"""Routers: after expert i, how much is expert i + 1 needed?"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.models.multi_expert import Outputs


class Routers(nn.Module):
    """
    E − 1 routers with a hidden layer each, and one output layer that they share or each its own.

    Router i sees the feature of expert i scaled to unit length, and the k largest values, in descending order, of the
    mean logits of experts 0..i.

    Attributes:
        temperature: what decisions are divided by before the sigmoid. It moves none across 0.5 and changes no order;
            export fits it, because as trained the decisions reach ±100 and their sigmoids 0 and 1 exactly.

    Args:
        n_experts: E, at least 2.
        n_features: D.
        n_classes: C; k is at most C.
        shared: they have one output layer, as in the public code.

    Source: RIDE, arXiv:2010.01809, expert assignment; sizes as in its public code.
    """

    def __init__(
        self, n_experts: int, n_features: int, n_classes: int, top_k: int, n_hidden: int, shared: bool = True
    ) -> None:
        super().__init__()
        self.top_k = min(top_k, n_classes)
        self.temperature = 1.0
        self.hidden = nn.ModuleList(nn.Linear(n_features, n_hidden) for _ in range(n_experts - 1))
        outputs = [nn.Linear(self.top_k + n_hidden, 1) for _ in range(1 if shared else n_experts - 1)]
        self.output: nn.Module = outputs[0] if shared else nn.ModuleList(outputs)

    def output_of(self, router: int) -> nn.Linear:
        """The output layer of router i, from 0."""
        return cast(nn.Linear, self.output[router] if isinstance(self.output, nn.ModuleList) else self.output)

    def decide(self, router: int, expert_feature: Tensor, logits_sum: Tensor) -> Tensor:
        """
        The decision of one router for a batch.

        Args:
            router: i, from 0.
            expert_feature: (B, D), of expert i.
            logits_sum: (B, C), summed over experts 0..i.

        Returns:
            (B,), the decision as trained: positive where the next expert should run.
        """
        direction = F.normalize(expert_feature, dim=1)
        largest = torch.topk(logits_sum / (router + 1), self.top_k, dim=1).values
        hidden = F.relu(self.hidden[router](direction))
        return self.output_of(router)(torch.cat([largest, hidden], dim=1)).squeeze(1)

    def score(self, router: int, expert_feature: Tensor, logits_sum: Tensor) -> Tensor:
        """(B,), in [0, 1]: the next expert runs where it reaches the threshold. Arguments as of `decide`."""
        return torch.sigmoid(self.decide(router, expert_feature, logits_sum) / self.temperature)

    def forward(self, outputs: Outputs) -> Tensor:
        """All routers' decisions on all images: (E − 1, B)."""
        sums = outputs.expert_logits.cumsum(dim=0)
        return torch.stack([self.decide(i, outputs.expert_features[i], sums[i]) for i in range(len(self.hidden))])
