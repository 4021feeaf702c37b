"""Whole trainings: killed and resumed, logged, refused."""

import dataclasses
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from training import checkpoint
from training.__main__ import main
from training.checkpoint import CheckpointError, checkpoints_of, current_commit, save_checkpoint
from training.data.sets import load_data
from training.evaluate import predict
from training.files import write_atomically
from training.recipes import RECIPES
from training.train import trained_model


def start(arguments: list[str], run: Path) -> subprocess.Popen[bytes]:
    """`python -m training` in a process of its own, in a group that can be killed whole."""
    command = [sys.executable, "-m", "training", *arguments, "--out", str(run)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


@pytest.fixture(scope="session")
def finished_run(tiny_arguments, tmp_path_factory):
    """A training that nobody disturbed."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    assert start(tiny_arguments, run).wait(timeout=600) == 0
    return run


def lines_of(run: Path) -> list[dict[str, object]]:
    """metrics.jsonl without what a clock says."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "images_per_second")} for line in lines]


def test_a_killed_training_resumes_to_the_same_weights(tiny_arguments, finished_run, tmp_path):
    """kill -9 as soon as the first checkpoint is there, resume: the same bits, the same log, no epoch twice."""
    run = tmp_path / "killed"
    process = start(tiny_arguments, run)
    while not list(run.glob("checkpoints/experts-000?")):
        assert process.poll() is None, "it ended before its first checkpoint"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not list(run.glob("checkpoints/routers-0002")), "killed too late to show anything"
    assert start([*tiny_arguments, "--resume"], run).wait(timeout=600) == 0

    ours, theirs = (load_file(r / "checkpoints" / "routers-0002" / "model.safetensors") for r in (run, finished_run))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)
    assert lines_of(run) == lines_of(finished_run)
    results = [json.loads((r / "results.json").read_text()) for r in (run, finished_run)]
    assert results[0] == results[1]


def test_a_run_says_how_it_went(finished_run):
    """Five epochs in metrics.jsonl, TensorBoard files, a checkpoint of each stage, results with every figure."""
    assert [(line["stage"], line["epoch"]) for line in lines_of(finished_run)] == [
        ("experts", 1), ("experts", 2), ("experts", 3), ("routers", 1), ("routers", 2)
    ]  # fmt: skip
    assert list((finished_run / "tensorboard").glob("events.*"))
    assert {stage: c.epochs_done for stage, c in checkpoints_of(finished_run).items()} == {"experts": 3, "routers": 2}
    results = json.loads((finished_run / "results.json").read_text())
    assert len(results["experts"]) == 3
    assert results["routed"].keys() >= {"all", "few", "ece", "macs", "mean_experts", "experts_share", "thresholds"}
    assert results["class_counts"] == [26, 15, 8, 4]


def test_a_checkpoint_carries_recipe_counts_and_commit(finished_run):
    """Nobody has to remember how a file was made."""
    checkpoint = checkpoints_of(finished_run)["routers"]

    assert checkpoint.recipe.n_experts == 3
    assert checkpoint.recipe.epochs == 3
    assert checkpoint.classes == ("class 0", "class 1", "class 2", "class 3")
    assert checkpoint.class_counts == (26, 15, 8, 4)
    assert checkpoint.commit
    assert checkpoint.metrics["stage"] == "routers"


