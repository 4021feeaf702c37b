"""
M2m: images of frequent classes are changed until a second network takes them for rare ones, and train as such.

That network, the generator, is trained first, by cross-entropy. The last epochs see class-balanced batches, of which
images of rare classes are replaced by generated ones where the generator is sure of them.

Source: Kim et al., "M2m: Imbalanced Classification via Major-to-minor Translation", arXiv:2004.00431, and its public
code. There the initial noise is limited per colour channel over the whole batch, which is less (for 24 images a third);
here per image, as the paper has it. There CIFAR-100 is normalised by its own statistics, and the network's shortcuts
are padded at one end; here both are as for the other methods. Images are generated in fp32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from training.data.samplers import class_balanced
from training.methods.method import Losses, Model, Network, Stage, build_model, scheduled_lr
from training.methods.single import SingleLoss, single_stage
from training.models.multi_expert import MultiExpertNet, Outputs
from training.recipe import Recipe


@dataclass(frozen=True)
class Plan:
    """
    Which images of a batch are to be generated, and from what.

    Attributes:
        places: (G,), positions in the batch; their labels are the classes to generate.
        seeds: (G,), positions in the batch of the images to start from.
        acceptance: (G,), the probability with which a generated image is used, if the generator is sure of it.
    """

    places: Tensor
    seeds: Tensor
    acceptance: Tensor


def plan(labels: Tensor, counts: Tensor, beta: float, generator: torch.Generator) -> Plan:
    """
    An image of class k stays with probability n_k/n_max. The others are generated, where the batch has an image of a
    more frequent class k0, which is drawn in proportion to 1 − β^(n_k0 − n_k).

    Args:
        labels: (B,).
        counts: (C,), training images.
        generator: on the CPU.
    """
    sizes = counts[labels].double().cpu()
    stays = torch.rand(len(labels), generator=generator, dtype=torch.float64) < sizes / counts.max()
    places = torch.nonzero(~stays).flatten()
    likely = 1 - beta ** (sizes.unsqueeze(0) - sizes[places].unsqueeze(1)).clamp_min(0)  # (G, B)
    possible = likely.sum(dim=1) > 0
    places, likely = places[possible], likely[possible]
    if not len(places):
        return Plan(places, places, torch.empty(0, dtype=torch.float64))
    seeds = torch.multinomial(likely, 1, generator=generator)  # (G, 1)
    return Plan(places, seeds.squeeze(1), likely.gather(1, seeds).squeeze(1))


def translate(
    trained: MultiExpertNet, judge: MultiExpertNet, images: Tensor, seed_labels: Tensor, targets: Tensor,
    recipe: Recipe, generator: torch.Generator,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """
    Descend from noisy images on CE(judge, target) + λ · the trained network's output for the seed's class.

    With a cosine classifier that is the cosine itself, as in the public code, whose loss does the scaling.

    Args:
        trained, judge: in evaluation mode.
        images: (G, H, W, 3), in [0, 255].
        seed_labels, targets: (G,), the classes of the images, and those to make of them.

    Returns:
        The images, float in [0, 255], and the judge's probability of each target, (G,).
    """
    noise = torch.rand(images.shape, generator=generator) - 0.5
    length = noise.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    noise *= (recipe.m2m_noise / length).clamp(max=1)
    pixels = (images.float() / 255 + noise.to(images.device)).clamp(0, 1)
    scale = recipe.cosine_scale if recipe.classifier == "cosine" else 1.0
    with torch.autocast(images.device.type, enabled=False), torch.enable_grad():
        for _ in range(recipe.m2m_steps):
            pixels = pixels.detach().requires_grad_()
            wanted = F.cross_entropy(judge(255 * pixels).expert_logits[0], targets)
            left = trained(255 * pixels).expert_logits[0].gather(1, seed_labels.unsqueeze(1)).mean() / scale
            (slope,) = torch.autograd.grad(wanted + recipe.m2m_lambda * left, pixels)
            steepness = slope.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            pixels = (pixels - recipe.m2m_step_size * slope / (steepness + 1e-10)).clamp(0, 1)
        with torch.no_grad():
            pixels = pixels.detach()
            probabilities = F.softmax(judge(255 * pixels).expert_logits[0], dim=1)
    return 255 * pixels, probabilities.gather(1, targets.unsqueeze(1)).squeeze(1)


def accepted(probabilities: Tensor, acceptance: Tensor, gamma: float, generator: torch.Generator) -> Tensor:
    """(G,), bool, on the CPU: true with the plan's probability, where the judge's probability reaches γ; else false."""
    lucky = torch.rand(len(acceptance), generator=generator, dtype=torch.float64) < acceptance
    return (probabilities.cpu() >= gamma) & lucky


def step(
    recipe: Recipe, model: Model, judge: MultiExpertNet, counts: Tensor, loss: SingleLoss, begin: int,
    network: Network, images: Tensor, labels: Tensor, epoch: int, generator: torch.Generator,
) -> tuple[Outputs, Losses]:  # fmt: skip
    """Replace what can be generated, then one forward pass. "generated" is the share of the batch that was replaced."""
    chosen = plan(labels.cpu(), counts, recipe.m2m_beta, generator)
    images, replaced = images.float(), 0
    if len(chosen.places):
        places, seeds = chosen.places.to(images.device), chosen.seeds.to(images.device)
        model.net.eval()
        made, probabilities = translate(
            model.net, judge, images[seeds], labels[seeds], labels[places], recipe, generator
        )  # fmt: skip
        model.net.train()
        good = accepted(probabilities, chosen.acceptance, recipe.m2m_gamma, generator).to(images.device)
        images[places[good]] = made[good]
        replaced = int(good.sum())
    outputs = network(images)
    share = torch.tensor(replaced / len(labels), device=images.device)
    return outputs, {**loss(outputs, labels, begin + epoch), "generated": share}


def build(
    recipe: Recipe, class_counts: Sequence[int], mean: Sequence[float], std: Sequence[float]
) -> tuple[Model, list[Stage]]:
    """
    A fresh model with its generator; the stages of the generator, of the model on the images as they are, and of the
    model on translated ones, which goes on with the same schedule and fresh momentum.
    """
    plain = dataclasses.replace(recipe, method="single", loss="ce", classifier="linear", deferred_from=None)
    model = build_model(recipe, len(class_counts), mean, std)
    taught = build_model(plain, len(class_counts), mean, std)
    model = Model(model.net, None, {"generator": taught.net})
    pretraining = dataclasses.replace(
        single_stage(plain, taught, class_counts), name="generator", network=taught.net, alone=plain
    )
    begin = recipe.epoch_of(recipe.m2m_from)
    first = dataclasses.replace(single_stage(recipe, model, class_counts), epochs=begin, alone=None)
    second = dataclasses.replace(
        first, name="translated", epochs=recipe.epochs - begin, losses=None, sampler=class_balanced,
        lr=lambda epoch: scheduled_lr(recipe, begin + epoch),
        step=partial(
            step, recipe, model, taught.net, torch.tensor(class_counts), SingleLoss(recipe, class_counts), begin
        ),
    )  # fmt: skip
    return model, [pretraining, first, second]
