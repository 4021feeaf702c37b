"""From a finished run to a bundle: split, write, compare, calibrate, and only then put in place."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from model_export.bundle import (
    BundleError,
    GraphSpec,
    InputSpec,
    Macs,
    Manifest,
    Parity,
    SplitBounds,
    Variant,
    read_bundle,
    write_manifest,
)
from model_export.calibrate import calibrate, choose, spread_of_decisions
from model_export.graphs import write_graph
from model_export.parity import compare, require, run_variant
from model_export.split import split
from training.data.images import FIT, INTERPOLATION
from training.data.longtail import FEW_BELOW, MANY_ABOVE
from training.data.sets import Images, load_data
from training.evaluate import Predictions, macs_of, predict, summarise
from training.methods.method import Model
from training.train import trained_model

SAMPLE_IMAGES = 1000  # for parity and for the spread of the routers' decisions
_EXAMPLE_BATCH = 2


def export(
    run: Path,
    target: Path,
    *,
    name: str | None,
    version: str,
    max_mean_experts: float | None,
    max_accuracy_loss: float,
    data: str | None,
) -> Manifest:
    """
    Write the model of `run` as a bundle at `target`, replacing a bundle that is there.

    Args:
        name, version: of the model in every answer; the name is the recipe's unless given.
        max_mean_experts, max_accuracy_loss: what the default thresholds may cost on the held-out images, in experts per
            image or, where that is None, in percentage points of accuracy.
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
    sample = _sample(images.heldout)
    if model.routers is not None:
        model.routers.temperature = spread_of_decisions(model, images.heldout.pixels[sample])
    heldout = predict(model, images.heldout)
    calibration = calibrate(heldout, checkpoint.class_counts, macs, images.heldout_note)
    thresholds = choose(calibration, max_mean_experts, max_accuracy_loss).thresholds
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
        directory = Path(scratch, "bundle")
        directory.mkdir()
        graphs = _write_graphs(model, recipe.image_size, len(checkpoint.classes), directory)
        parity = _parity(directory, graphs, heldout, images.heldout, sample, thresholds)
        require(parity, "fp32")
        manifest = Manifest(
            name=name or recipe.name, version=version,
            classes=checkpoint.classes, class_counts=checkpoint.class_counts,
            split_bounds=SplitBounds(many_above=MANY_ABOVE, few_below=FEW_BELOW),
            input=InputSpec(
                height=recipe.image_size, width=recipe.image_size, fit=FIT, interpolation=INTERPOLATION,
                mean=checkpoint.mean, std=checkpoint.std,
            ),
            macs=Macs(macs[0], tuple(macs[1]), tuple(macs[2])),
            variants={"fp32": Variant(*graphs, parity)}, default_variant="fp32",
            thresholds=thresholds, calibration=calibration,
            provenance={
                "recipe": recipe.to_dict(), "seed": recipe.seed, "commit": checkpoint.commit,
                "torch": torch.__version__,
                "router_temperature": model.routers.temperature if model.routers is not None else None,
                "data": {"name": recipe.data, "train": len(images.train), "test": len(images.test)},
                "test": summarise(predict(model, images.test), checkpoint.class_counts, macs, thresholds),
            },
        )  # fmt: skip
        write_manifest(directory, manifest)
        read_bundle(directory)
        _put_in_place(directory, target)
    return manifest


_Graphs = tuple[GraphSpec, tuple[GraphSpec, ...], tuple[GraphSpec, ...]]


def _write_graphs(model: Model, size: int, n_classes: int, directory: Path) -> _Graphs:
    trunk, experts, routers = split(model)
    images = torch.zeros(_EXAMPLE_BATCH, size, size, 3, dtype=torch.uint8)
    with torch.no_grad():
        features = trunk(images)
        logits_sum, expert_feature = experts[0](features, torch.zeros(_EXAMPLE_BATCH, n_classes))
    given = {"features": features, "logits_sum": torch.zeros_like(logits_sum)}
    asked = {"expert_feature": expert_feature, "logits_sum": logits_sum}
    return (
        write_graph(trunk, {"images": images}, ["features"], directory / "trunk.onnx"),
        tuple(
            write_graph(expert, given, ["new_logits_sum", "expert_feature"], directory / f"expert_{index}.onnx")
            for index, expert in enumerate(experts)
        ),
        tuple(
            write_graph(router, asked, ["score"], directory / f"router_{index}.onnx")
            for index, router in enumerate(routers)
        ),
    )


def _sample(images: Images) -> Tensor:
    """Positions of an even choice of the images."""
    return torch.linspace(0, len(images) - 1, min(SAMPLE_IMAGES, len(images))).round().long()


def _parity(
    directory: Path,
    graphs: _Graphs,
    expected: Predictions,
    images: Images,
    sample: Tensor,
    thresholds: tuple[float, ...],
) -> Parity:
    rows = sample.numpy()
    unmeasured = Variant(*graphs, Parity(0, 0.0, 0.0, 0.0))
    found = run_variant(directory, unmeasured, images.pixels[sample].numpy(), expected.expert_logits.shape[2])
    same_rows = Predictions(expected.expert_logits[:, rows], expected.router_scores[:, rows], expected.labels[rows])
    return compare(same_rows, found, thresholds)


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
