"""From a finished run to a bundle: calibrate, write, compare, and only then put in place."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model_export.authors import read_published
from model_export.bundle import (
    MANIFEST,
    RISK_CONFIDENCE,
    BundleError,
    Calibration,
    Graphs,
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
from model_export.calibrate import by_rule, calibrate, choose
from model_export.parity import compare, require, run_variant, tolerance
from model_export.precision import write_graphs
from model_export.risk import certify
from training.checkpoint import Checkpoint, CheckpointError
from training.data.images import INTERPOLATION
from training.data.longtail import FEW_BELOW, MANY_ABOVE
from training.data.sets import Data, load_data
from training.data.sources import open_set
from training.evaluate import Costs, Predictions, count_not_finite, macs_of, predict, summarise
from training.methods.method import Model
from training.thresholds import fit_temperature
from training.train import PUBLISHED_THRESHOLD, refuse_other_images, trained_model

PATH_FIELDS = ("data", "image_root", "train_list", "val_list", "test_list", "pretrained", "teacher", "first_stage")
DEFAULT_ACCURACY_LOSS = 0.3


@dataclass(frozen=True)
class _Subject:
    """What is exported: a run's model, or one that the authors published, which adds to the provenance."""

    checkpoint: Checkpoint
    model: Model
    images: Data
    origin: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Wish:
    """
    How the default operating point is chosen, on the held-out images.

    Attributes:
        rule: of early exit; None: the routers', or the confidence where the model has none.
        max_mean_experts, max_accuracy_loss, max_risk: what the thresholds may cost: experts per image; percentage
            points of accuracy over all classes; percentage points with `risk_confidence`. At most one is given; with
            none, 0.3 points of accuracy, or for the routers of a published checkpoint 0.5 everywhere, as published.

    Raises:
        BundleError: for a number that cannot be.
    """

    rule: Rule | None = None
    max_mean_experts: float | None = None
    max_accuracy_loss: float | None = None
    max_risk: float | None = None
    risk_confidence: float = RISK_CONFIDENCE

    def __post_init__(self) -> None:
        for name, least, most, what in (
            ("max_mean_experts", 1, math.inf, "1 or more experts per image"),
            ("max_accuracy_loss", 0, 100, "0 to 100 percentage points"),
            ("max_risk", 0, 100, "0 to 100 percentage points"),
        ):
            value = getattr(self, name)
            if value is not None and not least <= value <= most:  # NaN is not
                raise BundleError(f"{name} is {value}; it must be {what}")
        if not 0 < self.risk_confidence < 1:
            raise BundleError(f"risk_confidence is {self.risk_confidence}; it must be between 0 and 1, such as 0.95")


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
        settings: what a checkpoint of the authors does not say of itself; see `read_published`. Of a run: `image_root`.

    Raises:
        BundleError: where the graphs do not say the same as the checkpoint, `target` is something else, `version` is
            empty, or a risk is wished for that could only be tested on images that the model was trained on.
        CheckpointError, DataError, RecipeError: for a run that is not finished or a file that is no checkpoint of the
            authors, images that are not there, settings that cannot be.
    """
    if not run.exists():
        raise CheckpointError(f"{run}: no such run directory or file")
    if not version:
        raise BundleError("version is ''; every answer names it, so it must be filled in")
    target = target.resolve()  # a link stays, what it leads to is replaced
    _refuse_foreign(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
        directory = Path(scratch, "bundle")
        directory.mkdir()
        manifest = _write(
            run, directory, name=name, version=version, wish=wish, precisions=precisions, data=data,
            settings=settings or {},
        )  # fmt: skip
        _put_in_place(directory, target)
    return manifest


def _write(
    run: Path, directory: Path, *, name: str | None, version: str, wish: Wish, precisions: Sequence[Precision],
    data: str | None, settings: Mapping[str, str],
) -> Manifest:  # fmt: skip
    """The whole bundle, in an empty directory."""
    subject = _published(run, data, settings, wish) if run.is_file() else _finished(run, data, settings)
    checkpoint, model, images, origin = subject.checkpoint, subject.model, subject.images, subject.origin
    recipe, rule = checkpoint.recipe, _rule_of(run, wish, model)
    macs = macs_of(model, recipe.image_size)
    if model.routers is not None:
        fit_temperature(model, images.heldout)
    heldout = predict(model, images.heldout)
    if unusable := count_not_finite(heldout):
        raise CheckpointError(
            f"{checkpoint.path}: NaN or infinity for {unusable} of {len(heldout.labels)} held-out images; its weights, "
            "or the mean and std of its recipe, are damaged"
        )
    pixels, n_classes = images.heldout.pixels.numpy(), len(checkpoint.classes)
    written = {graphs.precision: graphs for graphs in write_graphs(model, images.train, precisions, directory)}
    found = {precision: run_variant(directory, graphs, pixels, n_classes) for precision, graphs in written.items()}
    published = (PUBLISHED_THRESHOLD,) * len(macs.routers) if origin and rule == "router" else None
    _leave_out_unusable(written, found, directory)
    calibration, thresholds = _operating_points(heldout, found, images, macs, wish, rule, published)
    variants: dict[str, Variant] = {}
    for precision, graphs in written.items():
        parity = compare(heldout, found[precision], rule, thresholds, checkpoint.class_counts, precision)
        if precision == "fp32":
            require(parity, "fp32", tolerance(heldout))
        variants[precision] = Variant(**vars(graphs), parity=parity)
    manifest = Manifest(
        name=name or recipe.name, version=version,
        classes=checkpoint.classes, class_counts=checkpoint.class_counts,
        split_bounds=SplitBounds(many_above=MANY_ABOVE, few_below=FEW_BELOW),
        input=InputSpec(
            height=recipe.image_size, width=recipe.image_size, fit=recipe.test_fit, interpolation=INTERPOLATION,
            mean=checkpoint.mean, std=checkpoint.std,
        ),
        macs=Macs(macs.trunk, tuple(macs.experts), tuple(macs.routers)),
        variants=variants, default_variant="fp32", rule=rule, thresholds=thresholds, calibration=calibration,
        provenance={
            "recipe": _without_directories(recipe.to_dict()), "seed": recipe.seed, "commit": checkpoint.commit,
            "torch": torch.__version__,
            "router_temperature": model.routers.temperature if model.routers is not None else None,
            "data": {"name": Path(recipe.data).name, "train": len(images.train), "test": len(images.test)},
            "test": _test_figures(model, images, macs, rule, thresholds),
        } | origin,
    )  # fmt: skip
    write_manifest(directory, manifest)
    read_bundle(directory)
    return manifest


def _leave_out_unusable(written: dict[Precision, Graphs], found: dict[Precision, Predictions], directory: Path) -> None:
    """Where numbers of the model leave the range of a precision, drop it and its files, and say so; never fp32."""
    for precision in [name for name in written if name != "fp32"]:
        if unusable := count_not_finite(found[precision]):
            n_images = found.pop(precision).expert_logits.shape[1]
            print(
                f"variant {precision} is left out: NaN or infinity for {unusable} of {n_images} held-out images; "
                "numbers in the network leave its range",
                file=sys.stderr,
            )
            dropped = {graph.file for graph in written.pop(precision).graphs}
            for file in dropped - {graph.file for other in written.values() for graph in other.graphs}:
                (directory / file).unlink()


def _without_directories(fields: dict[str, Any]) -> dict[str, Any]:
    """A recipe's fields, but of paths on this machine only the last part: a service shows them to whoever asks."""

    def last(value: str) -> str:
        return ",".join(Path(part).name for part in value.split(","))

    return fields | {field: last(fields[field]) for field in PATH_FIELDS if fields.get(field)}


