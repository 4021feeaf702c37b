"""ride-export: what it writes, that it says the same as the checkpoint, and what it refuses."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file

from model_export.__main__ import main, table
from model_export.bundle import Risk, read_bundle
from model_export.calibrate import RULES
from model_export.parity import MAX_LOGIT_DIFFERENCE, run_variant
from tests.model_export.conftest import make_run
from training.train import trained_model

ONE_EXPERT = {"n_experts": 1, "method": "single", "loss": "ldam", "diversity_weight": 0.0}


def change_weights(checkpoint, factors):
    """Multiply tensors of a checkpoint, by name."""
    file = checkpoint / "model.safetensors"
    weights = load_file(file)
    for name, factor in factors.items():
        weights[name] *= factor
    save_file(weights, file)


def test_the_bundle_is_complete_and_valid(exported):
    """All graphs, costs, calibration with its full point, provenance."""
    manifest = read_bundle(exported).manifest
    files = sorted(path.name for path in exported.iterdir())

    layers = [f"{graph}{suffix}" for graph in ("expert_0", "expert_1", "expert_2", "trunk")
              for suffix in ("", ".fp16", ".int8")]  # fmt: skip
    assert files == sorted(["manifest.json", *(f"{graph}.onnx" for graph in [*layers, "router_0", "router_1"])])
    assert (manifest.name, manifest.version, manifest.class_counts) == ("noise", "7", (17, 7, 4))
    assert manifest.macs.trunk > 0
    assert (manifest.default_variant, manifest.rule) == ("fp32", "router")
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
    """No source paths, stack traces or documentation beside the weights, in any precision."""
    for file in exported.glob("*.onnx"):
        model = onnx.load(file)
        assert {dim.dim_param for value in model.graph.input for dim in value.type.tensor_type.shape.dim[:1]} == {"N"}
        names = " ".join(constant.name for constant in model.graph.initializer)
        del model.graph.initializer[:]  # weights may spell anything
        content = str(model) + names
        assert "/" not in content
        assert ".py" not in content


def test_a_model_of_one_expert_is_a_bundle_too(image_folder, tmp_path, capsys):
    """No routers, no thresholds, of each rule the one operating point that there is; precisions may lose something."""
    directory = make_run(image_folder, tmp_path / "run", **ONE_EXPERT)
    assert main([str(directory), "-o", str(tmp_path / "bundle"), "--variants", "int8", "--max-risk", "1"]) == 0

    manifest = read_bundle(tmp_path / "bundle").manifest
    assert (manifest.n_experts, manifest.thresholds) == (1, ())
    assert [point.rule for point in manifest.calibration.points] == list(RULES)
    assert list(manifest.variants) == ["fp32", "int8"]
    risk = manifest.calibration.risk
    assert (risk.max_risk, risk.upper_bound, risk.loss) == (1, 0, 0)
    assert risk.variants["int8"] > 1  # a few images certify nothing
    assert not manifest.may_serve("int8")
    assert "int8, against all experts of the checkpoint: bound " in capsys.readouterr().out


def test_a_bundle_that_fails_parity_is_not_written(run, traced, exported, tmp_path, capsys):
    """Graphs whose logits are not those of the checkpoint are refused, and an older bundle at the target stays."""
    target = shutil.copytree(exported, tmp_path / "bundle")
    before = {file.name: file.read_bytes() for file in target.iterdir()}
    other = shutil.copytree(run, tmp_path / "run")
    change_weights(other / "checkpoints" / "routers-0001", {"net.experts.1.layers.1.0.bn2.weight": 1.1})

    assert main([str(other), "-o", str(target), "--variants", "fp32"]) == 2
    assert "logits differ from the checkpoint's by up to" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in target.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "run"]


def test_targets_that_are_something_else_are_left_alone(run, tmp_path, capsys):
    """A directory with other files is not overwritten."""
    (tmp_path / "thesis.tex").write_text("precious")
    assert main([str(run), "-o", str(tmp_path)]) == 2
    assert "exists and is not a bundle" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_a_run_that_is_not_there_is_refused(tmp_path, capsys):
    """With the command that would make it, where there is a directory."""
    assert main([str(tmp_path / "none"), "-o", str(tmp_path / "bundle")]) == 2
    assert f"{tmp_path}/none: no such run directory or file" in capsys.readouterr().err
    assert main([str(tmp_path), "-o", str(tmp_path / "bundle")]) == 2
    assert "no checkpoints there; ride-train makes them" in capsys.readouterr().err


def test_images_that_changed_since_training_are_noticed(run, image_folder, tmp_path, capsys):
    """Other counts than in the checkpoint would calibrate on images that were trained on."""
    shutil.copytree(image_folder, tmp_path / "images")
    for index in range(10):
        (tmp_path / "images" / "class 0" / f"{index}.png").unlink()
    assert main([str(run), "-o", str(tmp_path / "bundle"), "--data", str(tmp_path / "images")]) == 2
    assert "was trained on other images than are there now: 17 of class 'class 0', 11 now" in capsys.readouterr().err


def renamed(image_folder, directory):
    """A copy of the images in which one file has another name, so that others would be held out."""
    folder = shutil.copytree(image_folder, directory / "renamed")
    (folder / "class 0" / "0.png").rename(folder / "class 0" / "zzz.png")
    return folder


def test_images_that_go_by_other_names_are_noticed(run, traced, image_folder, tmp_path, capsys):
    """As many of each class, yet images that were trained on would be held out."""
    arguments = ["--data", str(renamed(image_folder, tmp_path))]
    assert main([str(run), "-o", str(tmp_path / "bundle"), *arguments]) == 2
    assert "as many, but some have changed or go by other names" in capsys.readouterr().err
    moved = shutil.copytree(image_folder, tmp_path / "moved")
    assert main([str(run), "-o", str(tmp_path / "bundle"), "--variants", "fp32", "--data", str(moved)]) == 0


def test_a_bundle_with_something_else_in_it_is_left_alone(run, exported, tmp_path, capsys):
    """And so is a directory whose manifest.json is not a bundle's."""
    notes = shutil.copytree(exported, tmp_path / "bundle") / "notes.md"
    notes.write_text("precious")
    assert main([str(run), "-o", str(tmp_path / "bundle"), "--variants", "fp32"]) == 2
    assert "holds notes.md, which is not a bundle's and would be lost" in capsys.readouterr().err
    another = shutil.copytree(exported, tmp_path / "own") / "my_other_model.onnx"
    another.write_text("precious")
    assert main([str(run), "-o", str(tmp_path / "own"), "--variants", "fp32"]) == 2
    assert "holds my_other_model.onnx, which is not a bundle's and would be lost" in capsys.readouterr().err
    assert another.read_text() == "precious"
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "manifest.json").write_text('{"name": "my app"}')
    assert main([str(run), "-o", str(tmp_path / "web"), "--variants", "fp32"]) == 2
    assert "exists and is not a bundle" in capsys.readouterr().err
    assert notes.read_text() == "precious"


