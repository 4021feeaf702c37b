"""Whole trainings of every baseline on a few tiny images: stages, resumption, a first stage taken from another run."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from training import loop
from training.__main__ import main
from training.checkpoint import CheckpointError, checkpoints_of
from training.data.longtail import MANY_ABOVE, class_counts
from training.methods.lfme import classes_of_splits
from training.recipes import RECIPES
from training.train import METHODS, train, trained_model

LINEAR = {"loss": "ce", "classifier": "linear"}
RETRAINED = {"method": "single", **LINEAR, "retrain_loss": "ce", "retrain_sampler": "class_aware"}
VARIANTS = {
    "ce": {"method": "single", **LINEAR},
    "crt": {**RETRAINED, "retrain": "crt", "retrain_epochs": 2},
    "lws": {**RETRAINED, "retrain": "lws", "retrain_epochs": 2},
    "tau-norm": {**RETRAINED, "retrain": "tau_norm", "retrain_epochs": 1},
    "ncm": {**RETRAINED, "retrain": "ncm", "retrain_epochs": 1},
    "bbn": {"method": "bbn", **LINEAR},
    "oltr": {"method": "oltr", **LINEAR, "oltr_epochs": 2, "oltr_lr": 1e-4, "oltr_classifier_lr": 1e-3},
    "lfme": {"method": "lfme", **LINEAR, "lfme_epochs": 1},
    "bbn-large": {"method": "bbn", **LINEAR, "backbone": "resnet10", "image_size": 32},
    "oltr-large": {
        "method": "oltr",
        **LINEAR,
        "oltr_epochs": 1,
        "oltr_lr": 1e-4,
        "oltr_classifier_lr": 1e-3,
        "backbone": "resnet10",
        "image_size": 32,
    },
    "m2m": {"method": "m2m", "loss": "ldam", "classifier": "cosine", "m2m_from": 0.5, "m2m_steps": 2, "m2m_gamma": 0.0},
}
METHODS_WITH_STAGES = [name for name in VARIANTS if name != "ce"]
LARGE = ("bbn-large", "oltr-large")  # slow, and resumed as the small ones are


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Class folders of 8x8 PNGs, of which 113, 23 and 9 are for training: a class in each split."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for label, count in enumerate((140, 28, 11)):
        (root / f"class {label}").mkdir()
        for index in range(count):
            pixels = generator.integers(0, 160, (8, 8, 3)) + np.array([90 * (label == c) for c in range(3)])
            Image.fromarray(pixels.astype(np.uint8)).save(root / f"class {label}" / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def recipe_of(images):
    """The recipe of a variant on these images."""

    def make(variant, **fields):
        common = {
            "name": "tiny", "data": str(images), "profile": "natural", "mean": None, "std": None, "image_size": 8,
            "epochs": 2, "batch_size": 64, "warmup_epochs": 1, "compile": False, "precision": "fp32",
            "evaluate_every": 1,
        }  # fmt: skip
        return dataclasses.replace(RECIPES["ce-cifar100"], **common | VARIANTS[variant] | fields)

    return make


@pytest.fixture(scope="module")
def runs(recipe_of, tmp_path_factory):
    """Finished runs by variant, made when first asked for."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("runs") / name
            train(recipe_of(name), made[name])
        return made[name]

    return get


def weights_of(run):
    """The tensors of the last stage's checkpoint."""
    checkpoints = checkpoints_of(run)
    last = list(next(iter(checkpoints.values())).recipe.stage_epochs())[-1]
    return load_file(checkpoints[last].path / "model.safetensors")


@pytest.mark.parametrize("name", METHODS_WITH_STAGES)
def test_a_baseline_trains_all_its_stages_and_loads_again(name, runs, recipe_of):
    """Every stage has its checkpoint with all epochs done, figures are there, and the model is the one evaluated."""
    run = runs(name)

    assert {stage: c.epochs_done for stage, c in checkpoints_of(run).items()} == recipe_of(name).stage_epochs()
    results = json.loads((run / "results.json").read_text())
    assert 0 <= results["experts"][0]["all"] <= 100
    _, model = trained_model(run)
    stored, loaded = weights_of(run), model.state_dict()
    assert stored.keys() == loaded.keys()
    assert [key for key in stored if not stored[key].equal(loaded[key])] == []


@pytest.mark.parametrize("name", [name for name in METHODS_WITH_STAGES if name not in LARGE])
def test_a_baseline_cut_off_in_any_stage_resumes_to_the_same_bits(name, runs, recipe_of, tmp_path, monkeypatch):
    """Cut off after every single checkpoint, and resumed."""
    save, theirs = loop.save_checkpoint, weights_of(runs(name))

    def save_and_die(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "save_checkpoint", save_and_die)
    for _ in range(sum(recipe_of(name).stage_epochs().values())):
        with pytest.raises(KeyboardInterrupt):
            train(recipe_of(name), tmp_path / "run")
    train(recipe_of(name), tmp_path / "run")

    ours = weights_of(tmp_path / "run")
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not ours[key].equal(theirs[key])] == []


@pytest.mark.parametrize("name", ["crt", "lws", "tau-norm", "ncm", "oltr"])
def test_a_first_stage_taken_from_another_run_gives_the_same_bits(name, runs, recipe_of, tmp_path):
    """Cross-entropy is trained once; what follows is the same as if each method had trained it itself."""
    train(recipe_of(name, first_stage=str(runs("ce")), name="other"), tmp_path / "run")

    ours, theirs = weights_of(tmp_path / "run"), weights_of(runs(name))
    assert [key for key in theirs if not ours[key].equal(theirs[key])] == []
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert "experts" not in {line["stage"] for line in lines}


