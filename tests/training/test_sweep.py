"""Several trainings in one directory: killed, failed, continued, refused; and their table."""

import csv
import dataclasses
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

import training.runs
from tests.training.test_claim import held_elsewhere
from training.__main__ import COMMANDS, main
from training.checkpoint import checkpoints_of
from training.recipes import RECIPES
from training.recipes.published import PUBLISHED
from training.runs import RunsError, read_results, train_all
from training.sweep import label_of, rows_of, write_plots, write_tables
from training.train import train

NAMES = ("ce-cifar100-seed0", "ce-cifar100-seed1", "ride-own-seed0", "ride-own-seed1")


def results_of(directory):
    """The results.json of every run, by name."""
    return {run.parent.name: json.loads(run.read_text()) for run in sorted(directory.glob("*/results.json"))}


def no_training(recipe, run):
    """In place of `train` where nothing may be trained."""
    raise AssertionError(f"{run} is trained again")


def test_a_sweep_tabulates_mean_and_deviation_over_seeds(swept):
    """One row of a recipe with one expert, two of a routed one; figures are those of the runs."""
    results = results_of(swept)
    assert tuple(results) == NAMES
    with (swept / "table.csv").open() as file:
        rows = list(csv.DictReader(file))

    assert [(row["method"].split(",")[0], row["routed"], row["seeds"]) for row in rows] == [
        ("ce-cifar100", "0", "0 1"), ("ride-own", "0", "0 1"), ("ride-own", "1", "0 1")
    ]  # fmt: skip
    for row, figures in zip(rows, (
        [results[name]["experts"][-1] for name in NAMES[:2]], [results[name]["experts"][-1] for name in NAMES[2:]],
        [results[name]["routed"] for name in NAMES[2:]],
    ), strict=True):  # fmt: skip
        values = [figure["all"] for figure in figures]
        assert float(row["all_mean"]) == pytest.approx(statistics.mean(values))
        assert float(row["all_sd"]) == pytest.approx(statistics.stdev(values))
        assert float(row["macs_mean"]) == pytest.approx(statistics.mean(figure["macs"] for figure in figures))
    used = statistics.mean(results[name]["routed"]["mean_experts"]["all"] for name in NAMES[2:])
    assert float(rows[2]["mean_experts_mean"]) == pytest.approx(used)
    assert (rows[0]["mean_experts_mean"], rows[1]["mean_experts_mean"]) == ("1.0", "3.0")
    assert (rows[0]["published_all"], rows[1]["published_all"]) == ("", "")


def test_the_markdown_table_shows_what_differs(swept):
    """A shortened schedule is marked as such; no published figure stands beside one on other images."""
    text = (swept / "table.md").read_text()
    line = next(line for line in text.splitlines() if line.startswith("| ce-cifar100"))

    assert "epochs=1" in line
    assert "seed" not in line
    assert " ± " in line
    assert line.endswith("| – |")
    assert "Published" not in text
    for plot in ("accuracy.png", "cost.png", "experts.png"):
        assert (swept / plot).read_bytes().startswith(b"\x89PNG")


def test_published_figures_stand_beside_runs_on_the_same_images(swept, tmp_path):
    """With their source, whatever the schedule; hollow markers in the plots."""
    run = Path(shutil.copytree(swept / NAMES[0], tmp_path / "run"))
    results = json.loads((run / "results.json").read_text())
    results["recipe"] |= {field: RECIPES["ce-cifar100"].to_dict()[field] for field in ("data", "profile")}
    (run / "results.json").write_text(json.dumps(results))
    rows = rows_of([run])
    text = write_tables(rows, tmp_path, {})

    assert "38.3; 39.1 (66.1 / 37.3 / 10.6)" in next(line for line in text.splitlines() if line.startswith("| ce-"))
    assert "38.3 LDAM, arXiv:1906.07413" in text
    write_plots(rows, tmp_path)
    with (tmp_path / "table.csv").open() as file:
        assert next(csv.DictReader(file))["published_all"] == "38.3"


