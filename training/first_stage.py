"""The first stage of a training, taken from a finished run of the recipe of which it is the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from training.checkpoint import CheckpointError, checkpoints_of, save_checkpoint
from training.distributed import rank
from training.methods.method import Model, Stage
from training.recipe import NO_EFFECT_FIELDS, PLACE_FIELDS

STAGE = "experts"  # the only stage of such a run that counts
# Fields, or beginnings of their names, that are without effect on the first stage of a training.
LATER_STAGE_FIELDS = (
    "name", *NO_EFFECT_FIELDS, "retrain", "tau", "ncm_", "first_stage", "router_epochs", "router_batch_size",
    "router_lr", "router_weight_decay", "router_positive_weight",
)  # fmt: skip
# And those of methods, or parts of a network, that the recipe of a first stage by itself does not have.
OTHER_METHOD_FIELDS = ("router_", "oltr_", "lfme_", "m2m_")


def take_over(source: Path, model: Model, stage: Stage, *, run: Path, info: dict[str, Any]) -> None:
    """
    Load the weights that `stage` would train from the run `source`, and save them as the stage's checkpoint in `run`.

    Args:
        info: of every checkpoint of `run`.

    Raises:
        CheckpointError: where there is no finished first stage, or it was trained on other images or under another
            recipe; the message names the first difference.
    """
    assert stage.alone is not None
    checkpoint = checkpoints_of(source).get(STAGE)
    if checkpoint is None:
        raise CheckpointError(f"first_stage={source}: no checkpoint of the stage {STAGE!r} there; ride-train makes it")
    places = PLACE_FIELDS if checkpoint.images_digest else ()
    ignored = (*LATER_STAGE_FIELDS, *OTHER_METHOD_FIELDS, "compile", *places)
    for key, (has, needs) in checkpoint.recipe.differences(stage.alone, ignored).items():
        raise CheckpointError(f"first_stage={source}: made with {key}={has}, this recipe needs {needs}")
    if checkpoint.epochs_done != stage.alone.epochs:
        raise CheckpointError(
            f"first_stage={source}: {checkpoint.epochs_done} of {stage.alone.epochs} epochs are done; "
            "finish it with ride-train --resume"
        )
    differs = checkpoint.other_images(info["classes"], info["class_counts"], info["images_digest"])
    if differs:
        raise CheckpointError(f"first_stage={source}: trained on other images: {differs}")
    checkpoint.load_into(model if stage.network is None else Model(stage.network, None), only="net.")
    line = {"stage": stage.name, "epoch": checkpoint.epochs_done, "from": str(source), "commit": checkpoint.commit}
    if rank() == 0:
        save_checkpoint(run, stage.name, stage.epochs, model, None, info | {"metrics": line})
