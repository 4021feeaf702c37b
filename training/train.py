"""A whole training: data, model, stages, evaluation, all in one run directory that can be resumed."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from training.checkpoint import Checkpoint, CheckpointError, checkpoints_of, current_commit
from training.claim import ClaimedError, claimed
from training.data.sets import AnyImages, Data, channel_statistics, load_data
from training.device import autocast_dtype, refuse_without_compiler
from training.distributed import from_first, joined, rank, world_size
from training.evaluate import count_not_finite, macs_of, predict, summarise
from training.files import write_atomically
from training.first_stage import take_over
from training.log import Log
from training.loop import DivergedError, fit_stage, rates_of, run_stage
from training.methods import ace, bbn, lfme, m2m, oltr, ride, sade, shike, single
from training.methods.method import FitStage, Method, Model, Stage
from training.methods.teacher import refuse_other_teachers
from training.models.backbones import BACKBONES
from training.pretrained import start_from
from training.recipe import NO_EFFECT_FIELDS, PLACE_FIELDS, SINGLE_PROCESS_METHODS, Decoding, Recipe, RecipeError

METHODS: dict[str, Method] = {
    "ride": ride.build, "single": single.build, "shike": shike.build, "sade": sade.build, "ace": ace.build,
    "bbn": bbn.build, "oltr": oltr.build, "lfme": lfme.build, "m2m": m2m.build,
}  # fmt: skip
PUBLISHED_THRESHOLD = 0.5


def train(recipe: Recipe, run: Path) -> dict[str, Any]:
    """
    Train `recipe` in the directory `run`, going on from its newest checkpoint where there is one.

    Returns:
        The evaluation on the test images after the last epoch, which is also in run/results.json.

    Raises:
        DataError: for images that are missing, unreadable or too few.
        ClaimedError: where another process trains in `run`, or has trained there while the images were read.
        CheckpointError: where `run` holds another recipe's checkpoints, or `recipe.first_stage` does not fit.
        DivergedError: when the loss, or a logit of a test image, is not finite.
        LostProcessError: where torchrun started several processes, and another one ended.
        RecipeError: for a precision that the device does not have, a method that several processes cannot share, or a
            network to be compiled without a compiler.
    """
    with joined() as device, ExitStack() as held:
        return _train(recipe, run, device, held)


def _train(recipe: Recipe, run: Path, device: torch.device, held: ExitStack) -> dict[str, Any]:
    autocast_dtype(recipe, device)  # refuses before anything is read
    if recipe.method in SINGLE_PROCESS_METHODS and world_size() > 1:
        raise RecipeError(f"method={recipe.method!r}: trains in one process, there are {world_size()}")
    done = checkpoints_of(run)
    for checkpoint in done.values():
        _refuse_other_recipe(checkpoint, recipe)
    if any(name not in done or done[name].epochs_done < epochs for name, epochs in recipe.stage_epochs().items()):
        refuse_without_compiler(recipe, device, resumed=bool(done))
    decoding: Decoding = next((checkpoint.decoding for checkpoint in done.values()), recipe.decoding)
    data = load_data(dataclasses.replace(recipe, decoding=decoding), checked=bool(done))
    for checkpoint in done.values():
        refuse_other_images(checkpoint, data)
    if recipe.teacher and not _is_taught(recipe, done):
        refuse_other_teachers(recipe, data.digest)
    if data.report.findings and rank() == 0:
        print(f"{recipe.data}: trained on as it is\n{data.report}", file=sys.stderr)
    mean, std = (recipe.mean, recipe.std) if recipe.mean and recipe.std else channel_statistics(data.train)
    if rank() == 0:
        print(f"{recipe.data}: {_sizes(data)}", file=sys.stderr)
        usual = BACKBONES[recipe.backbone].image_size
        if recipe.image_size < usual:
            print(
                f"image_size={recipe.image_size}: {recipe.backbone} is usually trained on images of {usual}x{usual} "
                f"pixels: --set image_size={usual} --set crop=resized --set test_fit=inner_crop",
                file=sys.stderr,
            )
    torch.manual_seed(recipe.seed)
    model, stages = _built(recipe, data.counts, mean, std, done)
    model.to(device)
    images, heldout, test = (part.to(device) for part in (data.train, data.heldout, data.test))
    info: dict[str, Any] = {
        "recipe": recipe.to_dict(), "classes": data.classes, "class_counts": data.counts, "mean": mean, "std": std,
        "images_digest": data.digest, "unseen_digest": data.unseen_digest, "commit": current_commit(),
        "torch": torch.__version__, "device": device.type, "decoding": data.decoding, "processes": world_size(),
    }  # fmt: skip
    if recipe.pretrained is not None:
        info["pretrained"] = start_from(model.net, recipe, data.digest, data.classes)

    def evaluate(current: Model, stage: Stage | FitStage, per_class: bool = False) -> dict[str, Any]:
        return from_first(lambda: _evaluated(recipe, current, stage, test, data.counts, per_class))

    from_first(partial(_claim, run, held, done))
    log = Log.open(run, {name: checkpoint.epochs_done for name, checkpoint in done.items()})
    try:
        for stage in stages:
            if stage.arrange is not None:
                stage.arrange()
                model.to(device)
            start = done.get(stage.name)
            if start is not None and start.epochs_done == stage.epochs:
                start.load_into(model)
            elif isinstance(stage, FitStage):
                fit_stage(model, stage, images, heldout, run=run, log=log, info=info)
            elif start is None and stage.alone is not None and recipe.first_stage is not None:
                take_over(Path(recipe.first_stage), model, stage, run=run, info=info)
            else:
                run_stage(
                    model, stage, images, heldout, recipe,
                    start=start, run=run, log=log, info=info, evaluate=partial(evaluate, stage=stage),
                )  # fmt: skip
    finally:
        log.close()
    results = evaluate(model, stages[-1], per_class=True)
    if rank() == 0:
        text = json.dumps(results | {"data": _describe(data)} | info, indent=1)
        write_atomically(run / "results.json", text + "\n")
    return results


def _evaluated(
    recipe: Recipe, model: Model, stage: Stage | FitStage, test: AnyImages, counts: Sequence[int], per_class: bool
) -> dict[str, Any]:
    """The figures after a stage, on test images. Routers have a part in them only after their own stage."""
    if stage.name != "routers":
        model = Model(model.net, None)
    predictions = predict(model, test)
    if unusable := count_not_finite(predictions):
        raise DivergedError(
            f"{stage.name}: NaN or infinity for {unusable} of {len(test)} test images; lower {rates_of(stage, recipe)}"
        )
    thresholds = [PUBLISHED_THRESHOLD] * (recipe.n_experts - 1)
    return summarise(predictions, counts, macs_of(model, recipe.image_size), thresholds, per_class)


def _claim(run: Path, held: ExitStack, done: Mapping[str, Checkpoint]) -> None:
    """Keep other processes out of the run's directory for as long as `held` is open."""
    run.mkdir(parents=True, exist_ok=True)
    held.enter_context(claimed(run))
    if {checkpoint.path for checkpoint in checkpoints_of(run).values()} != {each.path for each in done.values()}:
        raise ClaimedError(
            f"{run}: another process has trained there since this one began; --resume goes on with its "
            "checkpoints, --out names another directory"
        )