def test_published_figures_stand_beside_rows_of_their_kind(swept, tmp_path):
    """RIDE's are routed. All other cells are mean and deviation of the runs; all experts cost the same every time."""
    ride, results = RECIPES["ride-cifar100"].to_dict(), []
    for name in NAMES[2:]:
        run = shutil.copytree(swept / name, tmp_path / name)
        results.append(json.loads((run / "results.json").read_text()))
        fields = ("name", "data", "profile", "imbalance", "n_max")
        results[-1]["recipe"] |= {field: ride[field] for field in fields}
        (run / "results.json").write_text(json.dumps(results[-1]))

    def shown(values, digits=2):
        values = list(values)
        known = None not in values
        return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}" if known else "–"

    def cells(rows):
        return [shown(row[key] for row in rows) for key in ("all", "many", "medium", "few", "ece")]

    text = write_tables(rows_of([tmp_path / name for name in NAMES[2:]]), tmp_path, {})
    lines = [line for line in text.splitlines() if line.startswith("| ride-cifar100, ")]
    whole, routed = ([result["experts"][-1] for result in results], [result["routed"] for result in results])
    cost = [shown(row["mean_experts"]["all"] for row in routed), shown((row["macs"] / 1e6 for row in routed), 1)]
    published = "48.0 (68.1 / 49.2 / 23.9); 48.6 (67.0 / 49.9 / 25.7)"
    assert [line[line.index(" | 2 (0, 1) | ") :] for line in lines] == [
        " | ".join(["", "2 (0, 1)", "3.00", f"{whole[0]['macs'] / 1e6:.1f}", *cells(whole), "– |"]),
        " | ".join(["", "2 (0, 1)", *cost, *cells(routed), f"{published} |"]),
    ]


def test_a_finished_sweep_trains_nothing_again(swept, sweep_arguments, monkeypatch, capsys):
    """The same command prints the same table."""
    monkeypatch.setattr(training.runs, "train", no_training)
    table = (swept / "table.md").read_text()

    for changes_nothing in ([], ["--set", "workers=1"], ["--set", "evaluate_every=1"]):
        assert main([*sweep_arguments, "--out", str(swept), *changes_nothing]) == 0
        assert table in capsys.readouterr().out


def test_other_settings_in_the_same_directory_are_refused(swept, sweep_arguments, monkeypatch, capsys, tmp_path):
    """Before anything is trained; also where only a run's own recipe is another."""
    monkeypatch.setattr(training.runs, "train", no_training)
    assert main([*sweep_arguments, "--out", str(swept), "--set", "lr=0.2"]) == 2
    assert "made with the settings" in capsys.readouterr().err

    shutil.copytree(swept, tmp_path / "sweep")
    (tmp_path / "sweep" / "settings.json").unlink()
    assert main([*sweep_arguments, "--out", str(tmp_path / "sweep"), "--set", "lr=0.2"]) == 2
    assert "ride-own-seed0: made with lr=0.1 (now 0.2)" in capsys.readouterr().err


def test_one_failing_run_stops_no_other(swept, sweep_arguments, monkeypatch, capsys, tmp_path):
    """It is named at the end and in the table, the exit status is 1, and the next call makes up for it."""
    out = tmp_path / "sweep"

    def fake(recipe, run):
        if (run.name, len(attempts := tried.setdefault(run.name, []))) == ("ride-own-seed1", 0):
            attempts.append(run)
            raise RuntimeError("bad\udcff.png: out of memory")  # with a file's name that is not UTF-8
        shutil.copy(swept / run.name / "results.json", run)

    tried = {}
    monkeypatch.setattr(training.runs, "train", fake)

    assert main([*sweep_arguments, "--out", str(out)]) == 1
    printed = capsys.readouterr()
    assert "ride-own-seed1: failed: RuntimeError: bad" in printed.err
    assert r"- ride-own-seed1: RuntimeError: bad\udcff.png: out of memory" in printed.out
    assert r"- ride-own-seed1: RuntimeError: bad\udcff.png: out of memory" in (out / "table.md").read_text()
    assert set(results_of(out)) == {*NAMES} - {"ride-own-seed1"}
    assert "in fake" in (out / "ride-own-seed1" / "error.txt").read_text()

    assert main([*sweep_arguments, "--out", str(out)]) == 0
    assert set(results_of(out)) == {*NAMES}
    assert not (out / "ride-own-seed1" / "error.txt").exists()
    assert "Failed" not in (out / "table.md").read_text()


def test_a_killed_sweep_goes_on_to_the_same_weights(swept, sweep_arguments, tmp_path):
    """kill -9 in the middle of the second run; the first is not touched again, the others end as if undisturbed."""
    out = tmp_path / "sweep"
    command = [sys.executable, "-m", "training", *sweep_arguments, "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    while not (out / "ride-own-seed1" / "checkpoints" / "experts-0001").exists():
        assert process.poll() is None, "it ended too early"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "ce-cifar100-seed0").exists()
    made = (out / "ride-own-seed0" / "results.json").stat().st_mtime_ns

    assert main([*sweep_arguments, "--out", str(out)]) == 0
    assert (out / "ride-own-seed0" / "results.json").stat().st_mtime_ns == made
    for name in NAMES:
        (ours,), (theirs,) = (list(d.glob(f"{name}/checkpoints/*1/model.safetensors"))[-1:] for d in (out, swept))
        ours, theirs = load_file(ours), load_file(theirs)
        assert all(ours[tensor].equal(theirs[tensor]) for tensor in ours)