def _finished(run: Path, data: str | None, settings: Mapping[str, str]) -> _Subject:
    """The model of a run directory, whose recipe says all."""
    checkpoint, model = trained_model(run)
    images = load_data(checkpoint.recipe.with_images_at(data, dict(settings)), checked=True)
    refuse_other_images(checkpoint, images)
    return _Subject(checkpoint, model, images)


def _published(file: Path, data: str | None, settings: Mapping[str, str], wish: Wish) -> _Subject:
    """The model of one of the authors' files, with the classes and their counts of the images that are given."""
    published = read_published(file, {**settings, **({} if data is None else {"data": data})})
    recipe = published.recipe
    image_set = open_set(recipe)
    if recipe.profile == "natural" and image_set.test is None:
        raise BundleError(
            f"{recipe.data}: has no test images of its own, and all others may be what {file} was trained on; put the "
            "test images of its data set into test/"
        )
    images = load_data(recipe)
    if recipe.profile == "natural" and image_set.heldout is None:
        if wish.max_risk is not None:
            raise BundleError(
                f"--max-risk {wish.max_risk:g}: the held-out images are a share of the training images of "
                f"{recipe.data}, with which {file} was trained, so that nothing is certified for others; "
                "take --max-accuracy-loss, or --data that has validation and test images of its own"
            )
        images = _as_trained_on(images)
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
            "assumed": _without_directories(published.assumed),
        },
    }  # fmt: skip
    return _Subject(checkpoint, published.model, images, origin)


