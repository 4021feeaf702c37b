"""
Error over many draws of the training set, split into bias and variance.

Source: RIDE, arXiv:2010.01809, which has the 0/1 decomposition of Domingos ("A Unified Bias-Variance Decomposition",
2000) over 20 long-tailed draws of CIFAR-100; no code was published. The squared decomposition on probability vectors,
which the authors' talk has, stands beside it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from training.data.longtail import SCOPES, class_counts, split_of
from training.data.sets import load_data
from training.data.sources import open_set
from training.distributed import best_device
from training.evaluate import mean_by_class, mean_by_split, predict
from training.files import write_atomically
from training.plots import plot_bias_variance
from training.recipe import Recipe, RecipeError
from training.runs import RunsError, refuse_equal_names, train_all
from training.tables import Cell, markdown, number, write_csv
from training.train import trained_model

DRAWS, N_MAX = 20, 300
SMOKE_DRAWS, SMOKE_N_MAX = 3, 30
FEWEST_DRAWS = 2
DECOMPOSITIONS = ("zero_one", "squared")
TITLES = {"zero_one": "0/1 (Domingos)", "squared": "squared, probabilities"}
PARTS = ("error", "bias", "variance", "net_variance")

Key = tuple[str, str, str]

# What the talk's table says of a method in comparison with cross-entropy, for many and for few.
Sign = Literal["better", "comparable", "worse"]
QUANTITIES = tuple((scope, part) for scope in ("many", "few") for part in ("error", "bias", "variance"))
REBALANCED: tuple[Sign, ...] = ("worse", "comparable", "worse", "better", "better", "worse")
EXPECTED: dict[str, tuple[Sign, ...]] = {  # by how the recipe's name begins
    "ldam-drw-": REBALANCED, "crt-": REBALANCED, "tau-norm-": REBALANCED,
    **{f"ride-{which}": ("better",) * 6 for which in ("cifar", "2-cifar", "4-cifar", "6-cifar")},
}  # fmt: skip
COMPARABLE_WITHIN = 0.1  # of the first method's value
STANDARD_ERRORS = 2.0
SIGNS_LEGEND = """Less is better in every part. ± is the standard error (jackknife over draws). Expected: RIDE's talk;
open: less than two standard errors from 0, or too few draws; comparable: within a tenth of the other's value, and
open less than two standard errors from that."""


@dataclass(frozen=True)
class Parts:
    """
    A decomposition for N test images over M models; shares, not percent.

    Attributes:
        error, bias, variance: (N,).
        net_variance: (N,), what the variance adds to the error: error = bias + net_variance, exactly.
    """

    error: np.ndarray
    bias: np.ndarray
    variance: np.ndarray
    net_variance: np.ndarray


def zero_one(predicted: np.ndarray, labels: np.ndarray) -> Parts:
    """
    The 0/1 loss: bias says whether the main prediction is wrong, variance how often a model departs from it.

    The main prediction is the most frequent one. error = bias + κ·variance, with κ = 1 where the main prediction is
    right and κ = −P(model is right | it departs) where it is wrong; κ·variance is the net variance. Where several
    classes are the most frequent, each is the main prediction with the same probability, and the parts are the
    expected ones: always taking the lowest would let the common classes, which come first, win. With two models bias
    and error are the same.

    Args:
        predicted: (M, N), classes.
        labels: (N,).

    Source: Domingos, 2000, theorem 2.
    """
    n_classes = int(max(predicted.max(), labels.max())) + 1
    images = np.arange(predicted.shape[1])
    votes = np.zeros((predicted.shape[1], n_classes), np.int64)
    for model in predicted:
        votes[images, model] += 1
    most = votes.max(axis=1)
    main = votes == most[:, None]  # (N, C)
    right = main[images, labels] / main.sum(axis=1)  # probability that the main prediction is
    variance = 1 - most / len(predicted)
    departs_to_right = (predicted == labels).mean(axis=0)  # from a main prediction that is wrong
    return Parts(
        error=(predicted != labels).mean(axis=0),
        bias=1 - right,
        variance=variance,
        net_variance=right * variance - (1 - right) * departs_to_right,
    )


def squared(probabilities: np.ndarray, labels: np.ndarray) -> Parts:
    """
    The squared distance of probability vectors to the true one-hot vector.

    bias = ‖mean − one-hot‖², of which variance / M is expected from the mean of M models alone; variance =
    Σ ‖vector − mean‖² / (M − 1), unbiased. The net variance has M in place of M − 1: with it the identity is exact.

    Args:
        probabilities: (M, N, C); M at least 2.
        labels: (N,).
    """
    n_models, n_images, n_classes = probabilities.shape
    truth = np.zeros((n_images, n_classes))
    truth[np.arange(n_images), labels] = 1
    mean = probabilities.mean(axis=0, dtype=np.float64)
    spread = error = np.zeros(n_images)
    for model in probabilities:
        spread = spread + ((model - mean) ** 2).sum(axis=1)
        error = error + ((model - truth) ** 2).sum(axis=1)
    return Parts(
        error=error / n_models, bias=((mean - truth) ** 2).sum(axis=1),
        variance=spread / (n_models - 1), net_variance=spread / n_models,
    )  # fmt: skip


@dataclass(frozen=True)
class Analysis:
    """
    One method over its draws. Keys are (scope, decomposition, part): ("few", "zero_one", "bias").

    Attributes:
        parts: of every image, by decomposition.
        figures: means over the classes of a split, or over all; None: a split without classes.
        without: figures when one draw after the other is left out, (M,); empty with two draws.
    """

    parts: dict[str, Parts]
    figures: dict[Key, float | None]
    without: dict[Key, np.ndarray]


def analyse(probabilities: np.ndarray, predicted: np.ndarray, labels: np.ndarray, counts: Sequence[int]) -> Analysis:
    """
    Both decompositions, by split and over all classes, and their figures without each draw (for the jackknife).

    Args:
        probabilities: (M, N, C).
        predicted: (M, N).
        labels: (N,).
        counts: (C,), training images per class that decide the splits.
    """
    n_models = len(probabilities)

    def over(models: np.ndarray) -> tuple[dict[str, Parts], dict[Key, float | None]]:
        parts = {
            "zero_one": zero_one(predicted[models], labels), "squared": squared(probabilities[models], labels)
        }  # fmt: skip
        figures = {
            (scope, kind, name): value
            for kind in DECOMPOSITIONS
            for name in PARTS
            for scope, value in mean_by_split(getattr(parts[kind], name), labels, counts).items()
        }
        return parts, figures

    everyone = np.arange(n_models)
    parts, figures = over(everyone)
    without: dict[Key, np.ndarray] = {}
    if n_models > FEWEST_DRAWS:
        each = [over(np.delete(everyone, draw))[1] for draw in everyone]
        without = {key: np.array([one[key] for one in each]) for key, value in figures.items() if value is not None}
    return Analysis(parts, figures, without)


def sign_of(ours: Analysis, reference: Analysis, key: Key, expected: Sign | None) -> tuple[str, str]:
    """
    How a method stands to the reference in one quantity, all of which are better when lower, and the verdict.

    Returns:
        The difference with its standard error (jackknife over the draws, which both methods share), and "confirmed",
        "contradicted" or "open": less than two standard errors from where it would turn. That is 0, for "comparable" a
        tenth of the reference's value. "" where nothing is expected.
    """
    mine, theirs = ours.figures[key], reference.figures[key]
    if mine is None or theirs is None:
        return number(None), "open" if expected else ""
    difference = mine - theirs
    if key not in ours.without:
        return f"{difference:+.4f}", "open" if expected else ""
    leaving_out = ours.without[key] - reference.without[key]
    n_draws = len(leaving_out)
    error = float(np.sqrt((n_draws - 1) / n_draws * ((leaving_out - leaving_out.mean()) ** 2).sum()))
    shown = f"{difference:+.4f} ± {error:.4f}"
    if expected is None:
        return shown, ""
    if expected == "comparable":
        room = COMPARABLE_WITHIN * abs(theirs) - abs(difference)
        if abs(room) < STANDARD_ERRORS * error:
            return shown, "open"
        return shown, "confirmed" if room >= 0 else "contradicted"
    if abs(difference) < STANDARD_ERRORS * error or difference == 0:
        return shown, "open"
    return shown, "confirmed" if (difference < 0) == (expected == "better") else "contradicted"


def bias_variance(
    recipes: Sequence[Recipe], draws: int, out: Path, settings: dict[str, Any], *, n_max: int, splits_n_max: int
) -> tuple[str, dict[str, str]]:
    """
    Train every recipe on `draws` training sets, and write bias_variance.md, .csv and .png in `out`.

    Draw d has subset seed and seed d more than the recipe; all recipes see the same draws, and the same test images.
    Models predict with the mean logits of all their experts, and no routers are trained: they only save cost. The
    images of a class are drawn at random, for recipes that would take the first ones too. Runs are in
    out/RECIPE-drawD, with the predictions in predictions.npz.

    Args:
        recipes: the first is what the others are compared with.
        draws: M, at least 2.
        settings: what the recipes were overridden with; a later call in the same directory must repeat it.
        n_max: images of the largest class in a draw.
        splits_n_max: classes are many, medium or few by their counts if the largest had so many images.

    Returns:
        The tables as Markdown; the runs that failed, with the reason. Draws that not all recipes finished are left out.

    Raises:
        DataError: where there is nothing that could be a set.
        RecipeError: for recipes on different data, or without a random subset or test images of their own.
        ClaimedError, RunsError: before anything is trained.
    """
    refuse_equal_names(recipes)
    first = recipes[0]
    for recipe in recipes:
        theirs, ours = ((r.data, r.profile, r.imbalance, r.image_size) for r in (recipe, first))
        if theirs != ours:
            raise RecipeError(f"{recipe.name}: is on other data than {first.name}: {theirs}, not {ours}")
        if recipe.teacher:
            raise RecipeError(
                f"{recipe.name}: learns from {recipe.teacher}, the same for every draw and trained on other images; "
                "draws need recipes without a teacher"
            )
    if first.profile == "natural":
        raise RecipeError("profile=natural: there is one training set only; draws need exp or step")
    for size in (n_max, splits_n_max):
        try:
            class_counts(size, first.imbalance, 2, first.profile)
        except ValueError as error:
            raise RecipeError(str(error)) from None
    runs = {
        _run_name(recipe, draw): dataclasses.replace(
            recipe, n_max=n_max, subset_order="shuffled", subset_seed=recipe.subset_seed + draw,
            seed=recipe.seed + draw, router_epochs=0,
        )
        for draw in range(draws) for recipe in recipes
    }  # fmt: skip
    unfinished = any(not (out / name / "results.json").exists() for name in runs)
    if unfinished and open_set(first).test is None:
        raise RecipeError(f"{first.data}: has no test images of its own, which all draws need; put some in test/")
    failures = train_all(runs, out, settings | {"n_max": n_max}, _save_predictions)

    complete = [d for d in range(draws) if not any(_run_name(recipe, d) in failures for recipe in recipes)]
    if len(complete) < FEWEST_DRAWS:
        return f"{len(complete)} of {draws} draws are complete; the decomposition needs two or more", failures
    analyses, counts = {}, []
    for recipe in recipes:
        probabilities, predicted, labels = _read_predictions([out / _run_name(recipe, d) for d in complete])
        counts = class_counts(splits_n_max, first.imbalance, probabilities.shape[2], first.profile)
        analyses[recipe.name] = analyse(probabilities, predicted, labels, counts)
    per_class = {
        (name, kind, part): mean_by_class(getattr(analysis.parts[kind], part), labels, len(counts))
        for name, analysis in analyses.items() for kind in DECOMPOSITIONS for part in PARTS
    }  # fmt: skip
    text = _tables(analyses, len(complete), n_max, splits_n_max)
    write_atomically(out / "bias_variance.md", text)
    _write_csv(out / "bias_variance.csv", analyses, per_class)
    plot_bias_variance(list(analyses), TITLES, per_class, [split_of(count) for count in counts],
                       out / "bias_variance.png")  # fmt: skip
    return text, failures


def _run_name(recipe: Recipe, draw: int) -> str:
    return f"{recipe.name}-draw{draw:02d}"


def _save_predictions(run: Path) -> None:
    """
    predictions.npz: "probabilities" (N, C) float16, "predicted" (N,) uint16, "labels" (N,) uint16, of the test images.
    """
    file = run / "predictions.npz"
    if file.exists():
        return
    checkpoint, model = trained_model(run)
    device = best_device()
    predictions = predict(model.to(device), load_data(checkpoint.recipe, checked=True).test.to(device))
    logits = torch.from_numpy(predictions.expert_logits).mean(dim=0)
    partial = run / "predictions.partial.npz"
    np.savez_compressed(
        partial, probabilities=torch.softmax(logits, dim=1).half().numpy(),
        predicted=logits.argmax(dim=1).numpy().astype(np.uint16), labels=predictions.labels.astype(np.uint16),
    )  # fmt: skip
    partial.replace(file)


def _read_predictions(runs: Sequence[Path]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(M, N, C) float32, (M, N) and (N,) int64 of several runs."""
    probabilities, predicted, labels = [], [], []
    for run in runs:
        with np.load(run / "predictions.npz") as stored:
            probabilities.append(stored["probabilities"].astype(np.float32))
            predicted.append(stored["predicted"].astype(np.int64))
            labels.append(stored["labels"].astype(np.int64))
        if not np.array_equal(labels[0], labels[-1]):
            raise RunsError(f"{run}: has other test images than {runs[0]}")
    return np.stack(probabilities), np.stack(predicted), labels[0]