def test_a_link_to_a_bundle_stays_a_link(run, traced, exported, tmp_path):
    """What it leads to is replaced."""
    shutil.copytree(exported, tmp_path / "v1")
    (tmp_path / "current").symlink_to("v1")
    assert main([str(run), "-o", str(tmp_path / "current"), "--variants", "fp32", "--version", "8"]) == 0
    assert (tmp_path / "current").is_symlink()
    assert read_bundle(tmp_path / "v1").manifest.version == "8"
    assert {path.name for path in tmp_path.iterdir()} == {"v1", "current"}


def test_an_interruption_at_the_last_moment_loses_no_bundle(run, traced, exported, tmp_path, monkeypatch):
    """Between the two renames; then the old one is there."""
    target = shutil.copytree(exported, tmp_path / "bundle")
    whole = Path.rename

    def interrupted(self, to):
        if self.parent != tmp_path and self.name == "bundle":
            raise KeyboardInterrupt
        return whole(self, to)

    monkeypatch.setattr(Path, "rename", interrupted)
    assert main([str(run), "-o", str(target), "--variants", "fp32", "--version", "8"]) == 130
    assert read_bundle(target).manifest.version == "7"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_ctrl_c_leaves_nothing_and_no_stack_trace(run, tmp_path, monkeypatch, capsys):
    """One line, and the exit status that shells give it."""

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("model_export.export.write_graphs", interrupted)
    assert main([str(run), "-o", str(tmp_path / "bundle")]) == 130
    assert capsys.readouterr().err == "ride-export: interrupted\n"
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named_at_once(run, tmp_path, capsys, monkeypatch):
    """Before minutes of work, and without a trace."""
    monkeypatch.setattr("model_export.export.predict", None)
    (tmp_path / "file").write_text("")
    assert main([str(run), "-o", str(tmp_path / "file" / "bundle")]) == 2
    assert re.search(r"^ride-export: .*/file: (File exists|Not a directory)$", capsys.readouterr().err, re.MULTILINE)


