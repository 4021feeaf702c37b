"""Several trainings one after another in one directory, which can be killed at any moment and started again."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from training.checkpoint import CheckpointError, checkpoints_of
from training.claim import claimed
from training.errors import TrainingError
from training.files import write_atomically
from training.first_stage import LATER_STAGE_FIELDS
from training.recipe import NO_EFFECT_FIELDS, Recipe
from training.train import train


class RunsError(TrainingError, ValueError):
    """A directory that other settings made, or runs that are not there."""


def train_all(
    runs: Mapping[str, Recipe], out: Path, settings: dict[str, Any], finish: Callable[[Path], object]
) -> dict[str, str]:
    """
    Train every recipe in a directory of its own, going on where an earlier call stopped; finished ones are left alone.

    Where two recipes share their whole first stage (a classifier that is retrained on the features of another run),
    it is trained once and its checkpoint copied.

    Args:
        runs: directory name below `out` to recipe, in the order in which they are trained.
        settings: JSON values that a later call must repeat.
        finish: called with the directory of every finished run, old or new; may be called again for the same one.

    Returns:
        Directory name to the reason, of the runs that failed; the others are finished. Their error.txt says where.

    Raises:
        ClaimedError, RunsError: before anything is trained.
    """
    out.mkdir(parents=True, exist_ok=True)
    with claimed(out):
        _refuse_other_settings(out, settings)
        for name, recipe in runs.items():
            _refuse_other_recipe(out / name, recipe)
        failures = {}
        for index, (name, recipe) in enumerate(runs.items(), start=1):
            run = out / name
            run.mkdir(exist_ok=True)
            try:
                if not (run / "results.json").exists():
                    print(f"{name}: run {index} of {len(runs)}", file=sys.stderr, flush=True)
                    _borrow_first_stage(run, recipe, [out / other for other in runs if other != name])
                    train(recipe, run)
                finish(run)
            except Exception as error:  # whatever it is, the other runs go on
                failures[name] = f"{type(error).__name__}: {error}"
                write_atomically(run / "error.txt", traceback.format_exc())
            else:
                (run / "error.txt").unlink(missing_ok=True)
            finally:
                torch.compiler.reset()  # or the ninth network of a process is silently no longer compiled
        return failures


def refuse_equal_names(recipes: Sequence[Recipe]) -> None:
    """
    Refuse recipes that would share a directory.

    Raises:
        RunsError: where two recipes have one name, which would be that of one directory.
    """
    twice = sorted(name for name, times in Counter(recipe.name for recipe in recipes).items() if times > 1)
    if twice:
        raise RunsError(f"name={twice[0]}: several recipes have it, and each needs a directory of its own name")


def read_results(run: Path) -> dict[str, Any]:
    """
    The figures of a finished run.

    Raises:
        RunsError: where there are none.
    """
    try:
        results: dict[str, Any] = json.loads((run / "results.json").read_text(encoding="utf-8"))
        results["recipe"] = Recipe.from_dict(results["recipe"])
    except (OSError, KeyError, ValueError) as error:
        raise RunsError(
            f"{run}: no results.json of a finished run there that this version reads ({type(error).__name__}: {error})"
        ) from None
    return results


def _refuse_other_settings(out: Path, settings: dict[str, Any]) -> None:
    file = out / "settings.json"
    if not file.exists():
        write_atomically(file, json.dumps(settings, indent=1) + "\n")
        return
    theirs = json.loads(file.read_text(encoding="utf-8"))
    if theirs != json.loads(json.dumps(settings)):
        raise RunsError(f"{out}: made with the settings {theirs}, now {settings}; take another --out")


def _refuse_other_recipe(run: Path, recipe: Recipe) -> None:
    made_with = recipe
    with contextlib.suppress(RunsError, CheckpointError):  # where something is damaged, the run itself will say so
        if (run / "results.json").exists():
            made_with = read_results(run)["recipe"]
        else:
            made_with = next((checkpoint.recipe for checkpoint in checkpoints_of(run).values()), recipe)
    different = made_with.differences(recipe, NO_EFFECT_FIELDS)
    if different:
        listed = ", ".join(f"{name}={theirs} (now {ours})" for name, (theirs, ours) in different.items())
        raise RunsError(f"{run}: made with {listed}; take another --out")


def _borrow_first_stage(run: Path, recipe: Recipe, others: list[Path]) -> None:
    """Copy another finished run's first stage, its checkpoint and its log, where it is this one's too."""
    stage, epochs = next(iter(recipe.stage_epochs().items()))
    if checkpoints_of(run):
        return
    for other in others:
        with contextlib.suppress(CheckpointError):
            lent = checkpoints_of(other).get(stage) if (other / "results.json").exists() else None
            if lent is None or lent.epochs_done != epochs or lent.recipe.differences(recipe, LATER_STAGE_FIELDS):
                continue
            lines = (other / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if json.loads(line)["stage"] == stage]
            write_atomically(run / "metrics.jsonl", "".join(kept))
            partial = run / "checkpoints" / f"{lent.path.name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(lent.path, partial)
            content = json.loads((partial / "checkpoint.json").read_text(encoding="utf-8"))
            content |= {"recipe": recipe.to_dict(), "trained_by": str(other)}
            write_atomically(partial / "checkpoint.json", json.dumps(content, indent=1) + "\n")
            partial.rename(partial.with_suffix(""))
            return
