"""One stage of training, from where it stands to its end; knows no method by name."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from training.checkpoint import Checkpoint, save_checkpoint
from training.data.sets import Images
from training.data.views import train_views
from training.methods.method import FitStage, Model, Stage
from training.optimiser import optimiser_of
from training.recipe import Recipe


class DivergedError(RuntimeError):
    """The loss is no longer a finite number."""


@dataclass
class Log:
    """
    Where a run says how it goes: metrics.jsonl, TensorBoard, and a progress bar.

    Lines of epochs that the newest checkpoint does not hold are dropped at the start: a resumed run makes them again.
    """

    file: Path
    board: SummaryWriter

    @classmethod
    def open(cls, run: Path, done: dict[str, int]) -> Log:
        """`done`: epochs that the checkpoints hold, by stage."""
        file = run / "metrics.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        kept = [line for line in lines if _is_done(line, done)]
        file.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        return cls(file, SummaryWriter(run / "tensorboard"))

    def write(self, values: dict[str, Any]) -> None:
        """One epoch: {"stage", "epoch" (from 1), numbers, nested numbers}."""
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
        for name, number in _numbers(values):
            self.board.add_scalar(f"{values['stage']}/{name}", number, values["epoch"])
        self.board.flush()


def run_stage(
    model: Model, stage: Stage, train: Images, heldout: Images, recipe: Recipe, *,
    start: Checkpoint | None, run: Path, log: Log, info: dict[str, Any],
    evaluate: Callable[[Model], dict[str, Any]],
) -> None:  # fmt: skip
    """
    Train `stage.part`, saving a checkpoint after every epoch.

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
    network = forward_of(model, stage, recipe)
    labels = train.labels.cpu()
    progress = tqdm(total=stage.epochs, initial=start.epochs_done if start else 0, unit="epoch", desc=stage.name)
    for epoch in range(progress.n, stage.epochs):
        model.eval()
        if stage.prepare is not None:
            with torch.no_grad():
                stage.prepare(train, heldout, epoch)
        (model.net if stage.norms_follow else stage.part).train()
        for group in optimiser.param_groups:
            group["lr"] = group["factor"] * stage.lr(epoch)
        generator = torch.Generator().manual_seed(_seed(recipe.seed, stage.name, epoch))
        torch.manual_seed(_seed(recipe.seed, stage.name, epoch))  # dropped paths
        order = stage.sampler(labels, generator)
        began = time.perf_counter()
        sums: dict[str, Tensor] = {}
        for images, targets in batches(train, order, stage.batch_size, recipe, generator):
            losses, right = train_step(network, stage, optimiser, images, targets, epoch, generator)
            for name, value in {**losses, "accuracy": 100 * right}.items():
                sums[name] = sums.get(name, 0) + value.detach() * len(targets)
        means = {name: float(value) / len(order) for name, value in sums.items()}
        seconds = time.perf_counter() - began
        if not np.isfinite(means["loss"]):
            raise DivergedError(f"{stage.name}, epoch {epoch + 1}: the loss is {means['loss']}; lower lr ({recipe.lr})")
        line: dict[str, Any] = {"stage": stage.name, "epoch": epoch + 1, "lr": stage.lr(epoch), **means}
        line |= {"seconds": round(seconds, 3), "images_per_second": round(len(order) / seconds, 1)}
        if (epoch + 1) % recipe.evaluate_every == 0 and epoch + 1 < stage.epochs:
            line["test"] = evaluate(model if stage.network is None else Model(stage.network, None))
        log.write(line)
        save_checkpoint(run, stage.name, epoch + 1, model, optimiser, info | {"metrics": line})
        shown = {"loss": means["loss"], "accuracy": means["accuracy"], "images/s": line["images_per_second"]}
        progress.set_postfix({name: f"{value:.4g}" for name, value in shown.items()}, refresh=False)
        progress.update()
    progress.close()


def fit_stage(
    model: Model, stage: FitStage, train: Images, heldout: Images, *, run: Path, log: Log, info: dict[str, Any]
) -> None:
    """Let `stage` set its weights from images on the model's device; save a checkpoint and log what it says."""
    model.eval()
    began = time.perf_counter()
    with torch.no_grad():
        found = stage.fit(train, heldout)
    line = {"stage": stage.name, "epoch": 1, **found, "seconds": round(time.perf_counter() - began, 3)}
    log.write(line)
    save_checkpoint(run, stage.name, 1, model, None, info | {"metrics": line})


def train_step(
    network: Callable[[Tensor], Any], stage: Stage, optimiser: torch.optim.Optimizer,
    images: Tensor, labels: Tensor, epoch: int, generator: torch.Generator,
) -> tuple[dict[str, Tensor], Tensor]:  # fmt: skip
    """Forward, loss, backward, step. Returns the losses and the share of images that all experts together get right."""
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
    losses["loss"].backward()
    if stage.clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(stage.part.parameters(), stage.clip_norm)
    optimiser.step()
    with torch.no_grad():
        right = (outputs.expert_logits.mean(dim=0).argmax(dim=1) == labels).float().mean()
    return losses, right


def forward_of(model: Model, stage: Stage, recipe: Recipe) -> Callable[[Tensor], Any]:
    """The network's forward pass: under autocast, compiled where the recipe says so, without gradients where frozen."""
    device = next(model.parameters()).device
    model.to(memory_format=torch.channels_last)
    net = model.net if stage.network is None else stage.network
    learns = any(parameter.requires_grad for parameter in net.parameters())
    network = torch.compile(net, dynamic=False) if recipe.compile and learns else net
    half = recipe.precision == "bf16" or (recipe.precision == "auto" and has_bf16_units(device))

    def forward(images: Tensor) -> Any:
        with torch.autocast(device.type, torch.bfloat16, enabled=half), torch.set_grad_enabled(learns):
            outputs = network(images)
            return outputs if stage.teacher is None else outputs._replace(teacher_logits=stage.teacher(images))

    return forward


def has_bf16_units(device: torch.device) -> bool:
    """Whether bf16 is faster than fp32 there: tensor cores from Ampere on; AMX or AVX-512 bf16 on a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    return torch.cpu._is_avx512_bf16_supported()


def batches(
    images: Images, order: Tensor, batch_size: int, recipe: Recipe, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Augmented images (B, H, W, 3) uint8 and labels (B,) in `order`; the last batch may be smaller."""
    for chosen in order.to(images.labels.device).split(batch_size):
        yield train_views(images.pixels[chosen], recipe, generator), images.labels[chosen]


def _seed(seed: int, stage: str, epoch: int) -> int:
    return int(np.random.SeedSequence([seed, epoch, *stage.encode()]).generate_state(1, np.uint64)[0] >> 1)


def _is_done(line: str, done: dict[str, int]) -> bool:
    try:
        values = json.loads(line)
    except json.JSONDecodeError:  # the line that a kill cut short
        return False
    return values["epoch"] <= done.get(values["stage"], 0)


def _numbers(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "epoch":
            yield prefix + name, value