def _as_trained_on(images: Data) -> Data:
    """As the authors had them: of a natural set they held nothing back, so a share of it held out here is no news."""
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
    heldout: Predictions, found: Mapping[Precision, Predictions], images: Data, macs: Costs, wish: Wish, rule: Rule,
    published: tuple[float, ...] | None,
) -> tuple[Calibration, tuple[float, ...]]:  # fmt: skip
    """
    The calibration table and the default thresholds: as wished, else as `published`, else within 0.3 points.

    Args:
        heldout: by the checkpoint.
        found: the same images, by each variant.
    """
    if wish.max_risk is not None:
        others: dict[str, Predictions] = {name: each for name, each in found.items() if name != "fp32"}
        thresholds, risk = certify(heldout, images.counts, macs, rule, wish.max_risk, wish.risk_confidence, others)
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
    """
    Only an empty directory, or one that holds a bundle, with the files that its manifest lists, and nothing else, may
    be replaced.

    Raises:
        BundleError: for anything else, with the first thing that does not belong to a bundle.
    """
    if not target.exists():
        return
    if not target.is_dir():
        raise BundleError(f"{target}: exists and is not a directory; give another one")
    if os.path.ismount(target):
        raise BundleError(f"{target}: is a mount point, which cannot be replaced; give a directory inside it")
    there = sorted(target.iterdir())
    listed = _files_of(target / MANIFEST)
    if there and not listed:
        raise BundleError(f"{target}: exists and is not a bundle; give another directory")
    strange = [entry.name for entry in there if entry.name not in listed or not entry.is_file()]
    if strange:
        raise BundleError(f"{target}: holds {strange[0]}, which is not a bundle's and would be lost; move it away")


def _files_of(manifest: Path) -> set[str]:
    """The names of a bundle's files by its manifest, of whatever version, itself included; none where it is none."""
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return set()
    if not isinstance(content, dict) or not {"schema_version", "classes", "thresholds"} <= content.keys():
        return set()
    names = {MANIFEST}
    left = [value for key, value in content.items() if key != "provenance"]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            names |= {value["file"]} if isinstance(value.get("file"), str) else set()
            left += value.values()
        elif isinstance(value, list):
            left += value
    return names


def _put_in_place(directory: Path, target: Path) -> None:
    """Whoever reads `target` finds the old bundle or the new one, but for the instant between two renames."""
    directory.chmod(0o755)
    for file in directory.iterdir():
        file.chmod(0o644)
    if not target.exists():
        directory.rename(target)
        return
    old = directory.with_name("old")
    try:
        target.rename(old)
        directory.rename(target)
    except BaseException:  # a signal, too
        if old.exists() and not target.exists():
            old.rename(target)
        raise