def test_an_empty_version_is_refused_at_once(run, tmp_path, capsys, monkeypatch):
    """Not by the manifest, minutes later."""
    monkeypatch.setattr("model_export.export.predict", None)
    assert main([str(run), "-o", str(tmp_path / "bundle"), "--version", ""]) == 2
    assert "version is ''; every answer names it" in capsys.readouterr().err


def test_the_manifest_tells_no_paths(exported, image_folder):
    """A service shows it to whoever asks."""
    assert str(image_folder.parent) not in (exported / "manifest.json").read_text()
    assert read_bundle(exported).manifest.provenance["data"]["name"] == image_folder.name


def test_whoever_may_read_the_manifest_may_read_the_graphs(run, traced, tmp_path):
    """A service under another user, too, whatever the umask is."""
    before = os.umask(0o077)
    try:
        assert main([str(run), "-o", str(tmp_path / "bundle"), "--variants", "fp32"]) == 0
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "bundle").iterdir()} == {0o644}


def test_damaged_weights_are_named(image_folder, tmp_path, capsys):
    """It is the checkpoint that is wrong, not a variant."""
    directory = make_run(image_folder, tmp_path / "run")
    change_weights(directory / "checkpoints" / "routers-0001", {"routers.output.weight": float("nan")})
    assert main([str(directory), "-o", str(tmp_path / "bundle")]) == 2
    assert re.search(r"NaN or infinity for \d+ of \d+ held-out images; its weights", capsys.readouterr().err)


def test_a_precision_whose_range_the_network_leaves_is_left_out(image_folder, tmp_path, capsys):
    """Above 65,504, as after few steps of training: the others are written, and the bundle has none of its files."""
    directory = make_run(image_folder, tmp_path / "run", **ONE_EXPERT)
    change_weights(directory / "checkpoints" / "experts-0001", {"net.trunk.layers.3.0.bn2.weight": 1e6})
    assert main([str(directory), "-o", str(tmp_path / "bundle"), "--variants", "fp16,int8"]) == 0
    assert re.search(r"variant fp16 is left out: NaN or infinity for \d+ of \d+ held-out", capsys.readouterr().err)
    assert read_bundle(tmp_path / "bundle").manifest.variants.keys() == {"fp32", "int8"}
    assert not list((tmp_path / "bundle").glob("*fp16*"))


def test_numbers_that_leave_the_range_inside_a_graph_count_too(image_folder, tmp_path, capsys):
    """A block's inner numbers are large and shrink again before its end: in fp32, the CPU's, nothing has changed."""
    directory = make_run(image_folder, tmp_path / "run", **ONE_EXPERT)
    factors = {"bn1.weight": 4e4, "bn1.bias": 4e4, "conv2.weight": 1 / 4e4}
    change_weights(
        directory / "checkpoints" / "experts-0001",
        {f"net.experts.0.layers.1.0.{name}": factor for name, factor in factors.items()},
    )
    assert main([str(directory), "-o", str(tmp_path / "bundle"), "--variants", "fp16"]) == 0
    assert re.search(r"variant fp16 is left out: NaN or infinity for \d+ of \d+ held-out", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        (["--max-mean-experts", "0.5"], "max_mean_experts is 0.5; it must be 1 or more experts per image"),
        (["--max-mean-experts", "nan"], "max_mean_experts is nan; it must be"),
        (["--max-accuracy-loss", "-1"], "max_accuracy_loss is -1.0; it must be 0 to 100 percentage points"),
        (["--max-accuracy-loss", "nan"], "max_accuracy_loss is nan; it must be"),
        (["--max-risk", "-1"], "max_risk is -1.0; it must be 0 to 100 percentage points"),
        (["--max-risk", "1", "--risk-confidence", "95"], "risk_confidence is 95.0; it must be between 0 and 1"),
    ],
)
def test_wishes_that_cannot_be_are_refused_at_once(run, tmp_path, capsys, wish, message):
    """Before any image is read."""
    assert main([str(run), "-o", str(tmp_path / "bundle"), *wish]) == 2
    assert message in capsys.readouterr().err


