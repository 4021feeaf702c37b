"""ride-export: what it writes, that it says the same as the checkpoint, and what it refuses."""

import dataclasses
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from model_export import export as export_module
from model_export.__main__ import main
from model_export.bundle import BundleError, read_bundle
from model_export.calibrate import calibrate, choose
from model_export.parity import MAX_LOGIT_DIFFERENCE, compare, require, run_variant
from tests.model_export.conftest import make_run
from training.evaluate import Predictions, mean_logits, route
from training.train import trained_model


@pytest.fixture(scope="session")
def exported(run, tmp_path_factory):
    """The run's bundle, as the command writes it."""
    target = tmp_path_factory.mktemp("bundles") / "bundle"
    assert main([str(run), "-o", str(target), "--name", "noise", "--version", "7"]) == 0
    return target


def test_the_bundle_is_complete_and_valid(exported):
    """All graphs, costs, calibration with its full point, provenance."""
    manifest = read_bundle(exported).manifest
    files = sorted(path.name for path in exported.iterdir())

    graphs = ["expert_0", "expert_1", "expert_2", "router_0", "router_1", "trunk"]
    assert files == sorted(["manifest.json", *(f"{graph}.onnx" for graph in graphs)])
    assert (manifest.name, manifest.version, manifest.class_counts) == ("noise", "7", (17, 7, 4))
    assert manifest.macs.trunk > 0
    assert manifest.calibration.points[-1].mean_experts == 3
    assert manifest.provenance["test"]["routed"]["thresholds"] == list(manifest.thresholds)
    assert manifest.variants["fp32"].parity.max_abs_logit_difference <= MAX_LOGIT_DIFFERENCE


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_graphs_give_the_logits_and_scores_of_the_checkpoint(run, exported, batch):
    """Any batch size: the batch axis is free in every graph. Scores are scaled, which moves none across 0.5."""
    manifest = read_bundle(exported).manifest
    _, model = trained_model(run)
    images = torch.randint(0, 256, (batch, 16, 16, 3), dtype=torch.uint8)
    with torch.no_grad():
        outputs = model.net(images)
        scores = torch.sigmoid(model.routers(outputs) / manifest.provenance["router_temperature"])

    found = run_variant(exported, manifest.variants["fp32"], images.numpy(), 3)

    np.testing.assert_allclose(found.expert_logits, outputs.expert_logits.numpy(), atol=1e-4)
    np.testing.assert_allclose(found.router_scores, scores.numpy(), atol=1e-5)


def test_the_same_run_gives_the_same_bytes_in_another_process(run, exported, tmp_path):
    """Graphs and manifest."""
    command = [
        sys.executable,
        "-m",
        "model_export",
        str(run),
        "-o",
        str(tmp_path / "again"),
        "--name",
        "noise",
        "--version",
        "7",
    ]
    subprocess.run(command, check=True, capture_output=True)

    for file in exported.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name


def test_graphs_tell_nothing_of_the_machine(exported):
    """No source paths, stack traces or documentation inside."""
    for file in exported.glob("*.onnx"):
        content = file.read_bytes()
        assert b"/" + b"home" not in content
        assert b".py" not in content
        assert {
            dim.dim_param for value in onnx.load(file).graph.input for dim in value.type.tensor_type.shape.dim[:1]
        } == {"N"}


def test_a_model_of_one_expert_is_a_bundle_too(image_folder, tmp_path):
    """No routers, no thresholds, one operating point."""
    directory = make_run(image_folder, tmp_path / "run", n_experts=1, method="ldam", diversity_weight=0.0)
    assert main([str(directory), "-o", str(tmp_path / "bundle")]) == 0

    manifest = read_bundle(tmp_path / "bundle").manifest
    assert (manifest.n_experts, manifest.thresholds, len(manifest.calibration.points)) == (1, (), 1)


def test_a_bundle_that_fails_parity_is_not_written(run, tmp_path, monkeypatch, capsys):
    """A graph that adds 0.01 to a logit is refused, and an older bundle at the target stays."""
    target = tmp_path / "bundle"
    assert main([str(run), "-o", str(target)]) == 0
    before = {file.name: file.read_bytes() for file in target.iterdir()}
    whole = export_module.split

    def spoiled(model):
        trunk, experts, routers = whole(model)
        with torch.no_grad():
            experts[1].expert.classifier.scale += 0.5
        return trunk, experts, routers

    monkeypatch.setattr(export_module, "split", spoiled)
    assert main([str(run), "-o", str(target)]) == 2
    assert "logits differ from the checkpoint's by up to" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in target.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_targets_that_are_something_else_are_left_alone(run, tmp_path, capsys):
    """A directory with other files is not overwritten."""
    (tmp_path / "thesis.tex").write_text("precious")
    assert main([str(run), "-o", str(tmp_path)]) == 2
    assert "exists and is not a bundle" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_a_run_that_is_not_there_is_refused(tmp_path, capsys):
    """With the command that would make it."""
    assert main([str(tmp_path / "none"), "-o", str(tmp_path / "bundle")]) == 2
    assert "no checkpoints there; ride-train makes them" in capsys.readouterr().err


