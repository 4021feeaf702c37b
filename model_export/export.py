"""From a finished run to a bundle: calibrate, write, compare, and only then put in place."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model_export.authors import read_published
from model_export.bundle import (
    BundleError,
    Calibration,
    InputSpec,
    Macs,
    Manifest,
    Precision,
    Rule,
    SplitBounds,
    Variant,
    read_bundle,
    sha256_of,
    write_manifest,
)
from model_export.calibrate import Costs, by_rule, calibrate, choose, spread_of_decisions
from model_export.parity import compare, require, run_variant
from model_export.precision import write_graphs
from model_export.risk import certify
from training.checkpoint import Checkpoint
from training.data.images import INTERPOLATION
from training.data.longtail import FEW_BELOW, MANY_ABOVE
from training.data.sets import Data, load_data
from training.evaluate import Predictions, macs_of, predict, summarise
from training.methods.method import Model
from training.recipe import Recipe, RecipeError
from training.train import PUBLISHED_THRESHOLD, trained_model

_Subject = tuple[Checkpoint, Model, Data, dict[str, Any]]  # the last: of its provenance, what a run does not have

SPREAD_IMAGES = 1000  # for the spread of the routers' decisions
DEFAULT_ACCURACY_LOSS = 0.3


@dataclass(frozen=True)
class Wish:
    """
    How the default operating point is chosen, on the held-out images.

    Attributes:
        rule: of early exit; None: the routers', or the confidence where the model has none.
        max_mean_experts, max_accuracy_loss, max_risk: what the thresholds may cost: experts per image; percentage
            points of accuracy over all classes; percentage points with `risk_confidence`. At most one is given; with
            none, 0.3 points of accuracy, or for the routers of a published checkpoint 0.5 everywhere, as published.
    """

    rule: Rule | None = None
    max_mean_experts: float | None = None
    max_accuracy_loss: float | None = None
    max_risk: float | None = None
    risk_confidence: float = 0.95


def export(
    run: Path,
    target: Path,
    *,
    name: str | None,
    version: str,
    wish: Wish,
    precisions: Sequence[Precision],
    data: str | None,
    settings: Mapping[str, str] | None = None,
) -> Manifest:
    """
    Write the model of `run` as a bundle at `target`, replacing a bundle that is there.

    Args:
        run: the directory of a finished run, or a checkpoint file of RIDE's authors.
        name, version: of the model in every answer; the name is the recipe's unless given.
        precisions: of the variants, fp32 first.
        data: where the images of the run lie now; None: where the recipe says.
        settings: what a checkpoint of the authors does not say of itself; see `read_published`.

    Raises:
        BundleError: where the graphs do not say the same as the checkpoint, or `target` is something else.
        CheckpointError, DataError, RecipeError: for a run that is not finished or a file that is no checkpoint of the
            authors, images that are not there, settings that cannot be.
    """
    _refuse_foreign(target)
    if run.is_file():
        checkpoint, model, images, origin = _published(run, data, settings or {})
    else:
        checkpoint, model, images, origin = _finished(run, data, settings or {})
    recipe, rule = checkpoint.recipe, _rule_of(run, wish, model)
    macs = macs_of(model, recipe.image_size)
    if model.routers is not None:
        model.routers.temperature = spread_of_decisions(model, images.heldout.even_sample(SPREAD_IMAGES))
    heldout = predict(model, images.heldout)
    published = (PUBLISHED_THRESHOLD,) * len(macs[2]) if origin and rule == "router" else None
    calibration, thresholds = _operating_points(heldout, images, macs, wish, rule, published)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
        directory = Path(scratch, "bundle")
        directory.mkdir()
        variants: dict[str, Variant] = {}
        for graphs in write_graphs(model, images.train, precisions, directory):
            found = run_variant(directory, graphs, images.heldout.pixels.numpy(), len(checkpoint.classes))
            parity = compare(heldout, found, rule, thresholds, checkpoint.class_counts, graphs.precision)
            if graphs.precision == "fp32":
                require(parity, "fp32")
            variants[graphs.precision] = Variant(graphs.precision, graphs.trunk, graphs.experts, graphs.routers, parity)
        manifest = Manifest(
            name=name or recipe.name, version=version,
            classes=checkpoint.classes, class_counts=checkpoint.class_counts,
            split_bounds=SplitBounds(many_above=MANY_ABOVE, few_below=FEW_BELOW),
            input=InputSpec(
                height=recipe.image_size, width=recipe.image_size, fit=recipe.test_fit, interpolation=INTERPOLATION,
                mean=checkpoint.mean, std=checkpoint.std,
            ),
            macs=Macs(macs[0], tuple(macs[1]), tuple(macs[2])),
            variants=variants, default_variant="fp32", rule=rule, thresholds=thresholds, calibration=calibration,
            provenance={
                "recipe": recipe.to_dict(), "seed": recipe.seed, "commit": checkpoint.commit,
                "torch": torch.__version__,
                "router_temperature": model.routers.temperature if model.routers is not None else None,
                "data": {"name": recipe.data, "train": len(images.train), "test": len(images.test)},
                "test": _test_figures(model, images, macs, rule, thresholds),
            } | origin,
        )  # fmt: skip
        write_manifest(directory, manifest)
        read_bundle(directory)
        _put_in_place(directory, target)
    return manifest


def _finished(run: Path, data: str | None, settings: Mapping[str, str]) -> _Subject:
    """The model of a run directory, whose recipe says all."""
    if settings:
        raise RecipeError(f"--set {next(iter(settings))}: {run} is a run, whose recipe is fixed")
    checkpoint, model = trained_model(run)
    recipe = checkpoint.recipe
    images = load_data(recipe if data is None else recipe.override({"data": data}))
    if (images.classes, images.counts) != (checkpoint.classes, checkpoint.class_counts):
        raise BundleError(f"{data or recipe.data}: other classes or class counts than {checkpoint.path} was trained on")
    return checkpoint, model, images, {}


def _published(file: Path, data: str | None, settings: Mapping[str, str]) -> _Subject:
    """The model of one of the authors' files, with the classes and their counts of the images that are given."""
    published = read_published(file, {**settings, **({} if data is None else {"data": data})})
    recipe, images = published.recipe, _as_trained_on(load_data(published.recipe), published.recipe)
    if len(images.classes) != published.n_classes:
        raise BundleError(
            f"{recipe.data}: has {len(images.classes)} classes, the classifiers in {file} {published.n_classes}"
        )
    assert recipe.mean is not None  # read_published has seen to it
    assert recipe.std is not None
    checkpoint = Checkpoint(
        path=file, stage="routers" if published.model.routers else "experts", epochs_done=published.epoch,
        recipe=recipe, classes=images.classes, class_counts=images.counts, mean=recipe.mean, std=recipe.std,
        metrics={}, commit="not recorded",
    )  # fmt: skip
    network = {name: recipe.to_dict()[name] for name in ("backbone", "n_experts", "reduced", "classifier")}
    origin = {
        "recipe": network, "seed": None,
        "published": {
            "file": file.name, "sha256": sha256_of(file), "arch": published.arch, "epoch": published.epoch,
            "assumed": published.assumed,
        },
    }  # fmt: skip
    return checkpoint, published.model, images, origin


