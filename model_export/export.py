"""From a finished run to a bundle: calibrate, write, compare, and only then put in place."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

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
    write_manifest,
)
from model_export.calibrate import Costs, by_rule, calibrate, choose, spread_of_decisions
from model_export.parity import compare, require, run_variant
from model_export.precision import write_graphs
from model_export.risk import certify
from training.data.images import INTERPOLATION
from training.data.longtail import FEW_BELOW, MANY_ABOVE
from training.data.sets import Data, load_data
from training.evaluate import Predictions, macs_of, predict, summarise
from training.methods.method import Model
from training.train import trained_model

SPREAD_IMAGES = 1000  # for the spread of the routers' decisions
DEFAULT_ACCURACY_LOSS = 0.3


@dataclass(frozen=True)
class Wish:
    """
    How the default operating point is chosen, on the held-out images.

    Attributes:
        rule: of early exit.
        max_mean_experts, max_accuracy_loss, max_risk: what the thresholds may cost: experts per image; percentage
            points of accuracy over all classes; percentage points with `risk_confidence`. At most one is given; with
            none, 0.3 points of accuracy.
    """

    rule: Rule = "router"
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
) -> Manifest:
    """
    Write the model of `run` as a bundle at `target`, replacing a bundle that is there.

    Args:
        name, version: of the model in every answer; the name is the recipe's unless given.
        precisions: of the variants, fp32 first.
        data: where the images of the run lie now; None: where the recipe says.

    Raises:
        BundleError: where the graphs do not say the same as the checkpoint, or `target` is something else.
        CheckpointError, DataError: for a run that is not finished, or images that are not there.
    """
    _refuse_foreign(target)
    checkpoint, model = trained_model(run)
    recipe = checkpoint.recipe
    images = load_data(recipe if data is None else recipe.override({"data": data}))
    if (images.classes, images.counts) != (checkpoint.classes, checkpoint.class_counts):
        raise BundleError(f"{data or recipe.data}: other classes or class counts than {checkpoint.path} was trained on")
    macs = macs_of(model, recipe.image_size)
    if model.routers is not None:
        model.routers.temperature = spread_of_decisions(model, images.heldout.even_sample(SPREAD_IMAGES))
    heldout = predict(model, images.heldout)
    calibration, thresholds = _operating_points(heldout, images, macs, wish)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
        directory = Path(scratch, "bundle")
        directory.mkdir()
        variants: dict[str, Variant] = {}
        for graphs in write_graphs(model, images.train, precisions, directory):
            found = run_variant(directory, graphs, images.heldout.pixels.numpy(), len(checkpoint.classes))
            parity = compare(heldout, found, wish.rule, thresholds, checkpoint.class_counts)
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
            variants=variants, default_variant="fp32", rule=wish.rule, thresholds=thresholds, calibration=calibration,
            provenance={
                "recipe": recipe.to_dict(), "seed": recipe.seed, "commit": checkpoint.commit,
                "torch": torch.__version__,
                "router_temperature": model.routers.temperature if model.routers is not None else None,
                "data": {"name": recipe.data, "train": len(images.train), "test": len(images.test)},
                "test": _test_figures(model, images, macs, wish.rule, thresholds),
            },
        )  # fmt: skip
        write_manifest(directory, manifest)
        read_bundle(directory)
        _put_in_place(directory, target)
    return manifest


def _operating_points(
    heldout: Predictions, images: Data, macs: Costs, wish: Wish
) -> tuple[Calibration, tuple[float, ...]]:
    """The calibration table and the default thresholds."""
    if wish.max_risk is not None:
        thresholds, risk = certify(heldout, images.counts, macs, wish.rule, wish.max_risk, wish.risk_confidence)
        chosen = (wish.rule, thresholds)
        return calibrate(heldout, images.counts, macs, images.heldout_note, chosen, risk), thresholds
    calibration = calibrate(heldout, images.counts, macs, images.heldout_note)
    loss = DEFAULT_ACCURACY_LOSS if wish.max_accuracy_loss is None else wish.max_accuracy_loss
    return calibration, choose(calibration, wish.rule, wish.max_mean_experts, loss).thresholds


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