def trained_model(run: Path) -> tuple[Checkpoint, Model]:
    """
    The model of a finished run, on the CPU, in evaluation mode.

    Raises:
        CheckpointError: where there is no run, or it is not finished.
    """
    done = checkpoints_of(run)
    if not done:
        raise CheckpointError(f"{run}: no checkpoints there; ride-train makes them")
    recipe = next(iter(done.values())).recipe
    stages = recipe.stage_epochs()
    for name, epochs in stages.items():
        reached = done[name].epochs_done if name in done else 0
        if reached < epochs:
            raise CheckpointError(
                f"{run}: stage {name} has {reached} of {epochs} epochs; finish it with ride-train --resume"
            )
    checkpoint = done[list(stages)[-1]]
    model, built = _built(recipe, checkpoint.class_counts, checkpoint.mean, checkpoint.std, done)
    for stage in built:
        if stage.arrange is not None:
            stage.arrange()
    checkpoint.load_into(model)
    if "routers" not in stages:  # there, but never trained
        model.routers = None
    return checkpoint, model.eval()


def _built(
    recipe: Recipe,
    class_counts: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    done: Mapping[str, Checkpoint],
) -> tuple[Model, Sequence[Stage | FitStage]]:
    """A fresh model and its stages; whoever has learnt all that there is from a teacher does without it."""
    if _is_taught(recipe, done):
        recipe = dataclasses.replace(recipe, teacher="", distill_each=False)
    return METHODS[recipe.method](recipe, class_counts, mean, std)


def _is_taught(recipe: Recipe, done: Mapping[str, Checkpoint]) -> bool:
    experts = done.get("experts")
    return experts is not None and experts.epochs_done == recipe.epochs


def refuse_other_images(checkpoint: Checkpoint, data: Data) -> None:
    """
    Whatever was held out would else be drawn anew, and images that were trained on among it.

    Raises:
        CheckpointError: where the images are not those of the checkpoint.
    """
    differs = checkpoint.other_images(data.classes, data.counts, data.digest)
    if differs:
        raise CheckpointError(
            f"{checkpoint.path}: was trained on other images than are there now: {differs}; restore them, or begin "
            "anew in another directory"
        )
    if checkpoint.unseen_digest not in ("", data.unseen_digest):
        raise CheckpointError(
            f"{checkpoint.path}: other images were held out or tested than are there now: some have changed, are gone, "
            "are new or go by other names; restore them, or begin anew in another directory"
        )


def _refuse_other_recipe(checkpoint: Checkpoint, recipe: Recipe) -> None:
    """A run goes on only under the recipe that began it; what decides nothing may change, and where the images lie."""
    places = PLACE_FIELDS if checkpoint.images_digest else ()  # else nothing would tell that they are others
    different = checkpoint.recipe.differences(recipe, NO_EFFECT_FIELDS + places)
    if recipe.decoding not in ("auto", checkpoint.decoding):
        different["decoding"] = checkpoint.decoding, recipe.decoding
    if different:
        listed = ", ".join(f"{name}={theirs} (now {ours})" for name, (theirs, ours) in different.items())
        raise CheckpointError(f"{checkpoint.path}: made with {listed}; give another --out directory")


def _sizes(data: Data) -> str:
    return (
        f"{len(data.classes)} classes of {max(data.counts):,} to {min(data.counts):,} images, {len(data.train):,} to "
        f"train on; {len(data.heldout):,} held out, {len(data.test):,} to test"
    )


def _describe(data: Data) -> dict[str, Any]:
    sizes = {name: len(getattr(data, name)) for name in ("train", "heldout", "test")}
    return sizes | {"heldout_note": data.heldout_note, "findings": data.report.counts()}