def _as_trained_on(images: Data, recipe: Recipe) -> Data:
    """As the authors had them: of a natural set they held nothing back, so a share of it held out here is no news."""
    if recipe.profile != "natural" or "training images" not in images.heldout_note:
        return images
    labels = np.concatenate([images.train.labels.numpy(), images.heldout.labels.numpy()])
    return dataclasses.replace(
        images,
        counts=tuple(np.bincount(labels, minlength=len(images.classes)).tolist()),
        heldout_note=f"{images.heldout_note}, which the published model was trained on: accuracies are too high",
    )


def _rule_of(run: Path, wish: Wish, model: Model) -> Rule:
    """The default rule, where the model can follow it."""
    if model.routers is not None or len(model.net.experts) == 1:
        return wish.rule or "router"
    if wish.rule == "router":
        raise BundleError(f"--rule router: {run} has no routers; the other rules need none")
    return wish.rule or "confidence"


def _operating_points(
    heldout: Predictions, images: Data, macs: Costs, wish: Wish, rule: Rule, published: tuple[float, ...] | None
) -> tuple[Calibration, tuple[float, ...]]:
    """The calibration table and the default thresholds: as wished, else as `published`, else within 0.3 points."""
    if wish.max_risk is not None:
        thresholds, risk = certify(heldout, images.counts, macs, rule, wish.max_risk, wish.risk_confidence)
        return calibrate(heldout, images.counts, macs, images.heldout_note, (rule, thresholds), risk), thresholds
    if published is not None and wish.max_mean_experts is None and wish.max_accuracy_loss is None:
        return calibrate(heldout, images.counts, macs, images.heldout_note, (rule, published)), published
    calibration = calibrate(heldout, images.counts, macs, images.heldout_note)
    loss = DEFAULT_ACCURACY_LOSS if wish.max_accuracy_loss is None else wish.max_accuracy_loss
    return calibration, choose(calibration, rule, wish.max_mean_experts, loss).thresholds


def _test_figures(model: Model, images: Data, macs: Costs, rule: Rule, thresholds: tuple[float, ...]) -> dict[str, Any]:
    predictions, paid = by_rule(predict(model, images.test), macs, rule)
    return summarise(predictions, images.counts, paid, thresholds)


def _refuse_foreign(target: Path) -> None:
    if target.exists() and not (target / "manifest.json").is_file() and (not target.is_dir() or any(target.iterdir())):
        raise BundleError(f"{target}: exists and is not a bundle; give another directory")


def _put_in_place(directory: Path, target: Path) -> None:
    """Whoever reads `target` finds the old bundle or the new one, but for the instant between two renames."""
    os.chmod(directory, 0o755)
    if target.exists():
        old = directory.with_name("old")
        target.rename(old)
        directory.rename(target)
        shutil.rmtree(old)
    else:
        directory.rename(target)
