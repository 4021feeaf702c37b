"""One stage of training, from where it stands to its end; knows no method by name."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from training.average import WeightAverage
from training.checkpoint import Checkpoint, save_checkpoint
from training.data.samplers import batch_sizes
from training.data.sets import AnyImages
from training.data.streamed import StreamedImages
from training.data.views import train_views
from training.device import autocast_dtype
from training.distributed import gather_outputs, own_rows, rank, share_gradients, with_shared_norms, world_size
from training.errors import TrainingError
from training.in_parts import InParts
from training.log import Log
from training.methods.method import FitStage, Model, Stage
from training.models.multi_expert import MultiExpertNet
from training.optimiser import optimiser_of
from training.recipe import Recipe


class DivergedError(TrainingError):
    """The loss, or what the network says of test images, is no longer a finite number."""


def run_stage(
    model: Model, stage: Stage, train: AnyImages, heldout: AnyImages, recipe: Recipe, *,
    start: Checkpoint | None, run: Path, log: Log, info: dict[str, Any],
    evaluate: Callable[[Model], dict[str, Any]],
) -> None:  # fmt: skip
    """
    Train `stage.part`, saving a checkpoint after every epoch. At the end `model` has the averaged weights, where the
    recipe has them averaged.

    Every random number comes from a generator seeded by (seed, stage, epoch), so an epoch does not depend on how many
    were run in this process: a killed and resumed training ends with the same weights.

    Args:
        train, heldout: on the model's device; of the latter a stage sees only what its `prepare` takes from it.
        start: where to go on; None: at the beginning.
        info: what goes into every checkpoint besides the metrics.
        evaluate: called every `recipe.evaluate_every` epochs; its result is logged.

    Raises:
        DivergedError: when the loss is not finite.
    """
    optimiser = optimiser_of(stage)
    if start is not None:
        start.load_into(model, optimiser)
    elif stage.begin is not None:
        torch.manual_seed(_seed(recipe.seed, stage.name, 0))
        stage.begin()
    model.requires_grad_(False)
    stage.part.requires_grad_(True)
    average = None if recipe.ema_decay is None else WeightAverage(model, recipe.ema_decay)
    scaler = torch.amp.GradScaler(enabled=recipe.precision == "fp16")
    if start is not None:
        _resume(start, average, scaler)
    network = forward_of(model, stage, recipe)
    after_step = None if average is None else partial(average.update, model)
    first = start.epochs_done if start else 0
    progress = tqdm(total=stage.epochs, initial=first, unit="epoch", desc=stage.name, disable=rank() > 0)
    for epoch in range(first, stage.epochs):
        model.eval()
        if stage.prepare is not None:
            with torch.no_grad():
                stage.prepare(train, heldout, epoch)
        stage.part.train()
        if stage.norms_follow:
            for norm in (part for part in model.net.modules() if isinstance(part, _BatchNorm)):
                norm.train()
        for group in optimiser.param_groups:
            group["lr"] = group["factor"] * stage.lr(epoch)
        line = _run_epoch(network, stage, train, recipe, epoch, optimiser, scaler, after_step)
        if (epoch + 1) % recipe.evaluate_every == 0 and epoch + 1 < stage.epochs:
            line["test"] = evaluate(judged_in(model, stage, average))
        log.write(line)
        if rank() == 0:
            state = {"updates": 0 if average is None else average.updates} | scaler.state_dict()
            averaged = None if average is None else average.model
            about = info | {"metrics": line, "state": state}
            save_checkpoint(run, stage.name, epoch + 1, model, optimiser, about, averaged)
        shown = {"loss": "loss", "accuracy": "accuracy", "images/s": "images_per_second"}
        progress.set_postfix({label: f"{line[name]:.4g}" for label, name in shown.items()}, refresh=False)
        progress.update()
    progress.close()
    if average is not None:
        model.load_state_dict(average.model.state_dict())


def _run_epoch(
    network: Callable[[Tensor], Any], stage: Stage, train: AnyImages, recipe: Recipe, epoch: int,
    optimiser: torch.optim.Optimizer, scaler: torch.amp.GradScaler, after_step: Callable[[], None] | None,
) -> dict[str, Any]:  # fmt: skip
    """
    All steps of an epoch; returns its line for the log: mean losses, accuracy in percent, seconds.

    Raises:
        DivergedError: when the mean loss is not finite.
    """
    generator = torch.Generator().manual_seed(_seed(recipe.seed, stage.name, epoch))
    torch.manual_seed(_seed(recipe.seed, stage.name, epoch, rank()))  # dropped paths
    order = stage.sampler(train.labels.cpu(), generator)
    began = time.perf_counter()
    sums: dict[str, Tensor] = {}
    for images, targets in batches(train, order, stage.batch_size, recipe, generator):
        losses, right = train_step(network, stage, optimiser, images, targets, epoch, generator, scaler)
        if after_step is not None:
            after_step()
        for name, value in {**losses, "accuracy": 100 * right}.items():
            sums[name] = sums.get(name, 0) + value.detach() * len(targets)
    means = {name: float(value) / len(order) for name, value in sums.items()}
    seconds = time.perf_counter() - began
    if not np.isfinite(means["loss"]):
        what = f"{stage.name}, epoch {epoch + 1}: the loss is {means['loss']}"
        raise DivergedError(f"{what}; lower {rates_of(stage, recipe)}")
    line: dict[str, Any] = {"stage": stage.name, "epoch": epoch + 1, "lr": stage.lr(epoch), **means}
    return line | {"seconds": round(seconds, 3), "images_per_second": round(len(order) / seconds, 1)}


def rates_of(stage: Stage | FitStage, recipe: Recipe) -> str:
    """The learning rates to which a stage that diverged may owe it: its own, and that of the stage before."""
    fields = dict.fromkeys((stage.lr_field, "lr") if isinstance(stage, Stage) else ("lr",))
    return " or ".join(f"{field} ({getattr(recipe, field)})" for field in fields)


def judged_in(model: Model, stage: Stage, average: WeightAverage | None) -> Model:
    """What an evaluation during a stage looks at: the network that learns there, or its average."""
    judged = model if average is None else average.model
    if stage.network is None:
        return judged
    name = next(name for name, part in model.named_modules() if part is stage.network)
    return Model(cast(MultiExpertNet, judged.get_submodule(name)), None)


def _resume(start: Checkpoint, average: WeightAverage | None, scaler: torch.amp.GradScaler) -> None:
    """Go on with the checkpoint's average and loss scale."""
    if average is not None:
        start.load_into(average.model)
        average.updates = int(start.state["updates"])
    if scaler.is_enabled():
        scaler.load_state_dict({key: value for key, value in start.state.items() if key != "updates"})