def _tables(analyses: Mapping[str, Analysis], draws: int, n_max: int, splits_n_max: int) -> str:
    text = (
        f"# Bias and variance over {draws} draws\n\nThe largest class has {n_max} images in a draw; many, medium "
        f"and few are the classes\nthat would be if it had {splits_n_max}. "
        "Shares, means of classes; error = bias + net variance.\n"
        f"Of a squared bias, variance / {draws} is there because there are no more draws.\n"
    )
    if draws == FEWEST_DRAWS:
        text += "Two models have no majority: their 0/1 bias is their error.\n"
    heads = ("method", "classes", "error", "bias", "variance", "net variance")
    for kind, title in TITLES.items():
        rows = [
            [name, scope, *(number(analysis.figures[scope, kind, part], 4) for part in PARTS)]
            for name, analysis in analyses.items() for scope in SCOPES
        ]  # fmt: skip
        text += f"\n## {title}\n\n{markdown(heads, rows)}\n"
    return text + _signs(analyses) if len(analyses) > 1 else text


def _signs(analyses: Mapping[str, Analysis]) -> str:
    """Every method beside the first one, and what was expected of it, where anything was."""
    reference_name, *others = analyses
    rows: list[list[str]] = []
    verdicts: dict[str, list[str]] = {"confirmed": [], "contradicted": [], "open": []}
    for name in others:
        known = next((signs for start, signs in EXPECTED.items() if name.startswith(start)), (None,) * len(QUANTITIES))
        signs: Sequence[Sign | None] = known if reference_name.startswith("ce-") else (None,) * len(QUANTITIES)
        for kind, title in TITLES.items():
            for (scope, part), expected in zip(QUANTITIES, signs, strict=True):
                if part == "error" and kind != "zero_one":
                    continue
                shown, verdict = sign_of(analyses[name], analyses[reference_name], (scope, kind, part), expected)
                rows.append([name, scope, part, title, shown, expected or "", verdict])
                if verdict:
                    verdicts[verdict].append(f"{name} {scope} {part} ({title})")
    heads = ("method", "classes", "part", "decomposition", f"difference to {reference_name}", "expected", "verdict")
    text = f"\n## Signs, against {reference_name}\n\n{markdown(heads, rows)}\n\n{SIGNS_LEGEND}\n\n"
    total = sum(map(len, verdicts.values()))
    if not total:
        return text + "None of these methods is in the talk's table.\n"
    confirmed, contradicted, undecided = verdicts.values()
    which = f" ({', '.join(contradicted)})" if contradicted else ""
    counted = f"{len(confirmed)} are confirmed, {len(contradicted)} contradicted{which} and {len(undecided)} open"
    return f"{text}Of the {total} signs of the talk's table {counted}.\n"


def _write_csv(file: Path, analyses: Mapping[str, Analysis], per_class: Mapping[Key, np.ndarray]) -> None:
    rows: list[list[Cell]] = []
    for name, analysis in analyses.items():
        for kind in DECOMPOSITIONS:
            rows += [[name, kind, scope, *(analysis.figures[scope, kind, part] for part in PARTS)] for scope in SCOPES]
            columns = zip(*(per_class[name, kind, part].tolist() for part in PARTS), strict=True)
            for label, values in enumerate(columns):
                rows.append([name, kind, f"class {label}", *(None if math.isnan(value) else value for value in values)])
    write_csv(file, ("method", "decomposition", "classes", *PARTS), rows)