def test_a_confidence_without_a_risk_is_refused(run, tmp_path, capsys):
    """It would have no effect."""
    with pytest.raises(SystemExit):
        main([str(run), "-o", str(tmp_path / "bundle"), "--risk-confidence", "0.9"])
    assert "--risk-confidence: says how sure --max-risk must be, which is not given" in capsys.readouterr().err


def test_graphs_run_on_the_plain_runtime(exported):
    """Standard operators only."""
    for file in exported.glob("*.onnx"):
        assert {entry.domain for entry in onnx.load(file).opset_import} == {""}
        onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])


def test_the_default_may_be_chosen_by_its_risk(run, traced, tmp_path, capsys):
    """By another rule, too. What was certified is in the manifest, has its operating point, and is said in words."""
    arguments = ["--variants", "fp32", "--rule", "margin", "--max-risk", "60", "--risk-confidence", "0.8"]
    assert main([str(run), "-o", str(tmp_path / "bundle"), *arguments]) == 0
    manifest = read_bundle(tmp_path / "bundle").manifest
    risk, printed = manifest.calibration.risk, capsys.readouterr().out

    assert manifest.rule == "margin"
    assert (risk.max_risk, risk.confidence) == (60, 0.8)
    assert risk.images == manifest.calibration.images // 2
    defaults = [point for point in manifest.calibration.points if point.thresholds == manifest.thresholds]
    assert "margin" in {point.rule for point in defaults}
    assert manifest.provenance["test"]["routed"]["macs"] <= manifest.provenance["test"]["experts"][-1]["macs"]
    assert "risk: " in printed
    assert f"on {risk.images} images" in printed


def risky(bundle, thresholds, few):
    """The bundle's manifest as if its default had been certified to lose at most 0.5 points."""
    manifest = read_bundle(bundle).manifest
    losses = {"many": 0.1, "medium": None, "few": few}
    risk = Risk(
        max_risk=0.5,
        confidence=0.95,
        images=50,
        loss=0.25,
        upper_bound=0.48,
        loss_by_split=losses,
        variants={"int8": 0.49, "bf16": 0.51},
    )
    calibration = dataclasses.replace(manifest.calibration, risk=risk)
    return dataclasses.replace(manifest, calibration=calibration, thresholds=thresholds)


@pytest.mark.parametrize(
    ("thresholds", "few", "said", "unsaid"),
    [
        ((0.5, 0.5), 1.25, "the few split loses 1.25 points, more than 0.5", "none can be"),
        ((0.5, 0.5), 0.4, "lost on many 0.10, few 0.40", "the few split loses"),
        ((0.5, 0.5), 0.4, "image counted alike: 0.25 on 50 images that did not choose, bound 0.48", "none can be"),
        ((0.0, 0.0), 0.0, "that were tried none can be certified to lose at most 0.5 points", "lost on"),
        ((0.5, 0.5), 0.4, "  bf16, against all experts of the checkpoint: bound 0.51: not used unless", "0.49: not"),
        ((0.0, 0.0), 0.0, "  bf16, against all experts of the checkpoint: bound 0.51: not used unless", "0.49: not"),
    ],
)  # fmt: skip
def test_the_table_says_what_the_risk_means_for_rare_classes(make_bundle, thresholds, few, said, unsaid):
    """The overall loss, each split's, and in words where the few split loses more or nothing could be certified."""
    bundle = make_bundle(losses={"fp32": 0.0, "bf16": 0.0, "int8": 0.0})
    text = table(risky(bundle, thresholds, few))
    assert said in text
    assert unsaid not in text


def test_rules_are_compared_at_equal_costs(exported, capsys):
    """Each line within its budget, and no rule of the same budget left out that has a point there."""
    manifest = read_bundle(exported).manifest
    lines = table(manifest).split("rules compared: ")[1].splitlines()[2:]
    rows = [(float(line.split()[0]), line.split()[1], float(line.split()[3])) for line in lines]

    assert {rule for _, rule, _ in rows} == set(RULES)
    for budget, rule, macs in rows:
        assert macs <= budget + 0.05
        cheaper = [row for row in rows if row[0] < budget and row[1] == rule]
        assert all(row[2] <= macs for row in cheaper)


def test_wishes_exclude_each_other(run, tmp_path, capsys):
    """One of the three decides."""
    with pytest.raises(SystemExit):
        main([str(run), "-o", str(tmp_path / "bundle"), "--max-risk", "1", "--max-mean-experts", "2"])
    assert "not allowed with argument" in capsys.readouterr().err