def test_two_processes_do_not_share_a_directory(swept, sweep_arguments, capsys):
    """The second is refused at once."""
    with held_elsewhere(swept):
        assert main([*sweep_arguments, "--out", str(swept)]) == 2
    assert "another process is at work there" in capsys.readouterr().err


def test_runs_from_elsewhere_join_the_table(swept, sweep_arguments, monkeypatch, tmp_path, capsys):
    """With --also; one that the sweep trains itself is refused, and so is a directory without results."""
    monkeypatch.setattr(training.runs, "train", no_training)
    results = json.loads((swept / NAMES[0] / "results.json").read_text())
    results["recipe"]["lr"] = 0.3
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "results.json").write_text(json.dumps(results))
    out = shutil.copytree(swept, tmp_path / "sweep")

    assert main([*sweep_arguments, "--out", str(out), "--also", str(tmp_path / "other")]) == 0
    assert "lr=0.3" in capsys.readouterr().out
    assert main([*sweep_arguments, "--out", str(out), "--also", str(swept / NAMES[0])]) == 2
    assert "the sweep trains ce-cifar100" in capsys.readouterr().err
    assert main([*sweep_arguments, "--out", str(out), "--also", str(tmp_path)]) == 2
    assert "no results.json of a finished run there that this version reads" in capsys.readouterr().err
    with pytest.raises(RunsError, match="both are ce-cifar100"):
        rows_of([swept / NAMES[0], out / NAMES[0]])


def test_runs_that_cannot_be_one_table_are_refused_before_anything_is_trained(swept, sweep_arguments, tmp_path, capsys):
    """Two of the same recipe and seed would spoil the table of every run that is trained beside them."""
    copies = [str(shutil.copytree(swept / NAMES[0], tmp_path / copy)) for copy in "ab"]
    arguments = [*sweep_arguments, "--out", str(tmp_path / "sweep"), "--seeds", "2", "--also", *copies]

    assert main(arguments) == 2
    assert "both are ce-cifar100" in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"images_digest": "0" * 32}, "other training images"),
        ({"unseen_digest": "0" * 32}, "other test images"),
        ({"classes": ["a", "b", "c"]}, "other classes"),
    ],
)
def test_runs_on_other_images_are_no_seeds_of_one_method(swept, change, differs, tmp_path):
    """Their mean would be one of nothing."""
    runs = [shutil.copytree(swept / name, tmp_path / name) for name in NAMES[:2]]
    file = runs[1] / "results.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))

    with pytest.raises(RunsError, match=f"seed1: both are ce-cifar100.*, with {differs}, so that no mean of them"):
        rows_of(runs)


def test_runs_of_other_settings_under_one_name_are_no_seeds_of_one_method(swept, tmp_path):
    """Where the name is none of the recipes', it tells nothing of the settings."""
    runs = [shutil.copytree(swept / name, tmp_path / name) for name in NAMES[:2]]
    for run, lr in zip(runs, (0.1, 0.2), strict=True):
        results = json.loads((run / "results.json").read_text())
        results["recipe"] |= {"name": "mine", "lr": lr}
        (run / "results.json").write_text(json.dumps(results))

    with pytest.raises(RunsError, match=r"both are mine, with other lr \(0.1 and 0.2\)"):
        rows_of(runs)


@pytest.mark.parametrize("command", ["sweep", "bias-variance"])
def test_recipes_of_one_name_are_refused(command, tmp_path, capsys):
    """Each would be trained in the directory of the other."""
    arguments = [command, "ride-cifar100", "ce-cifar100", "--set", "name=mine", "--out", str(tmp_path / "sweep")]

    assert main(arguments) == 2
    assert "name=mine: several recipes have it" in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


def test_finished_runs_can_be_tabulated_alone(swept, tmp_path, capsys):
    """Without a recipe nothing is trained, and the figures are the same."""
    runs = [str(swept / name) for name in NAMES]
    assert main(["sweep", "--out", str(tmp_path / "table"), "--also", runs[0], "--also", *runs[1:]]) == 0
    assert (tmp_path / "table" / "table.csv").read_text() == (swept / "table.csv").read_text()


