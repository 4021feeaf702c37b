"""The router report: hand-worked routing, and a whole report."""

import csv
import dataclasses
import shutil

import numpy as np
import pytest
from PIL import Image

from training import router_report
from training.__main__ import main
from training.checkpoint import checkpoints_of, save_checkpoint
from training.data.sets import load_data
from training.evaluate import Predictions, by_class, macs_of, prefix_right, route, summarise
from training.methods.method import build_model
from training.recipes import RECIPES
from training.router_report import oracle
from training.thresholds import frontier
from training.train import trained_model


def test_the_oracle_takes_the_fewest_experts_that_are_right():
    """And one where no prefix is right."""
    right = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [1, 1, 1, 0]], bool)
    assert oracle(right).tolist() == [1, 2, 3, 1]


def test_a_prefix_is_judged_by_its_mean_logits():
    """Expert two outvotes expert one where it is surer."""
    logits = np.array([[[1.0, 0.0], [1.0, 0.0]], [[0.0, 3.0], [0.0, 0.5]]])
    predictions = Predictions(logits, np.empty((1, 2), np.float32), np.array([1, 0]))
    assert prefix_right(predictions).tolist() == [[False, True], [True, True]]


def test_figures_per_class():
    """Of a model with two experts, one class without test images."""
    logits = np.array([[[9.0, 0.0, 0.0]] * 3, [[0.0, 99.0, 0.0]] * 3], np.float32)
    predictions = Predictions(logits, np.array([[0.1, 0.8, 0.2]], np.float32), np.array([0, 1, 1]))

    assert by_class(predictions, 3, [0.5]) == {
        "accuracy": [0.0, 100.0, None], "routed_accuracy": [100.0, 50.0, None], "mean_experts": [1.0, 1.5, None]
    }  # fmt: skip


@pytest.fixture(scope="module")
def report(swept, tmp_path_factory):
    """`ride-train report` of a small run with three experts."""
    out = tmp_path_factory.mktemp("reports") / "report"
    assert main(["report", str(swept / "ride-own-seed0"), "--out", str(out), "--max-mean-experts", "1.9"]) == 0
    return out


def rows_of(file):
    """A CSV file's rows."""
    with file.open() as stream:
        return list(csv.DictReader(stream))


def test_a_report_agrees_with_the_run(report, swept):
    """At threshold 0.5 and with every number of experts: the figures of results.json."""
    from training.runs import read_results

    results = read_results(swept / "ride-own-seed0")
    rows = {row["name"]: row for row in rows_of(report / "curve.csv")}
    for name, expected in zip(("one expert", "2 experts", "3 experts"), results["experts"], strict=True):
        assert float(rows[name]["all"]) == expected["all"] == float(rows[name]["random_all"])
        assert int(rows[name]["macs"]) == expected["macs"]
    routed = rows["routed, thresholds 0.5 as published"]
    assert float(routed["all"]) == results["routed"]["all"]
    assert int(routed["macs"]) == results["routed"]["macs"]
    one, two = (prefix["macs"] for prefix in results["experts"][:2])
    assert [float(row["mean_experts"]) for row in rows.values()] == [
        pytest.approx((float(row["macs"]) - one) / (two - one) + 1, abs=0.05) for row in rows.values()
    ]


def test_random_exits_lie_between_the_prefixes(report):
    """At the same mean number of experts, on the line between two neighbouring numbers of experts."""
    rows = rows_of(report / "curve.csv")
    prefixes = [float(row["random_all"]) for row in rows[:3]]
    for row in rows:
        expected = np.interp(float(row["mean_experts"]), [1, 2, 3], prefixes)
        assert float(row["random_all"]) == pytest.approx(expected, abs=0.01)


def test_the_oracle_is_never_worse_than_any_prefix(report):
    """It is right wherever any number of experts is."""
    rows = {row["name"]: row for row in rows_of(report / "curve.csv")}
    assert all(
        float(rows["oracle"]["all"]) >= float(rows[name]["all"]) for name in ("one expert", "3 experts", "routed")
    )


def test_shares_per_class_add_up(report):
    """To one, and to the mean number of experts."""
    rows = rows_of(report / "per_class.csv")
    assert [row["class"] for row in rows] == ["class 0", "class 1", "class 2", "class 3"]
    assert [row["training_images"] for row in rows] == ["26", "15", "8", "4"]
    for row in rows:
        shares = [float(row[f"share_{count}"]) for count in (1, 2, 3)]
        assert sum(shares) == pytest.approx(1, abs=1e-4)
        assert float(row["mean_experts"]) == pytest.approx(np.dot(shares, [1, 2, 3]), abs=1e-3)


