"""Losses that several methods use."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from training.recipe import RecipeError


def ldam_margins(class_counts: Sequence[int], max_margin: float) -> Tensor:
    """(C,), in units of the cosine: proportional to n_c^(−1/4), `max_margin` for the rarest class. LDAM, eq. 13."""
    margins = torch.tensor(class_counts, dtype=torch.float64) ** -0.25
    return (max_margin * margins / margins.max()).float()


def effective_number_weights(class_counts: Sequence[int], beta: float) -> Tensor:
    """
    (C,), with mean 1: proportional to (1 − β)/(1 − β^n_c), nearly inverse frequency for β = 0.9999.

    Source: class-balanced loss, arXiv:1901.05555.
    """
    counts = torch.tensor(class_counts, dtype=torch.float64)
    weights = (1 - beta) / (1 - beta**counts)
    return (weights * len(weights) / weights.sum()).float()


def class_temperatures(class_counts: Sequence[int], gamma: float, *, divided: bool = True) -> Tensor:
    """
    (C,), at most 1: 1 for the most frequent class, smaller for rare ones.

    Args:
        divided: β / max β, as the authors' code has it; else β + 1 − max β, as the paper has it.

    Raises:
        RecipeError: where the paper's form is not positive for every class.

    Source: RIDE, arXiv:2010.01809, distribution-aware diversity loss.
    """
    counts = torch.tensor(class_counts, dtype=torch.float64)
    softened = gamma * len(counts) * counts / counts.sum() + (1 - gamma)
    if divided:
        return (softened / softened.max()).float()
    temperatures = softened + 1 - softened.max()
    if temperatures.min() <= 0:
        raise RecipeError(
            f"diversity_gamma={gamma}: the paper's temperature of the rarest class is {temperatures.min():.3g} for "
            "these class counts; it must be positive: lower diversity_gamma"
        )
    return temperatures.float()


def weighted_cross_entropy(
    logits: Tensor, labels: Tensor, class_weights: Tensor | None = None, targets: Tensor | None = None
) -> Tensor:
    """
    Cross-entropy of each image times the weight of its label, normalised by the batch's sum of weights.

    Args:
        logits: (B, C).
        labels: (B,).
        class_weights: (C,); None: 1 each.
        targets: (B, C), rows that sum to 1, in place of the labels but for the weights.

    Returns:
        (), in nats.
    """
    weight = None if class_weights is None else class_weights.to(logits.dtype)
    if targets is None:
        return F.cross_entropy(logits, labels, weight=weight)
    losses = F.cross_entropy(logits, targets.to(logits.dtype), reduction="none")
    if weight is None:
        return losses.mean()
    return (weight[labels] * losses).sum() / weight[labels].sum()


def ldam_loss(
    logits: Tensor, labels: Tensor, margins: Tensor, scale: float, class_weights: Tensor | None = None,
    targets: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """
    Cross-entropy after the true class's logit was lowered by scale · margin.

    Args:
        logits: (B, C), scaled by `scale`.
        labels: (B,).
        margins: (C,), in units of the cosine.
        class_weights, targets: as of `weighted_cross_entropy`; margins follow the labels.

    Returns:
        (), in nats.

    Source: LDAM, arXiv:1906.07413.
    """
    lowering = (scale * margins[labels]).to(logits.dtype).unsqueeze(1)  # (B, 1)
    lowered = torch.scatter_add(logits, 1, labels.unsqueeze(1), -lowering)
    return weighted_cross_entropy(lowered, labels, class_weights, targets)


def focal_loss(logits: Tensor, labels: Tensor, gamma: float, class_weights: Tensor | None = None) -> Tensor:
    """
    Cross-entropy times (1 − p)^γ, p the probability of the true class without any weight.

    Args:
        logits: (B, C).
        labels: (B,).
        gamma: 0 gives cross-entropy.
        class_weights: (C,); weighted or not, the sum is divided by B.

    Returns:
        (), in nats.

    Source: arXiv:1708.02002, as a softmax loss like LDAM's code has it.
    """
    entropy = F.cross_entropy(logits, labels, reduction="none")
    missing = -torch.expm1(-entropy)  # 1 - p; where it is 0, powers below 1 have no slope
    losses = missing.clamp_min(torch.finfo(missing.dtype).tiny) ** gamma * entropy
    if class_weights is None:
        return losses.mean()
    return (class_weights[labels].to(losses.dtype) * losses).mean()


def sigmoid_focal_loss(logits: Tensor, labels: Tensor, gamma: float, class_weights: Tensor | None = None) -> Tensor:
    """
    Each class a question of its own, yes for the true one: binary cross-entropy times (1 − p)^γ, p of the right answer.

    Args:
        logits: (B, C).
        labels: (B,).
        gamma: 0 gives binary cross-entropy.
        class_weights: (C,), those of the labels count for all classes of an image; the sum is divided by B.

    Returns:
        (), in nats, summed over classes.

    Source: the focal loss of the class-balanced loss, arXiv:1901.05555.
    """
    right = torch.where(F.one_hot(labels, logits.shape[1]).bool(), logits, -logits)  # logits of the right answers
    losses = (torch.exp(gamma * F.logsigmoid(-right)) * -F.logsigmoid(right)).sum(dim=1)
    if class_weights is None:
        return losses.mean()
    return (class_weights[labels].to(losses.dtype) * losses).mean()


def diversity_loss(expert_logits: Tensor, temperatures: Tensor) -> Tensor:
    """
    How far the experts stand from their mean; enters the total with a negative weight.

    T̄² · KL(softmax(mean logits / T) ‖ softmax(expert logits / T)), the mean detached, summed over experts. The paper
    compares every pair of experts, O(E²); the authors' code, which we follow, each with the mean of all, O(E).

    Args:
        expert_logits: (E, B, C).
        temperatures: (C,), positive, a larger value softens that class.

    Returns:
        (), in nats, mean over images. 0 when all experts agree.

    Raises:
        ValueError: for fewer than two experts, where it would always be 0.

    Source: RIDE, arXiv:2010.01809, distribution-aware diversity loss.
    """
    n_experts, batch, _ = expert_logits.shape
    if n_experts < 2:
        raise ValueError(f"diversity needs two experts or more, there is {n_experts}")
    mean = F.softmax(expert_logits.mean(dim=0).detach() / temperatures, dim=1)
    each = F.log_softmax(expert_logits / temperatures, dim=2)
    divergence = F.kl_div(each, mean.expand_as(each), reduction="sum") / batch
    return temperatures.mean() ** 2 * divergence


def pairwise_diversity_loss(expert_logits: Tensor, temperatures: Tensor) -> Tensor:
    """
    How far every expert stands from every other, as RIDE's paper has it; enters the total with a negative weight.

    Σ_i 1/(E − 1) Σ_{j≠i} KL(softmax(z^i / T) ‖ softmax(z^j / T)), with gradients to both sides and without the T̄² that
    the authors' code multiplies its own form by.

    Args:
        expert_logits: (E, B, C).
        temperatures: (C,), positive.

    Returns:
        (), in nats, mean over images. 0 when all experts agree.

    Raises:
        ValueError: for fewer than two experts.

    Source: RIDE, arXiv:2010.01809, distribution-aware diversity loss.
    """
    n_experts, batch, _ = expert_logits.shape
    if n_experts < 2:
        raise ValueError(f"diversity needs two experts or more, there is {n_experts}")
    logs = F.log_softmax(expert_logits / temperatures, dim=2)
    shares = logs.exp()
    negative_entropies = (shares * logs).sum()  # Σ_i, of the pairs' Σ p_i log p_i
    cross = torch.einsum("ibc,jbc->", shares, logs) - negative_entropies  # Σ over i ≠ j of p_i log p_j
    return (negative_entropies - cross / (n_experts - 1)) / batch


def distillation_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """
    T² · KL(softmax(teacher / T) ‖ softmax(student / T)), in nats, mean over images.

    Args:
        student_logits, teacher_logits: (B, C).

    Source: Hinton et al., arXiv:1503.02531.
    """
    teacher = F.log_softmax(teacher_logits / temperature, dim=1)
    student = F.log_softmax(student_logits / temperature, dim=1)
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)