def test_code_that_is_installed_in_another_checkout_has_not_its_commit(tmp_path, monkeypatch):
    """As in a virtual environment below somebody's own project: of that project nothing was run."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.example"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "a"], check=True)
    installed = tmp_path / "site-packages" / "training"
    installed.mkdir(parents=True)
    monkeypatch.setattr(checkpoint, "__file__", str(installed / "checkpoint.py"))

    assert current_commit() == f"version {metadata.version('ride-serving')}"


def test_frozen_parts_do_not_move_in_the_router_stage(finished_run):
    """Weights and running statistics of trunk and experts are those of the first stage."""
    before = load_file(finished_run / "checkpoints" / "experts-0003" / "model.safetensors")
    after = load_file(finished_run / "checkpoints" / "routers-0002" / "model.safetensors")

    moved = {name.split(".")[0] for name in before if not before[name].equal(after[name])}
    assert moved == {"routers"}


def test_a_finished_run_is_not_trained_again(finished_run, tiny_arguments, capsys):
    """Without --resume a run directory in use is refused; with it, a finished one is only evaluated."""
    assert main([*tiny_arguments, "--out", str(finished_run)]) == 2
    assert "has checkpoints already; --resume" in capsys.readouterr().err


def test_a_run_that_another_process_finished_meanwhile_is_not_overwritten(
    tiny_arguments, finished_run, tmp_path, capsys, monkeypatch
):
    """Reading the images takes minutes, in which nobody has claimed the directory yet."""
    run = tmp_path / "run"

    def load_meanwhile(recipe, *, checked):
        shutil.copytree(finished_run, run)
        return load_data(recipe, checked=checked)

    monkeypatch.setattr("training.train.load_data", load_meanwhile)
    assert main([*tiny_arguments, "--out", str(run)]) == 2
    assert f"{run}: another process has trained there since this one began; --resume goes" in capsys.readouterr().err
    assert lines_of(run) == lines_of(finished_run)


def test_resuming_under_another_recipe_is_refused(finished_run, tiny_arguments, capsys):
    """The message says which field differs."""
    assert main([*tiny_arguments, "--out", str(finished_run), "--resume", "--set", "lr=0.2"]) == 2
    assert "made with lr=0.1 (now 0.2)" in capsys.readouterr().err


def test_the_same_images_may_lie_elsewhere(folder, finished_run, tiny_arguments, tmp_path, capsys):
    """Moved, or by another path: a run goes on, and is reported on."""
    moved = Path(shutil.copytree(folder, tmp_path / "moved"))
    arguments = [str(moved) if argument == str(folder) else argument for argument in tiny_arguments]
    assert main([*arguments, "--out", str(finished_run), "--resume"]) == 0
    report = ["report", str(finished_run), "--out", str(tmp_path / "report")]
    assert main([*report, "--data", str(moved)]) == 0
    (moved / "class 3" / "0.png").unlink()
    assert main([*report, "--data", str(moved)]) == 2
    assert "was trained on other images than are there now" in capsys.readouterr().err


def test_resuming_on_other_images_is_refused(folder, finished_run, tiny_arguments, tmp_path, capsys):
    """A renamed class, a lost image, or names that sort otherwise: what was trained on would be tested on."""
    copy = Path(shutil.copytree(folder, tmp_path / "images"))
    arguments = [str(copy) if part == str(folder) else part for part in tiny_arguments]
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    for file in run.glob("checkpoints/*/checkpoint.json"):
        file.write_text(file.read_text().replace(str(folder), str(copy)))
    assert main([*arguments, "--out", str(run), "--resume"]) == 0

    for change, message in (
        (lambda: (copy / "class 3").rename(copy / "zebra"), "other classes (class 3, zebra); restore them"),
        (lambda: (copy / "zebra").rename(copy / "class 3"), ""),
        (lambda: (copy / "class 0" / "0.png").rename(copy / "class 0" / "zzz.png"), "as many, but some have changed"),
        (lambda: [(copy / "class 1" / f"{n}.png").unlink() for n in range(6)], "of class 'class 1', "),
    ):
        change()
        assert main([*arguments, "--out", str(run), "--resume"]) == (2 if message else 0)
        assert message in capsys.readouterr().err


def test_resuming_with_other_test_images_is_refused(folder, tiny_arguments, tmp_path, capsys):
    """The figures of a run would be of other images than its thresholds; an older version's runs did not note them."""
    copy = Path(shutil.copytree(folder, tmp_path / "images" / "train")).parent
    shutil.copytree(folder, copy / "test")
    arguments = [str(copy) if part == str(folder) else part for part in tiny_arguments]
    arguments += ["--set", "epochs=1", "--set", "router_epochs=0", "--out", str(tmp_path / "run")]
    assert main(arguments) == 0
    (copy / "test" / "class 0" / "0.png").unlink()

    assert main([*arguments, "--resume"]) == 2
    assert "other images were held out or tested than are there now: some have" in capsys.readouterr().err
    for file in tmp_path.glob("run/checkpoints/*/checkpoint.json"):
        file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "unseen_digest"}))
    assert main([*arguments, "--resume"]) == 0