def test_a_report_is_text_and_pictures(report):
    """What was asked for is looked at; the legend says what the words mean."""
    text = (report / "report.md").read_text()
    assert "Scores are the\nsigmoids of decisions divided by" in text
    assert "at most 1.9 experts on held-out images" in text
    assert "Oracle: each image gets the fewest experts\nwhose mean logits are right" in text
    for plot in ("shares.png", "experts.png", "curve.png"):
        assert (report / plot).read_bytes().startswith(b"\x89PNG")


SPLITS_OF = {"a lot": "many", "some": "medium", "hardly any": "few"}


def write_run(run, recipe):
    """A run of three classes as a finished training leaves it, with random weights; its data."""
    data = load_data(recipe)
    info = {
        "recipe": recipe.to_dict(), "classes": data.classes, "class_counts": data.counts, "mean": (0.5,) * 3,
        "std": (0.2,) * 3, "commit": "", "metrics": {}, "images_digest": data.digest,
    }  # fmt: skip
    for stage in ("experts", "routers"):
        save_checkpoint(run, stage, 1, build_model(recipe, 3, (0.5,) * 3, (0.2,) * 3), None, info)
    return data


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """A run with a class in each split, as a finished training leaves it, with random weights."""
    root, run = tmp_path_factory.mktemp("splits"), tmp_path_factory.mktemp("runs") / "untrained"
    generator = np.random.default_rng(0)
    for name, count in {"a lot": 280, "some": 84, "hardly any": 24}.items():
        (root / name).mkdir()
        for index in range(count):
            image = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            image.save(root / name / f"{index}.png")
    shares = {"holdout_share": 0.4, "test_share": 1 / 6}
    recipe = dataclasses.replace(RECIPES["ride-own"], data=str(root), image_size=8, epochs=1, router_epochs=1, **shares)
    return run, write_run(run, recipe)