def fit_stage(
    model: Model, stage: FitStage, train: AnyImages, heldout: AnyImages, *, run: Path, log: Log, info: dict[str, Any]
) -> None:
    """Let `stage` set its weights from images on the model's device; save a checkpoint and log what it says."""
    model.eval()
    began = time.perf_counter()
    with torch.no_grad():
        found = stage.fit(train, heldout)
    line = {"stage": stage.name, "epoch": 1, **found, "seconds": round(time.perf_counter() - began, 3)}
    log.write(line)
    if rank() == 0:
        save_checkpoint(run, stage.name, 1, model, None, info | {"metrics": line})


def train_step(
    network: Callable[[Tensor], Any], stage: Stage, optimiser: torch.optim.Optimizer,
    images: Tensor, labels: Tensor, epoch: int, generator: torch.Generator,
    scaler: torch.amp.GradScaler | None = None,
) -> tuple[dict[str, Tensor], Tensor]:  # fmt: skip
    """
    Forward, loss, backward, step. Returns the losses and the share of images that all experts together get right.

    Args:
        network: what `forward_of` gives.
        images, labels: of the whole batch, also where several processes share it.
        generator: of the epoch.
        scaler: keeps gradients in the range of fp16.
    """
    scaler = scaler or torch.amp.GradScaler(enabled=False)
    if stage.step is not None:
        outputs, losses = stage.step(network, images, labels, epoch, generator)
    else:
        assert stage.losses is not None
        soft: Sequence[Tensor] = ()
        if stage.mixing is not None:
            images, *soft = stage.mixing(images, labels, generator)
        outputs = network(images)
        losses = stage.losses(outputs, labels, epoch, *soft)
    optimiser.zero_grad()
    scaler.scale(losses["loss"]).backward()
    if stage.clip_norm is not None:
        scaler.unscale_(optimiser)
        torch.nn.utils.clip_grad_norm_(stage.part.parameters(), stage.clip_norm)
    scaler.step(optimiser)
    scaler.update()
    with torch.no_grad():
        right = (outputs.expert_logits.mean(dim=0).argmax(dim=1) == labels).float().mean()
    return losses, right


def forward_of(model: Model, stage: Stage, recipe: Recipe) -> Callable[[Tensor], Any]:
    """
    The network's forward pass: under autocast, compiled where the recipe says so, without gradients where frozen.

    It takes a whole batch and gives the outputs for all of it. Of several processes each passes its own rows through
    the network; a recipe that accumulates passes a few rows at a time.
    """
    device = next(model.parameters()).device
    model.to(memory_format=torch.channels_last)
    net = model.net if stage.network is None else stage.network
    learns = any(parameter.requires_grad for parameter in net.parameters())
    network: torch.nn.Module = with_shared_norms(net)
    if recipe.compile and learns:
        network = torch.compile(network, dynamic=False)  # type: ignore[assignment]
    in_parts = recipe.accumulate > 1 and learns
    if in_parts:
        network = InParts(network, recipe.accumulate)
    if world_size() > 1 and learns:
        network = DistributedDataParallel(network)
    inside = set(net.parameters())
    share_gradients(parameter for parameter in stage.part.parameters() if parameter not in inside)
    dtype = autocast_dtype(recipe, device)

    def forward(images: Tensor) -> Any:
        with (
            torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None),
            torch.set_grad_enabled(learns),
        ):
            own = images[own_rows(len(images))]
            outputs = network(own, len(images) // world_size()) if in_parts else network(own)
            if stage.teacher is not None:
                outputs = outputs._replace(teacher_logits=stage.teacher(own))
            return gather_outputs(outputs, len(images))

    return forward


def batches(
    images: AnyImages, order: Tensor, batch_size: int, recipe: Recipe, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Augmented images (B, H, W, 3) uint8 and labels (B,) in `order`, in batches as `batch_sizes` has them."""
    if isinstance(images, StreamedImages):
        yield from images.training_batches(order, batch_size, generator)
        return
    for chosen in order.to(images.labels.device).split(batch_sizes(len(order), batch_size)):
        yield train_views(images.pixels[chosen], recipe, generator), images.labels[chosen]


def _seed(seed: int, stage: str, epoch: int, process: int = 0) -> int:
    others = [process] if process else []
    return int(np.random.SeedSequence([seed, epoch, *stage.encode(), *others]).generate_state(1, np.uint64)[0] >> 1)