def save_untrained(
    run: Path, epochs: int, layer: torch.nn.Module | None = None, optimiser: torch.optim.Optimizer | None = None
) -> None:
    """A checkpoint of the stage "experts" with a layer, of one weight unless another is given."""
    info = {
        "recipe": RECIPES["ce-cifar100"].to_dict(), "classes": ["a"], "class_counts": [1], "mean": [0, 0, 0],
        "std": [1, 1, 1], "metrics": {}, "commit": "",
    }  # fmt: skip
    save_checkpoint(run, "experts", epochs, layer or torch.nn.Linear(1, 1), optimiser, info)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ({"format": 99}, "format 99, this version reads "),
        ({"recipe": []}, "not a checkpoint of this program (AttributeError: "),
        ({"recipe": {"name": "a"}}, "not a checkpoint of this program (TypeError: "),
        ({"mean": [0, 0]}, "not a checkpoint of this program (ValueError: "),
        ("nothing", "not a checkpoint of this program (TypeError: "),
    ],
)
def test_a_checkpoint_that_is_none_is_refused_by_its_file(tmp_path, damage, reason):
    """Whatever its JSON says."""
    save_untrained(tmp_path, 1)
    (file,) = tmp_path.glob("checkpoints/*/checkpoint.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | damage if isinstance(damage, dict) else damage))

    with pytest.raises(CheckpointError, match=re.escape(f"{file}: {reason}")):
        checkpoints_of(tmp_path)


def test_checkpoints_are_ordered_by_their_epochs(tmp_path):
    """Ten thousand is after nine thousand, although its text is not; older ones go."""
    for epochs in (9999, 10_000):
        save_untrained(tmp_path, epochs)
    assert checkpoints_of(tmp_path)["experts"].epochs_done == 10_000
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1


def test_a_file_has_its_old_content_or_all_of_the_new(tmp_path, monkeypatch):
    """Where the disk is full, the old; names of files that are not UTF-8 can be told in it."""

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    file = tmp_path / "error.txt"
    file.write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            write_atomically(file, "new")
    assert file.read_text() == "old"

    write_atomically(file, os.fsdecode(b"caf\xe9/\xc3\xa9.png"))
    assert file.read_text(encoding="utf-8") == "caf\\udce9/é.png"


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path, monkeypatch):
    """The half of the new one is not taken for a checkpoint, and is not in the way of the next try."""

    def killed(file):
        raise KeyboardInterrupt

    save_untrained(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "flush", killed)
        with pytest.raises(KeyboardInterrupt):
            save_untrained(tmp_path, 2)
    assert checkpoints_of(tmp_path)["experts"].epochs_done == 1

    save_untrained(tmp_path, 2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["experts-0002"]


def test_the_momentum_may_lie_in_memory_in_any_order(tmp_path):
    """As that of convolutions that a GPU computes channels-last."""
    run, layer = tmp_path / "run", torch.nn.Linear(2, 3)
    momentum = torch.arange(6.0).view(2, 3).T
    optimiser = torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9)
    optimiser.state[layer.weight]["momentum_buffer"] = momentum
    save_untrained(run, 1, layer, optimiser)

    fresh = torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9)
    checkpoints_of(run)["experts"].load_into(layer, fresh)
    assert fresh.state[layer.weight]["momentum_buffer"].equal(momentum)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"weight": (1, 2), "bias": (1,)}, "tensor weight is (1, 1), the model wants (1, 2)"),
        ({"weight": (1, 1), "bias": (1,), "scale": ()}, "tensor scale is missing, the model wants ()"),
        ({"weight": (1, 1)}, "tensor bias is (1,), the model wants none"),
    ],
)
def test_weights_of_another_model_are_refused_with_both_shapes(tmp_path, parameters, message):
    """Nothing is loaded then."""
    save_untrained(tmp_path, 1)
    stored = checkpoints_of(tmp_path)["experts"]
    model = torch.nn.ParameterDict({name: torch.full(shape, 9.0) for name, shape in parameters.items()})
    with pytest.raises(CheckpointError, match=re.escape(f"{stored.path}: {message}")):
        stored.load_into(model)
    assert all((tensor == 9).all() for tensor in model.values())


def test_of_a_checkpoint_some_tensors_may_be_taken_alone(tmp_path):
    """Those whose names begin so; the model may differ in all others."""
    save_untrained(tmp_path, 1)
    stored = checkpoints_of(tmp_path)["experts"]
    model = torch.nn.ParameterDict({"weight": torch.full((1, 1), 9.0), "bias": torch.full((3,), 9.0)})
    stored.load_into(model, only="wei")

    assert model["weight"].equal(load_file(stored.path / "model.safetensors")["weight"])
    assert model["bias"].tolist() == [9, 9, 9]


def test_images_are_compared_by_class_count_and_content(tmp_path):
    """Classes in another order are other classes: the logits would mean others."""
    save_untrained(tmp_path, 1)
    stored = dataclasses.replace(checkpoints_of(tmp_path)["experts"], classes=("a", "b"), class_counts=(2, 1))

    assert stored.other_images(("b", "a"), (2, 1), "") == "other classes (in another order)"
    assert stored.other_images(("a", "c"), (2, 1), "") == "other classes (b, c)"
    assert stored.other_images(("a", "b"), (2, 3), "") == "1 of class 'b', 3 now"
    assert stored.other_images(("a", "b"), (2, 1), "any") is None  # an older version's does not say which
    known = dataclasses.replace(stored, images_digest="one")
    assert known.other_images(("a", "b"), (2, 1), "one") is None
    assert known.other_images(("a", "b"), (2, 1), "two") == "as many, but some have changed or go by other names"