def test_the_generator_of_m2m_is_a_finished_cross_entropy_run(runs, recipe_of, tmp_path):
    """Its weights are taken as they are, and stay so."""
    train(recipe_of("m2m", first_stage=str(runs("ce"))), tmp_path / "run")

    ours, theirs = weights_of(tmp_path / "run"), weights_of(runs("ce"))
    for key, value in theirs.items():
        assert ours["teachers.generator." + key.removeprefix("net.")].equal(value), key


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lr": 0.2}, "made with lr=0.1, this recipe needs 0.2"),
        ({"seed": 1}, "made with seed=0, this recipe needs 1"),
        ({"classifier": "cosine", "retrain": "crt"}, "made with classifier=linear, this recipe needs cosine"),
        ({"epochs": 3}, "made with epochs=2, this recipe needs 3"),
        (
            {"method": "m2m", "m2m_from": 0.5, "retrain_epochs": 0, "weight_decay": 0.0},
            "made with weight_decay=0.0002, this recipe",
        ),
    ],
)
def test_a_first_stage_of_another_recipe_is_refused(fields, message, runs, recipe_of, tmp_path):
    """By the first field that differs; fields of other stages may differ."""
    with pytest.raises(CheckpointError, match=message):
        train(recipe_of("crt", first_stage=str(runs("ce")), retrain_lr=0.3, **fields), tmp_path / "run")


def test_a_first_stage_that_is_not_there_or_saw_other_images_is_refused(runs, recipe_of, images, tmp_path):
    """No run, an unfinished one, one on images that have changed since."""
    with pytest.raises(CheckpointError, match="no checkpoint of the stage 'experts' there"):
        train(recipe_of("crt", first_stage=str(tmp_path / "nowhere")), tmp_path / "run")

    unfinished = tmp_path / "unfinished"
    shutil.copytree(runs("ce"), unfinished)
    file = unfinished / "checkpoints" / "experts-0002" / "checkpoint.json"
    file.write_text(file.read_text().replace('"epochs_done": 2', '"epochs_done": 1'))
    with pytest.raises(CheckpointError, match="1 of 2 epochs are done"):
        train(recipe_of("crt", first_stage=str(unfinished)), tmp_path / "run")

    file.write_text(file.read_text().replace('"epochs_done": 1', '"epochs_done": 2').replace(" 113,", " 112,"))
    with pytest.raises(CheckpointError, match=r"trained on other images: 112 of class '.*', 113 now"):
        train(recipe_of("crt", first_stage=str(unfinished)), tmp_path / "run")


@pytest.mark.parametrize("name", ["crt", "lws", "tau-norm", "ncm"])
def test_decoupled_training_leaves_the_features_weights_alone(name, runs):
    """Beside the classifier only running statistics move, and those only where there are batches."""
    before, after = weights_of(runs("ce")), weights_of(runs(name))

    moved = {key for key in before if key in after and not before[key].equal(after[key])}
    statistics = {key for key in moved if key.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    assert all("classifier" in key for key in moved - statistics)
    assert bool(statistics) == (name in ("crt", "lws"))


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_a_recipe_names_the_stages_that_its_method_builds(recipe):
    """`stage_epochs` says what a run must hold to be finished."""
    small = dataclasses.replace(recipe, image_size=8, teacher="", distill_each=False)
    _, stages = METHODS[recipe.method](small, [200, 50, 10], (0.5,) * 3, (0.2,) * 3)

    assert {stage.name: stage.epochs for stage in stages} == recipe.stage_epochs()


@pytest.mark.parametrize("name", RECIPES)
def test_a_smoke_run_is_possible_of_every_recipe(name, tmp_path, capsys):
    """Its few epochs are no impossible combination: only the images are missing here."""
    assert main([name, "--smoke", "--data", str(tmp_path / "nothing"), "--out", str(tmp_path / "run")]) == 2
    assert "nothing: no such directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("ride-retrained-cifar100", ["epochs=4"], {"epochs": 4, "cycles": 1, "warmup_epochs": 1}),
        ("ride-cifar100", ["n_experts=1", "diversity_weight=0"], {"epochs": 2, "router_epochs": 5}),
        ("ride-cifar100", ["profile=natural", "n_max=7"], {"n_max": 7, "imbalance": 100}),
        ("ride-swin-t", [], {"epochs": 2, "router_epochs": 0}),
    ],
)
def test_a_smoke_run_takes_what_is_set_besides(name, settings, expected, monkeypatch, tmp_path):
    """Together they must be possible, not each alone: 4 epochs are none of the 3 cycles that smoke makes one."""
    recipes = []
    monkeypatch.setattr("training.train.train", lambda recipe, run: recipes.append(recipe) or {"experts": []})
    given = [part for setting in settings for part in ("--set", setting)]
    assert main([name, "--smoke", *given, "--out", str(tmp_path / "run")]) == 0

    assert {field: getattr(recipes[0], field) for field in expected} == expected


def test_a_smoke_run_of_lfme_has_classes_in_every_split(monkeypatch, tmp_path):
    """A teacher learns each of them."""
    recipes = []
    monkeypatch.setattr("training.train.train", lambda recipe, run: recipes.append(recipe) or {"experts": []})
    assert main(["lfme-cifar100", "--smoke", "--out", str(tmp_path / "run")]) == 0

    counts = class_counts(recipes[0].n_max, recipes[0].imbalance, 100, recipes[0].profile)
    assert all(classes_of_splits(counts).values())
    assert 0.9 * 0.9 * recipes[0].n_max > MANY_ABOVE  # where a set's test and held-out images are drawn from it