def test_images_that_changed_since_training_are_noticed(run, image_folder, tmp_path, capsys):
    """Other counts than in the checkpoint would calibrate on images that were trained on."""
    import shutil

    shutil.copytree(image_folder, tmp_path / "images")
    for index in range(10):
        (tmp_path / "images" / "class 0" / f"{index}.png").unlink()
    assert main([str(run), "-o", str(tmp_path / "bundle"), "--data", str(tmp_path / "images")]) == 2
    assert "other classes or class counts" in capsys.readouterr().err


def predictions(generator: np.random.Generator, n_images: int = 400) -> Predictions:
    """Three experts of which later ones know more, and routers that have an idea of it."""
    labels = generator.integers(0, 4, n_images)
    logits = generator.normal(0, 1, (3, n_images, 4)).astype(np.float32)
    logits[:, np.arange(n_images), labels] += np.array([0.5, 1.0, 1.5], np.float32)[:, None]
    return Predictions(logits, generator.uniform(0, 1, (2, n_images)).astype(np.float32), labels)


def test_calibration_points_are_what_routing_at_their_thresholds_gives():
    """Every figure of every point, computed anew; ordered by the number of experts; all experts among them."""
    data = predictions(np.random.default_rng(1))
    table = calibrate(data, [500, 200, 50, 5], (100, [10, 10, 10], [1, 1]), "noise")

    assert table.images == 400
    assert table.points[-1].thresholds == (0.0, 0.0)
    assert [point.mean_experts for point in table.points] == sorted(point.mean_experts for point in table.points)
    assert len(table.points) > 20
    for point in table.points:
        used = route(data.router_scores, point.thresholds)
        right = mean_logits(data.expert_logits, used).argmax(axis=1) == data.labels
        per_class = [100 * right[data.labels == label].mean() for label in range(4)]
        assert point.mean_experts == pytest.approx(used.mean(), abs=1e-4)
        assert point.accuracy.all == pytest.approx(np.mean(per_class), abs=1e-3)
        assert point.accuracy.few == pytest.approx(per_class[3], abs=1e-3)
        assert point.mean_macs == pytest.approx(100 + (10 * used + np.minimum(used, 2)).mean(), abs=0.1)


def test_the_default_is_the_cheapest_point_within_the_allowed_loss():
    """Allow nothing, and it is as good as all experts; allow all, and one expert remains."""
    table = calibrate(predictions(np.random.default_rng(2)), [500, 200, 50, 5], (100, [10, 10, 10], [1, 1]), "noise")
    full = table.points[-1].accuracy.all

    for loss in (0.0, 1.0, 5.0):
        point = choose(table, None, loss)
        assert point.accuracy.all >= full - loss
        assert all(other.accuracy.all < full - loss for other in table.points if other.mean_macs < point.mean_macs)
    assert choose(table, None, 100).mean_experts == 1
    assert choose(table, 1.5, 0.0) == max(
        (point for point in table.points if point.mean_experts <= 1.5), key=lambda point: point.accuracy.all
    )
    with pytest.raises(BundleError, match=r"max_mean_experts is 0\.5; the thriftiest point needs 1"):
        choose(table, 0.5, 0.0)
    with pytest.raises(BundleError, match="max_accuracy_loss is -1"):
        choose(table, None, -1)


def test_parity_counts_disagreements_but_not_ties():
    """A flipped class and a flipped decision are found; a score at its threshold may fall either way."""
    data = predictions(np.random.default_rng(3))
    assert compare(data, data, (0.5, 0.5)).top1_agreement == 1

    scores = data.router_scores.copy()
    scores[0, 7] = 0.9 if scores[0, 7] < 0.5 else 0.1
    wrong = compare(data, dataclasses.replace(data, router_scores=scores), (0.5, 0.5))
    assert wrong.experts_used_agreement == pytest.approx(1 - 1 / 400)
    with pytest.raises(BundleError, match="experts_used_agreement fails on 1 of 400"):
        require(wrong, "fp32")

    at_threshold = data.router_scores.copy()
    at_threshold[0, 7] = 0.5
    below = at_threshold.copy()
    below[0, 7] = 0.4999
    ties = [dataclasses.replace(data, router_scores=scores) for scores in (at_threshold, below)]
    assert compare(*ties, (0.5, 0.5)).experts_used_agreement == 1


def test_graphs_run_on_the_plain_runtime(exported):
    """Standard operators only."""
    for file in exported.glob("*.onnx"):
        assert {entry.domain for entry in onnx.load(file).opset_import} == {""}
        onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