def test_a_kill_while_an_older_checkpoint_is_deleted_leaves_the_newest(tmp_path, monkeypatch):
    """The half of the older one is not taken for a checkpoint, and goes with the next that is saved."""

    def killed(directory, **_):
        if directory.exists():
            (directory / "checkpoint.json").unlink()
            raise KeyboardInterrupt

    save_untrained(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            save_untrained(tmp_path, 2)
    assert checkpoints_of(tmp_path)["experts"].epochs_done == 2

    save_untrained(tmp_path, 3)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["experts-0003"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["magic"], "magic: no such recipe; there are ride-cifar100"),
        (["ride-own"], "no data named; give --data"),
        (["ride-cifar100", "--data", ""], "no data named; give --data"),
        (["ride-own", "--data", "/nowhere/at/all"], "/nowhere/at/all: no such directory"),
        (["ride-cifar100", "--set", "epochs"], "--set epochs: must be field=value"),
        (["ride-cifar100", "--set", "=3"], "--set =3: must be field=value"),
        (["ride-cifar100", "--set", "depth=3"], "depth: no such recipe field; "),
    ],
)
def test_mistakes_on_the_command_line_are_explained(arguments, message, tmp_path, capsys):
    """One line on standard error and exit status 2; no stack trace."""
    assert main([*arguments, "--out", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err


def test_a_directory_that_cannot_be_written_is_told_in_a_line(tiny_arguments, tmp_path, capsys):
    """Which it is, and why; no stack trace."""
    file = tmp_path / "file"
    file.touch()
    assert main([*tiny_arguments, "--out", str(file / "run")]) == 2
    assert f"ride-train: {file / 'run'}: Not a directory\n" in capsys.readouterr().err


def test_a_full_disk_leaves_the_last_checkpoint(tiny_arguments, monkeypatch, tmp_path, capsys):
    """And the reason in a line."""
    saved = []

    def full(tensors, file):
        if len(saved) == 2:
            raise SafetensorError("No space left on device")
        saved.append(file)
        save_file(tensors, file)

    monkeypatch.setattr("training.checkpoint.save_file", full)
    assert main([*tiny_arguments, "--out", str(tmp_path)]) == 2
    assert "experts-0002.partial/model.safetensors: cannot be written (No space" in capsys.readouterr().err
    assert checkpoints_of(tmp_path)["experts"].epochs_done == 1


def test_a_network_that_has_no_numbers_for_test_images_is_told(tiny_arguments, monkeypatch, tmp_path, capsys):
    """Its last step may have been one too far, which no loss says any more."""

    def damaged(model, images):
        predictions = predict(model, images)
        predictions.expert_logits[0, 3] = float("nan")
        return predictions

    monkeypatch.setattr("training.train.predict", damaged)
    assert main([*tiny_arguments, "--set", "evaluate_every=100", "--out", str(tmp_path)]) == 2
    message = "ride-train: routers: NaN or infinity for 1 of 16 test images; lower router_lr (0.01) or lr (0.1)\n"
    assert message in capsys.readouterr().err


def test_ctrl_c_leaves_no_stack_trace(monkeypatch, tmp_path, capsys):
    """One line, and the exit status that shells give it."""

    def interrupted(recipe, run):
        raise KeyboardInterrupt

    monkeypatch.setattr("training.train.train", interrupted)
    assert main(["ce-cifar100", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "ride-train: interrupted\n"


def test_unfinished_or_damaged_runs_are_refused_by_name(finished_run, tmp_path):
    """What is missing, what is damaged, and what to do."""
    import shutil

    with pytest.raises(CheckpointError, match="no checkpoints there"):
        trained_model(tmp_path / "none")

    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    shutil.rmtree(run / "checkpoints" / "routers-0002")
    with pytest.raises(CheckpointError, match="stage routers has 0 of 2 epochs; finish it with ride-train --resume"):
        trained_model(run)

    shutil.copytree(finished_run / "checkpoints" / "routers-0002", run / "checkpoints" / "routers-0002")
    weights = run / "checkpoints" / "routers-0002" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read"):
        trained_model(run)

    (run / "checkpoints" / "routers-0002" / "checkpoint.json").write_text('{"format": 99}')
    with pytest.raises(CheckpointError, match="format 99, this version reads 1"):
        trained_model(run)