def knowing(labels, seed):
    """Predictions of three experts of which later ones know more, and of routers that know a little."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, 1, (3, len(labels), 3)).astype(np.float32)
    logits[:, np.arange(len(labels)), labels] += np.array([[0.3], [1.0], [2.0]], np.float32)
    wrong = np.cumsum(logits, axis=0).argmax(axis=2)[:2] != labels
    return Predictions(logits, (generator.random(wrong.shape) * 0.7 + 0.3 * wrong).astype(np.float32), labels)


def test_a_report_is_of_test_images_at_thresholds_of_held_out_ones(untrained, tmp_path, monkeypatch):
    """Every figure, computed anew: the curve, the point that was asked for, the classes, and what is said of splits."""
    run, data = untrained
    heldout, test = (knowing(images.labels.numpy(), seed) for seed, images in enumerate((data.heldout, data.test), 2))
    made = {len(data.heldout): heldout, len(data.test): test}
    monkeypatch.setattr("training.router_report.predict", lambda model, images: made[len(images)])
    monkeypatch.setattr("training.router_report.fit_temperature", lambda model, images: len(images))
    text = router_report.report(run, tmp_path, max_mean_experts=2.2)
    rows = rows_of(tmp_path / "curve.csv")

    macs = macs_of(trained_model(run)[1], 8)
    candidates = frontier(heldout, data.counts, macs)

    def figures(predictions, thresholds):
        return summarise(predictions, data.counts, macs, thresholds)["routed"]

    def thresholds_of(row):
        return tuple(map(float, row["thresholds"].split()))

    prefixes = summarise(test, data.counts, macs, [1.0, 1.0])["experts"]
    curve = [row for row in rows if row["name"] == "routed"]
    published, chosen = (row for row in rows if row["name"].startswith("routed, "))
    assert sorted(map(thresholds_of, curve)) == sorted(candidates)
    assert [int(row["macs"]) for row in curve] == sorted(int(row["macs"]) for row in curve)
    for row in (published, chosen, *curve):
        expected = figures(test, thresholds_of(row))
        assert int(row["macs"]) == expected["macs"]
        for scope in ("all", "many", "medium", "few"):
            assert float(row[scope]) == expected[scope]
            of_prefixes = [prefix[scope] for prefix in prefixes]
            random = np.interp(float(row["mean_experts"]), [1, 2, 3], of_prefixes)
            assert float(row[f"random_{scope}"]) == pytest.approx(random, abs=0.01)
    assert thresholds_of(published) == (0.5, 0.5)
    affordable = [each for each in candidates if route(heldout.router_scores, each).mean() <= 2.2]
    assert len(affordable) < len(candidates)
    best = max(figures(heldout, each)["all"] for each in affordable)
    assert thresholds_of(chosen) in affordable
    assert figures(heldout, thresholds_of(chosen))["all"] == best
    assert len({figures(test, each)["all"] for each in affordable}) > 5

    used = route(test.router_scores, thresholds_of(chosen))
    right, fewest = prefix_right(test), oracle(prefix_right(test))
    images = np.arange(len(used))
    for label, row in enumerate(rows_of(tmp_path / "per_class.csv")):
        mine = test.labels == label
        assert (row["class"], int(row["training_images"])) == (data.classes[label], data.counts[label])
        assert (row["split"], int(row["test_images"])) == (SPLITS_OF[row["class"]], mine.sum())
        for name, values in {
            "accuracy": 100 * right[2], "routed_accuracy": 100 * right[used - 1, images],
            "oracle_accuracy": 100 * right[fewest - 1, images], "mean_experts": used, "oracle_mean_experts": fewest,
            "share_1": used == 1, "share_2": used == 2, "share_3": used == 3,
        }.items():  # fmt: skip
            assert float(row[name]) == pytest.approx(values[mine].mean(), abs=1e-4), name
    of_split = {split: used[test.labels == data.classes.index(name)] for name, split in SPLITS_OF.items()}
    assert 0 < (of_split["few"] > 1).mean() < 1
    assert f"More than one expert: {(of_split['few'] > 1).mean():.1%} of the few-shot images; " in text
    assert f"one expert only: {(of_split['many'] == 1).mean():.1%} of the many-shot images" in " ".join(text.split())
    assert f"decisions divided by {len(data.heldout):.2f}" in text

    def line(first, row):
        figures = [float(row[name]) for name in ("all", "many", "medium", "few", "random_all")]
        cost = [f"{float(row['mean_experts']):.2f}", f"{int(row['macs']) / 1e6:.1f}"]
        return f"| {' | '.join([first, *cost, *(f'{figure:.2f}' for figure in figures)])} |"

    lines = text.splitlines()
    assert all(line(row["name"], row) in lines for row in rows if row["name"] != "routed")
    of_curve = [line(", ".join(f"{value:.3f}" for value in thresholds_of(row)), row) for row in curve]
    shown = [each for each in lines if each in of_curve]
    assert (shown[0], shown[-1]) == (of_curve[0], of_curve[-1])
    assert 8 <= len(shown) <= 12
    for name, experts in (("router", used), ("oracle", fewest)):
        for scope, label in (("all", None), *((split, data.classes.index(name)) for name, split in SPLITS_OF.items())):
            mine = experts if label is None else experts[test.labels == label]
            shares = " | ".join(f"{(mine == count).mean():.1%}" for count in (1, 2, 3))
            assert f"| {name} | {scope} | {mine.mean():.2f} | {shares} |" in lines


def test_a_report_follows_images_that_have_moved(tmp_path):
    """Lists and the root of their paths, each of which may lie elsewhere now; the rest of the recipe may not change."""
    lists, root, run = (tmp_path / name for name in ("lists", "root", "run"))
    lists.mkdir()
    generator, listed = np.random.default_rng(0), {"train": [], "test": []}
    for name, count in {"train": 120, "test": 30}.items():
        for index in range(count):
            file = root / name / f"{index}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file)
            listed[name].append(f"{name}/{index}.png {index % 3}\n")
        (lists / f"{name}.txt").write_text("".join(listed[name]))
    recipe = dataclasses.replace(
        RECIPES["ride-own"], data=str(lists), image_root=str(root), image_size=8, epochs=1, router_epochs=1
    )
    write_run(run, recipe)
    moved = [str(path.rename(tmp_path / f"{path.name}-moved")) for path in (lists, root)]
    arguments = ["report", str(run), "--data", moved[0], "--set"]

    assert main([*arguments, f"image_root={moved[1]}"]) == 0
    assert (run / "report" / "report.md").exists()
    assert main([*arguments, "subset_seed=1"]) == 2


def test_a_report_on_other_images_is_refused(untrained, tmp_path, capsys):
    """What was trained on would be held out, or tested."""
    run = shutil.copytree(untrained[0], tmp_path / "run")
    folder = shutil.copytree(checkpoints_of(run)["routers"].recipe.data, tmp_path / "images")
    (folder / "some" / "0.png").rename(folder / "some" / "zzz.png")
    for file in run.glob("checkpoints/*/checkpoint.json"):
        file.write_text(file.read_text().replace(checkpoints_of(untrained[0])["routers"].recipe.data, str(folder)))

    assert main(["report", str(run), "--out", str(tmp_path / "report")]) == 2
    assert "as many, but some have changed or go by other names" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("run", "options", "message"),
    [
        ("ce-cifar100-seed0", [], "has one expert, which every image uses; there is nothing to route"),
        ("ride-own-seed0", ["--max-mean-experts", "0.5"], "every image uses one expert at least"),
        ("ride-own-seed0", ["--max-mean-experts", "nan"], "every image uses one expert at least"),
        ("nothing", [], "no checkpoints there"),
    ],
)
def test_runs_without_routers_are_refused(swept, run, options, message, tmp_path, capsys):
    """With the reason, and exit status 2."""
    assert main(["report", str(swept / run), "--out", str(tmp_path / "report"), *options]) == 2
    assert message in capsys.readouterr().err
