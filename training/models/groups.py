"""
Experts for nested groups of classes: what they say about a class is the mean over those whose group holds it.

Source: ACE, arXiv:2108.02385.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from training.data.longtail import rarest_first
from training.models.multi_expert import Expert, MultiExpertNet, Outputs, Trunk


@dataclass(frozen=True)
class Aggregation:
    """
    How the logits of the experts become one answer. Sources disagree on all of it.

    Attributes:
        power: an expert's logits are multiplied by (‖w_1‖ / ‖w_i‖)^power, ‖w_i‖ the mean length of its classifier's
            rows: 1 is the plain ratio, 2 is read elsewhere, negative values turn the ratio round, 0 leaves them as
            they are.
        rows: which rows that mean is over: those of the expert's "own" group, or "all".
        over: "group": the mean over the experts whose group holds the class; "all": logits outside the group are 0, and
            the mean is over all experts.
    """

    power: float
    rows: Literal["own", "all"]
    over: Literal["group", "all"]


def nested_groups(class_counts: Sequence[int], shares: Sequence[float]) -> Tensor:
    """
    Which classes each expert answers for: the first for all, each later one for so many of the rarest.

    Args:
        class_counts: (C,).
        shares: (E − 1,), descending, in (0, 1), of the number of classes; at least one class is in each group.

    Returns:
        (E, C), bool.
    """
    n_classes = len(class_counts)
    order = rarest_first(class_counts)
    groups = torch.zeros(1 + len(shares), n_classes, dtype=torch.bool)
    groups[0] = True
    for group, share in zip(groups[1:], shares, strict=True):
        group[order[: max(round(share * n_classes), 1)]] = True
    return groups


def group_contribution(
    logits: Tensor, logits_sum: Tensor, index: int, group: Tensor, factor: Tensor, over: Literal["group", "all"]
) -> Tensor:
    """
    What expert `index` adds, so that the sum over experts 0..index divided by their number is their common answer.

    As groups are nested, a class that is in the group is in all earlier ones, and its answer is the plain mean: the
    expert adds its own logit. A class that is not keeps the answer it has: the expert adds that answer, which is the
    sum so far divided by the number of experts so far.

    Args:
        logits: (B, C), of this expert.
        logits_sum: (B, C), added by the experts before.
        index: from 0.
        group: (C,), bool.
        factor: (), of the logits.
        over: as of `Aggregation`.

    Returns:
        (B, C).
    """
    answer = logits_sum / index if index and over == "group" else torch.zeros_like(logits_sum)
    return torch.where(group, factor * logits, answer)


class GroupAddition(nn.Module):
    """`group_contribution` with everything but the logits fixed, added: what a bundle's graph of an expert holds."""

    group: Tensor
    factor: Tensor

    def __init__(self, index: int, group: Tensor, factor: Tensor, over: Literal["group", "all"]) -> None:
        super().__init__()
        self.index, self.over = index, over
        self.register_buffer("group", group)
        self.register_buffer("factor", factor)

    def forward(self, logits_sum: Tensor, logits: Tensor) -> Tensor:
        """(B, C) of the experts before, (B, C) of this one -> (B, C) of all."""
        return logits_sum + group_contribution(logits, logits_sum, self.index, self.group, self.factor, self.over)


class GroupNet(MultiExpertNet):
    """
    Trunk and experts for nested groups of classes.

    `expert_logits` are what each expert adds to the common answer, so that the mean over any number of experts, from
    the first on, is the answer of these; `own_logits` are what each said itself.

    Args:
        groups: (E, C), bool, each row within the one before; a checkpoint holds it.
        stop_gradient: only the first expert trains the trunk.
    """

    groups: Tensor

    def __init__(
        self, trunk: Trunk, experts: Sequence[Expert], groups: Tensor, aggregation: Aggregation, stop_gradient: bool
    ) -> None:
        super().__init__(trunk, experts)
        self.aggregation, self.stop_gradient = aggregation, stop_gradient
        self.register_buffer("groups", groups)

    def factor(self, index: int) -> Tensor:
        """(), what the logits of expert `index` are multiplied by."""
        first, own = (self._mean_length(expert) for expert in (0, index))
        return (first / own) ** self.aggregation.power

    def addition(self, index: int) -> nn.Module:
        """How expert `index` joins the sum of those before it, with the weights as they are now."""
        with torch.no_grad():
            return GroupAddition(index, self.groups[index], self.factor(index), self.aggregation.over)

    def forward(self, images: Tensor) -> Outputs:
        """(B, H, W, 3) uint8 -> contributions, features and own logits of all experts."""
        trunk_features = self.trunk(images)
        own, features, added = [], [], []
        logits_sum: Tensor | None = None
        for index, expert in enumerate(self.experts):
            seen = trunk_features.detach() if index and self.stop_gradient else trunk_features
            logits, feature = expert(seen)
            before = torch.zeros_like(logits) if logits_sum is None else logits_sum
            with torch.no_grad():
                contribution = group_contribution(
                    logits, before, index, self.groups[index], self.factor(index), self.aggregation.over
                )
            logits_sum = before + contribution
            own.append(logits)
            features.append(feature)
            added.append(contribution)
        return Outputs(torch.stack(added), torch.stack(features), own_logits=torch.stack(own))

    def _mean_length(self, index: int) -> Tensor:
        weight = cast(Tensor, cast(Expert, self.experts[index]).classifier.weight)  # (C, D)
        lengths = weight.norm(dim=1)
        group = self.groups[index] if self.aggregation.rows == "own" else torch.ones_like(self.groups[index])
        return (lengths * group).sum() / group.sum()
