"""A trained model as the modules that a bundle holds: trunk, experts, routers, with the bundle's inputs and outputs."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from training.methods.method import Model
from training.models.multi_expert import Expert
from training.models.router import Routers


class ExpertGraph(nn.Module):
    """features (N, ...), logits_sum (N, C) of the experts before -> logits_sum with this one, expert feature (N, D)."""

    def __init__(self, expert: Expert) -> None:
        super().__init__()
        self.expert = expert

    def forward(self, features: Tensor, logits_sum: Tensor) -> tuple[Tensor, Tensor]:
        """(N, ...), (N, C) -> (N, C), (N, D)."""
        logits, expert_feature = self.expert(features)
        return logits_sum + logits, expert_feature


class RouterGraph(nn.Module):
    """expert feature (N, D), logits_sum (N, C) of the experts so far -> score (N,) in [0, 1]."""

    def __init__(self, routers: Routers, index: int) -> None:
        super().__init__()
        self.routers, self.index = routers, index

    def forward(self, expert_feature: Tensor, logits_sum: Tensor) -> Tensor:
        """(N, D), (N, C) -> (N,)."""
        return self.routers.score(self.index, expert_feature, logits_sum)


def split(model: Model) -> tuple[nn.Module, list[ExpertGraph], list[RouterGraph]]:
    """Trunk, E experts, E − 1 routers, in evaluation mode, sharing the weights of `model`."""
    model.eval()
    experts = [ExpertGraph(cast(Expert, expert)).eval() for expert in model.net.experts]
    routers = model.routers
    asked = [RouterGraph(routers, index).eval() for index in range(len(experts) - 1)] if routers is not None else []
    return model.net.trunk, experts, asked