def test_a_first_stage_that_two_recipes_share_is_trained_once(swept, tmp_path):
    """Classifiers retrained on a finished run's features end with the weights of a training from the beginning."""
    plain = read_results(swept / "ce-cifar100-seed0")["recipe"]
    retrained = dataclasses.replace(plain, name="retrained", retrain_epochs=1, retrain_sampler="class_balanced")
    shutil.copytree(swept / "ce-cifar100-seed0", tmp_path / "ce")

    assert train_all({"ce": plain, "retrained": retrained}, tmp_path, {}, lambda run: None) == {}
    train(retrained, tmp_path / "alone")

    borrowed = json.loads((tmp_path / "retrained" / "checkpoints" / "experts-0001" / "checkpoint.json").read_text())
    assert borrowed["trained_by"] == str(tmp_path / "ce")
    ours, theirs = (checkpoints_of(tmp_path / name)["classifiers"].path for name in ("retrained", "alone"))
    ours, theirs = load_file(ours / "model.safetensors"), load_file(theirs / "model.safetensors")
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    lines = (tmp_path / "retrained" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["stage"] for line in lines] == ["experts", "classifiers"]


def test_labels_name_only_what_is_not_the_recipe_itself():
    """Seeds and what changes no figure are left out."""
    recipe = RECIPES["ride-cifar100"]

    assert label_of(dataclasses.replace(recipe, seed=3, evaluate_every=7, compile=False)) == "ride-cifar100"
    assert label_of(dataclasses.replace(recipe, epochs=20, lr=0.2)) == "ride-cifar100, epochs=20, lr=0.2"


def test_a_table_of_failures_alone_can_be_written(tmp_path):
    """Where not one run finished."""
    assert "- a: ValueError: b" in write_tables([], tmp_path, {"a": "ValueError: b"})


def test_published_figures_belong_to_recipes(capsys):
    """`ride-train list` shows every recipe, with the figures and where they come from; no figure is left over."""
    assert main(["list"]) == 0
    printed = capsys.readouterr().out

    assert set(PUBLISHED) <= set(RECIPES)
    assert all(name in printed for name in RECIPES)
    assert "published: 48.0 (68.1 / 49.2 / 23.9) routed, RIDE, arXiv:2010.01809" in printed
    assert not set(RECIPES) & set(COMMANDS), "a recipe could not be trained"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sweep"], "sweep: name recipes to train, or finished runs with --also"),
        (["sweep", "magic"], "magic: no such recipe"),
        (["sweep", "ride-own", "--seeds", "0,x"], "--seeds 0,x: must be whole numbers, separated by commas"),
        (["sweep", "ride-own", "--set", "epochs=0"], "epochs=0: must be from 1"),
        (
            ["sweep", "ride-own", "ce-cifar100", "--set", "tau=1"],
            "no effect on ride-own or ce-cifar100 without retrain",
        ),
        (["ride-own", "--set", "oltr_lr=1"], "--set oltr_lr=1: has no effect on ride-own without method='oltr'"),
        (["sweep", "ride-own", "--set", "seed=7"], "--set seed=7: a sweep takes its seeds from --seeds; leave it out"),
        (["bias-variance", "--set", "n_max=10"], "--set n_max=10: the size of a draw is --n-max; leave it out"),
        (["bias-variance", "--set", "subset_order=first"], "subset_order=first: draws are random subsets; leave it"),
        (["sweep", "ride-own", "ce-cifar100", "--set", "n_experts=2"], "n_experts=2: method 'single' trains one"),
    ],
)
def test_mistakes_are_explained_before_anything_is_made(arguments, message, tmp_path, capsys):
    """One line on standard error, exit status 2, no directory."""
    assert main([*arguments, "--out", str(tmp_path / "sweep")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


def test_a_directory_that_cannot_be_made_is_said_in_a_line(tmp_path, capsys):
    """Of every command."""
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "sweep"

    assert main(["sweep", "ride-own", "--out", str(out)]) == 2
    assert capsys.readouterr().err == f"ride-train: {out}: Not a directory\n"


def test_a_seed_that_no_generator_takes_is_refused_in_a_line(tmp_path, capsys):
    """As it is by a training of its own."""
    assert main(["sweep", "ride-own", "--seeds=-1", "--out", str(tmp_path / "sweep")]) == 2
    assert capsys.readouterr().err == "ride-train: seed=-1: must be from 0 to 4294967295\n"


def test_the_help_names_every_command(capsys):
    """With its options."""
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = capsys.readouterr().out
    assert all(f"ride-train {name}" in printed for name in COMMANDS)
    assert "--seeds" in printed
