"""The first stage of a training, taken from a finished run of the recipe of which it is the whole."""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path
from typing import Any

from training.checkpoint import CheckpointError, checkpoints_of, save_checkpoint
from training.distributed import rank
from training.methods.method import Model, Stage
from training.recipe import DECIDE_NOTHING

STAGE = "experts"  # the only stage of such a run that counts
WITHOUT_EFFECT = ("name", "first_stage", "compile", *DECIDE_NOTHING)
OF_OTHER_STAGES = ("retrain", "tau", "ncm_", "router_", "oltr_", "lfme_", "m2m_")


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
    theirs, ours = checkpoint.recipe.to_dict(), stage.alone.to_dict()
    for key in ours:
        if _matters(key) and theirs[key] != ours[key]:
            raise CheckpointError(f"first_stage={source}: made with {key}={theirs[key]}, this recipe needs {ours[key]}")
    if checkpoint.epochs_done != stage.alone.epochs:
        raise CheckpointError(
            f"first_stage={source}: {checkpoint.epochs_done} of {stage.alone.epochs} epochs are done; "
            "finish it with ride-train --resume"
        )
    for key in ("classes", "class_counts", "mean", "std"):
        for index, (found, wanted) in enumerate(zip_longest(getattr(checkpoint, key), info[key])):
            if found != wanted:
                raise CheckpointError(
                    f"first_stage={source}: trained on other images: {key}[{index}] is {found}, here {wanted}"
                )
    if checkpoint.images_digest not in ("", info["images_digest"]):
        raise CheckpointError(f"first_stage={source}: trained on other images: as many, but not the same")
    checkpoint.load_into(model if stage.network is None else Model(stage.network, None))
    line = {"stage": stage.name, "epoch": checkpoint.epochs_done, "from": str(source), "commit": checkpoint.commit}
    if rank() == 0:
        save_checkpoint(run, stage.name, stage.epochs, model, None, info | {"metrics": line})


def _matters(key: str) -> bool:
    return key not in WITHOUT_EFFECT and not key.startswith(OF_OTHER_STAGES)
