"""Bias and variance: the identities, hand-worked cases, the signs, and a whole analysis that is resumed."""

import csv
import json
import shutil

import numpy as np
import pytest
from PIL import Image

import training.runs
from training.__main__ import main
from training.bias_variance import EXPECTED, analyse, sign_of, squared, zero_one
from training.recipes import RECIPES

COUNTS = [500, 400, 50, 5]  # many, many, medium, few


@pytest.fixture(scope="module")
def balanced(tmp_path_factory):
    """Training and test folders of four classes of 16x16 images, 20 and 5 each."""
    root = tmp_path_factory.mktemp("balanced")
    generator = np.random.default_rng(0)
    for part, count in (("train", 20), ("test", 5)):
        for label in range(4):
            directory = root / part / f"class {label}"
            directory.mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 160, (16, 16, 3)) + np.array([90 * (label == c) for c in range(3)])
                Image.fromarray(pixels.astype(np.uint8)).save(directory / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def arguments(balanced):
    """`ride-train bias-variance` of two recipes on two draws of 12, 7, 4 and 3 images: four runs of an epoch."""
    settings = {"imbalance": 4, "epochs": 1, "image_size": 16, "batch_size": 32, "warmup_epochs": 1, "compile": "false"}
    overrides = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    command = ["bias-variance", "ce-cifar100", "ldam-drw-cifar100", "--data", str(balanced), "--draws", "2"]
    return [*command, "--n-max", "12", "--split-n-max", "120", *overrides]


@pytest.fixture(scope="module")
def analysed(arguments, tmp_path_factory):
    """The directory of that analysis, finished."""
    out = tmp_path_factory.mktemp("analyses") / "analysis"
    assert main([*arguments, "--out", str(out)]) == 0
    return out


def random_models(n_models=7, n_images=60, seed=0):
    """Probability vectors (M, N, 4) and labels (N,)."""
    generator = np.random.default_rng(seed)
    return generator.dirichlet(np.ones(4) * 0.7, (n_models, n_images)), generator.integers(0, 4, n_images)


def test_squared_error_is_bias_plus_net_variance_exactly():
    """For every image; the variance itself has the M − 1 of an unbiased estimate."""
    probabilities, labels = random_models()
    parts = squared(probabilities, labels)

    truth = np.eye(4)[labels]
    np.testing.assert_allclose(parts.error, ((probabilities - truth) ** 2).sum(2).mean(0), rtol=1e-12)
    np.testing.assert_allclose(parts.error, parts.bias + parts.net_variance, rtol=1e-12)
    np.testing.assert_allclose(parts.variance, probabilities.var(axis=0, ddof=1).sum(axis=1), rtol=1e-12)
    assert (parts.variance > parts.net_variance).all()


@pytest.mark.parametrize("n_classes", [2, 5])
def test_the_0_1_error_is_bias_plus_net_variance_exactly(n_classes):
    """For every image, whatever the models say."""
    generator = np.random.default_rng(n_classes)
    predicted, labels = generator.integers(0, n_classes, (6, 500)), generator.integers(0, n_classes, 500)
    parts = zero_one(predicted, labels)

    np.testing.assert_allclose(parts.error, parts.bias + parts.net_variance, atol=1e-12)
    np.testing.assert_allclose(parts.error, (predicted != labels).mean(axis=0))


def test_hand_worked_0_1_cases():
    """Unbiased: variance adds. Biased: only departures to the true class help."""
    predicted = np.array([[1, 2], [1, 2], [1, 1], [0, 0]])
    parts = zero_one(predicted, np.array([1, 1]))

    assert parts.bias.tolist() == [0, 1]
    assert parts.variance.tolist() == [0.25, 0.5]
    assert parts.net_variance.tolist() == [0.25, -0.25]
    assert parts.error.tolist() == [0.25, 0.75]


def test_of_several_most_frequent_classes_each_is_the_main_prediction_as_often():
    """The parts are the means over the choices, so no class gains by its number; two models have nothing but error."""
    generator = np.random.default_rng(0)
    predicted, labels = generator.integers(0, 4, (4, 300)), generator.integers(0, 4, 300)
    parts = zero_one(predicted, labels)

    for image, (votes, label) in enumerate(zip(predicted.T, labels, strict=True)):
        counts = np.bincount(votes, minlength=4)
        choices = np.flatnonzero(counts == counts.max())
        departing = np.mean([(votes != main).mean() for main in choices])
        helped = [-((votes != main) & (votes == label)).mean() for main in choices if main != label]
        hurt = [(votes != main).mean() for main in choices if main == label]
        assert parts.bias[image] == pytest.approx(np.mean(choices != label))
        assert parts.variance[image] == pytest.approx(departing)
        assert parts.net_variance[image] == pytest.approx(sum(helped + hurt) / len(choices), abs=1e-12)

    turned = zero_one(3 - predicted, 3 - labels)
    assert turned.bias.tolist() == parts.bias.tolist()
    pair = zero_one(predicted[:2], labels)
    np.testing.assert_allclose(pair.bias, pair.error)


def test_figures_are_means_of_classes():
    """A class with many test images weighs no more than one with few."""
    probabilities, _ = random_models(n_images=8)
    labels = np.array([0, 0, 0, 0, 1, 2, 3, 3])
    analysis = analyse(probabilities, probabilities.argmax(axis=2), labels, COUNTS)

    error = analysis.parts["squared"].error
    assert analysis.figures["many", "squared", "error"] == pytest.approx((error[:4].mean() + error[4]) / 2)
    assert analysis.figures["few", "squared", "error"] == pytest.approx(error[6:].mean())
    assert analysis.without["few", "squared", "error"].shape == (7,)
    without_first = analyse(probabilities[1:], probabilities.argmax(axis=2)[1:], labels, COUNTS)
    assert analysis.without["few", "zero_one", "bias"][0] == without_first.figures["few", "zero_one", "bias"]


def test_signs_are_confirmed_contradicted_or_open():
    """A clear gain, a clear loss, none beyond the draws' noise, and "comparable" within a tenth."""
    probabilities, labels = random_models(n_images=400)
    truth = np.eye(4)[labels]

    def of(vectors):
        return analyse(vectors, vectors.argmax(axis=2), labels, COUNTS)

    plain, closer = of(probabilities), of(0.5 * probabilities + 0.5 * truth)
    other = of(random_models(n_images=400, seed=1)[0])
    bias, variance = ("few", "squared", "bias"), ("few", "squared", "variance")

    assert sign_of(closer, plain, bias, "better")[1] == "confirmed"
    assert sign_of(plain, closer, bias, "better")[1] == "contradicted"
    assert sign_of(plain, closer, variance, "worse")[1] == "confirmed"
    assert sign_of(plain, plain, bias, "better")[1] == "open"
    assert sign_of(other, plain, variance, "better")[1] == "open"
    assert sign_of(plain, plain, bias, "comparable") == ("+0.0000 ± 0.0000", "confirmed")
    assert sign_of(closer, plain, bias, "comparable")[1] == "contradicted"
    assert sign_of(other, plain, variance, "comparable")[1] == "open"  # which of the two is beyond the draws' noise
    assert sign_of(closer, plain, bias, None)[1] == ""


def test_only_methods_of_the_talks_table_have_expected_signs():
    """RIDE as published, whatever its number of experts; not ours, which share its network."""
    known = {name for name in RECIPES if any(name.startswith(start) for start in EXPECTED)}

    assert {name for name in known if name.startswith("ride")} == {
        "ride-cifar100", "ride-cifar100-50", "ride-cifar10", "ride-cifar10-50",
        "ride-2-cifar100", "ride-4-cifar100", "ride-6-cifar100",
    }  # fmt: skip
    assert {name.rpartition("-cifar100")[0] for name in known if name.endswith("-cifar100")} == {
        "ldam-drw", "crt", "tau-norm", "ride", "ride-2", "ride-4", "ride-6"
    }  # fmt: skip


def test_standard_errors_are_those_of_the_mean_of_draws():
    """For a quantity that is a mean over the draws the jackknife gives the textbook formula, paired."""
    (first, labels), (second, _) = random_models(), random_models(seed=2)
    ours, theirs = (analyse(vectors, vectors.argmax(axis=2), labels, COUNTS) for vectors in (second, first))
    each = [analyse(vectors, vectors.argmax(axis=2), labels, COUNTS) for vectors in (second[:2], first[:2])]

    def error_of(vectors):
        truth = np.eye(4)[labels]
        per_image = ((vectors - truth) ** 2).sum(axis=2)  # (M, N)
        return np.array([per_image[:, labels == c].mean(axis=1) for c in (0, 1)]).mean(axis=0)

    differences = error_of(second) - error_of(first)
    shown = sign_of(ours, theirs, ("many", "squared", "error"), None)[0]
    assert shown == f"{differences.mean():+.4f} ± {differences.std(ddof=1) / np.sqrt(7):.4f}"
    assert "±" not in sign_of(*each, ("many", "squared", "error"), None)[0]


def test_an_analysis_has_tables_and_a_plot(analysed):
    """Every method, split and class; the splits are those of the larger profile; the identity holds in the file."""
    with (analysed / "bias_variance.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["method"] for row in rows} == {"ce-cifar100", "ldam-drw-cifar100"}
    assert {row["classes"] for row in rows} == {
        "all", "many", "medium", "few", "class 0", "class 1", "class 2", "class 3"
    }  # fmt: skip
    known = [row for row in rows if row["error"]]
    assert {row["classes"] for row in rows} - {row["classes"] for row in known} == {"few"}  # 120, 75, 47, 30 images
    for row in known:
        assert float(row["error"]) == pytest.approx(float(row["bias"]) + float(row["net_variance"]), abs=1e-6)

    text = (analysed / "bias_variance.md").read_text()
    assert "Of the 10 signs of the talk's table 0 are confirmed, 0 contradicted and 10 open." in text
    assert "Two models have no majority: their 0/1 bias is their error." in text
    assert (analysed / "bias_variance.png").read_bytes().startswith(b"\x89PNG")


def test_the_tables_are_of_the_stored_predictions(analysed, arguments, monkeypatch, tmp_path):
    """Every figure, and every sign beside cross-entropy, computed anew from three draws with known predictions."""
    out = shutil.copytree(analysed, tmp_path / "analysis")
    generator, labels = np.random.default_rng(0), np.repeat(np.arange(4), 5)
    noise, analyses = {"ce-cifar100": 0.3, "ldam-drw-cifar100": 0.6}, {}
    for method, share in noise.items():
        run = shutil.copytree(out / f"{method}-draw01", out / f"{method}-draw02")
        results = json.loads((run / "results.json").read_text())
        results["recipe"] |= {"seed": 2, "subset_seed": 2}
        (run / "results.json").write_text(json.dumps(results))
        known = np.eye(4)[labels] * (1 - share) + share * generator.dirichlet(np.ones(4) * 0.3, (3, 20))
        known = known.astype(np.float16)
        for draw, probabilities in enumerate(known):
            np.savez(
                out / f"{method}-draw0{draw}" / "predictions.npz", probabilities=probabilities,
                predicted=probabilities.argmax(axis=1).astype(np.uint16), labels=labels.astype(np.uint16),
            )  # fmt: skip
        analyses[method] = analyse(known.astype(np.float32), known.argmax(axis=2), labels, [120, 75, 47, 30])
    monkeypatch.setattr(training.runs, "train", None)  # none is left to train
    monkeypatch.setattr("training.bias_variance.EXPECTED", dict(reversed(EXPECTED.items())))  # RIDE's signs first

    assert main([*arguments, "--out", str(out), "--draws", "3"]) == 0
    text = (out / "bias_variance.md").read_text()
    head, zero_one_rows, squared_rows, signs = text.split("\n## ")
    assert "over 3 draws" in head
    assert "Two models" not in head
    parts = ("error", "bias", "variance", "net_variance")
    with (out / "bias_variance.csv").open() as file:
        rows = {(row["method"], row["decomposition"], row["classes"]): row for row in csv.DictReader(file)}
    for method, analysis in analyses.items():
        for kind, table in (("zero_one", zero_one_rows), ("squared", squared_rows)):
            for scope in ("all", "many", "medium"):
                figures = [analysis.figures[scope, kind, part] for part in parts]
                assert f"| {method} | {scope} | {' | '.join(f'{figure:.4f}' for figure in figures)} |" in table
                assert [float(rows[method, kind, scope][part]) for part in parts] == pytest.approx(figures)
            for label in range(4):
                each = [getattr(analysis.parts[kind], part)[labels == label].mean() for part in parts]
                assert [float(rows[method, kind, f"class {label}"][part]) for part in parts] == pytest.approx(each)
    verdicts = {"confirmed": 0, "contradicted": 0, "open": 5}  # no class is few, whose five signs are open
    reference, ours = analyses.values()
    for kind, title, wanted in (
        ("zero_one", "0/1 (Domingos)", {"error": "worse", "bias": "comparable", "variance": "worse"}),
        ("squared", "squared, probabilities", {"bias": "comparable", "variance": "worse"}),
    ):
        for part, expected in wanted.items():
            shown, verdict = sign_of(ours, reference, ("many", kind, part), expected)
            assert f"| ldam-drw-cifar100 | many | {part} | {title} | {shown} | {expected} | {verdict} |" in signs
            verdicts[verdict] += 1
    assert min(verdicts.values()) > 0
    assert f"{verdicts['confirmed']} are confirmed, {verdicts['contradicted']} contradicted (" in signs
    assert f" and {verdicts['open']} open." in signs


def test_draws_differ_and_methods_share_them(analysed):
    """Subset seed and seed move with the draw; routers are not trained."""
    from training.runs import read_results

    recipes = {run.name: read_results(run)["recipe"] for run in analysed.glob("*-draw*")}
    assert {name: (recipe.subset_seed, recipe.seed, recipe.n_max) for name, recipe in recipes.items()} == {
        f"{method}-draw0{draw}": (draw, draw, 12) for method in ("ce-cifar100", "ldam-drw-cifar100") for draw in (0, 1)
    }
    assert all(recipe.router_epochs == 0 for recipe in recipes.values())


def test_an_interrupted_analysis_goes_on(analysed, arguments, monkeypatch):
    """A run without its predictions is evaluated again, and none is trained."""

    def no_training(recipe, run):
        raise AssertionError(f"{run} is trained again")

    monkeypatch.setattr(training.runs, "train", no_training)
    text = (analysed / "bias_variance.md").read_text()
    lost = analysed / "ce-cifar100-draw01" / "predictions.npz"
    lost.unlink()

    assert main([*arguments, "--out", str(analysed)]) == 0
    assert lost.exists()
    assert (analysed / "bias_variance.md").read_text() == text


def test_other_draws_in_the_same_directory_are_refused(analysed, arguments, capsys):
    """Another number of images makes other training sets."""
    assert main([*arguments, "--out", str(analysed), "--n-max", "10"]) == 2
    assert "made with the settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["ce-cifar100", "--set", "profile=natural"], "profile=natural: there is one training set only"),
        (["ce-cifar100", "--n-max", "3"], "leaves the rarest class without an image"),
        (["ce-cifar100", "--split-n-max", "3"], "leaves the rarest class without an image"),
        (["ce-cifar100", "ride-distilled-cifar100"], "ride-distilled-cifar100: learns from runs/ride-6-cifar100"),
        (["ce-cifar100", "ride-own"], "ride-own: is on other data than ce-cifar100"),
    ],
)
def test_recipes_without_draws_are_refused(command, message, tmp_path, capsys):
    """Before anything is trained."""
    assert main(["bias-variance", *command, "--out", str(tmp_path / "analysis")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "analysis").exists()


def test_a_set_without_test_images_of_its_own_is_refused(folder, tmp_path, capsys):
    """Before anything is trained; what is drawn for testing would differ from draw to draw."""
    command = ["bias-variance", "ce-cifar100", "--data", str(folder), "--out", str(tmp_path / "analysis")]
    assert main(command) == 2
    message = f"ride-train: {folder}: has no test images of its own, which all draws need; put some in test/\n"
    assert capsys.readouterr().err == message
    assert main([*command[:3], str(tmp_path / "nowhere"), *command[4:]]) == 2
    assert "nowhere: no such directory" in capsys.readouterr().err
    assert not (tmp_path / "analysis").exists()


def test_fewer_than_two_complete_draws_give_no_table(arguments, monkeypatch, tmp_path, capsys):
    """The failures say why; the exit status is 1."""

    def broken(recipe, run):
        raise RuntimeError("no disk")

    monkeypatch.setattr(training.runs, "train", broken)
    assert main([*arguments, "--out", str(tmp_path / "analysis")]) == 1
    printed = capsys.readouterr()
    assert "0 of 2 draws are complete" in printed.out
    assert printed.err.count("failed: RuntimeError: no disk") == 4


def test_smoke_means_three_small_draws(balanced, monkeypatch, tmp_path, capsys):
    """Unless options say otherwise."""
    seen = []
    monkeypatch.setattr(training.runs, "train", lambda recipe, run: seen.append(recipe) or 1 / 0)

    assert main(["bias-variance", "ce-cifar100", "--smoke", "--data", str(balanced), "--out", str(tmp_path / "a")]) == 1
    assert [(recipe.n_max, recipe.epochs, recipe.subset_seed) for recipe in seen] == [
        (30, 2, 0),
        (30, 2, 1),
        (30, 2, 2),
    ]
    capsys.readouterr()
