"""The router report: hand-worked routing, and a whole report."""

import csv

import numpy as np
import pytest

from training import router_report
from training.__main__ import main
from training.data.sets import load_data
from training.evaluate import (
    Predictions,
    accuracy_by_split,
    by_class,
    macs_of,
    mean_logits,
    predict,
    prefix_right,
    route,
)
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
    assert [float(row["mean_experts"]) for row in rows.values()] == [
        pytest.approx((float(row["macs"]) - results["experts"][0]["macs"]) / 25_600_000 * 4 + 1, abs=0.05)
        for row in rows.values()
    ]


def random_answers(_model, images):
    """Predictions for these images that agree about nothing: routers and experts of one epoch do about everything."""
    generator = np.random.default_rng(len(images))
    logits = generator.normal(size=(3, len(images), 4)).astype(np.float32)
    return Predictions(logits, generator.random((2, len(images)), np.float32), images.labels.numpy())


@pytest.fixture(scope="module")
def varied(swept, tmp_path_factory):
    """The report of that run, had it answered so."""
    out = tmp_path_factory.mktemp("reports") / "varied"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(router_report, "predict", random_answers)
        router_report.report(swept / "ride-own-seed0", out, 1.9)
    return out


@pytest.fixture(scope="module")
def world(swept):
    """Those answers on held-out and on test images, and what the model costs."""
    checkpoint, model = trained_model(swept / "ride-own-seed0")
    data = load_data(checkpoint.recipe)
    return random_answers(model, data.heldout), random_answers(model, data.test), data.counts, macs_of(model, 16)


def at(predictions, counts, thresholds):
    """Experts of each image, whether it is right, accuracy over the classes."""
    used = route(predictions.router_scores, thresholds)
    right = mean_logits(predictions.expert_logits, used).argmax(axis=1) == predictions.labels
    return used, right, accuracy_by_split(right, predictions.labels, counts)["all"]


def chosen_thresholds(report):
    """Those that the report looks at closely."""
    (row,) = [row for row in rows_of(report / "curve.csv") if row["name"].startswith("routed, at most")]
    return tuple(float(value) for value in row["thresholds"].split())


def test_thresholds_are_chosen_on_held_out_images(varied, world):
    """The most accurate there, of those that keep the budget there."""
    heldout, _, counts, macs = world
    chosen, candidates = chosen_thresholds(varied), frontier(heldout, counts, macs)
    kept = [each for each in candidates if at(heldout, counts, each)[0].mean() <= 1.9]
    assert chosen in kept
    assert at(heldout, counts, chosen)[2] == max(at(heldout, counts, each)[2] for each in kept)
    curve = [row for row in rows_of(varied / "curve.csv") if row["name"] == "routed"]
    assert {tuple(float(value) for value in row["thresholds"].split()) for row in curve} == candidates


def test_figures_per_class_are_of_the_chosen_thresholds(varied, world):
    """Counted by hand from the test images' predictions."""
    _, test, counts, _ = world
    used, right, _ = at(test, counts, chosen_thresholds(varied))
    everyone = mean_logits(test.expert_logits, np.full(len(test.labels), 3)).argmax(axis=1) == test.labels
    best = oracle(prefix_right(test))
    for label, row in enumerate(rows_of(varied / "per_class.csv")):
        mine = test.labels == label
        assert int(row["test_images"]) == mine.sum()
        for column, values in (
            ("accuracy", 100 * everyone), ("routed_accuracy", 100 * right), ("mean_experts", used),
            ("oracle_mean_experts", best), ("share_1", used == 1), ("share_3", used == 3),
        ):  # fmt: skip
            assert float(row[column]) == pytest.approx(values[mine].mean(), abs=1e-4)


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


def test_a_model_is_judged_as_it_will_be_used(swept):
    """In evaluation mode, by the statistics that it has learnt; the mode before comes back."""
    checkpoint, model = trained_model(swept / "ride-own-seed0")
    images = load_data(checkpoint.recipe).test
    expected = predict(model, images).expert_logits
    found = predict(model.train(), images).expert_logits
    assert model.training
    np.testing.assert_array_equal(found, expected)


def test_a_report_is_text_and_pictures(report):
    """What was asked for is looked at; the legend says what the words mean."""
    text = (report / "report.md").read_text()
    assert "Scores are the\nsigmoids of decisions divided by" in text
    assert "at most 1.9 experts on held-out images" in text
    assert "Oracle: each image gets the fewest experts\nwhose mean logits are right" in text
    for plot in ("shares.png", "experts.png", "curve.png"):
        assert (report / plot).read_bytes().startswith(b"\x89PNG")


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
