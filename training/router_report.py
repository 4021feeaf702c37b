"""What the routers of a finished run do, what it costs and gives, and what an oracle in their place would reach."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from training.data.longtail import SCOPES, split_of
from training.data.sets import load_data
from training.distributed import best_device
from training.errors import TrainingError
from training.evaluate import (
    Costs,
    Predictions,
    accuracy_by_split,
    experts_share,
    macs_of,
    mean_by_class,
    mean_macs,
    predict,
    prefix_right,
    route,
    rows_by_split,
)
from training.files import write_atomically
from training.plots import plot_curve, plot_experts, plot_shares
from training.tables import Cell, markdown, number, write_csv
from training.thresholds import fit_temperature, frontier
from training.train import PUBLISHED_THRESHOLD, refuse_other_images, trained_model

MOST_ROWS = 12  # of the curve in report.md; curve.csv has all
WAYS_LEGEND = """Random exits: as many
experts on average, some images one fewer than others, whichever they are. Oracle: each image gets the fewest experts
whose mean logits are right, one where none are."""

Accuracies = dict[str, float | None]


class ReportError(TrainingError, ValueError):
    """A run without routers, or a budget that nothing keeps."""


@dataclass(frozen=True)
class Point:
    """
    What a way of deciding costs and gives, on test images.

    Attributes:
        name: of the way.
        used: (N,), experts of each image.
        macs: mean multiply-accumulates of an image.
        accuracy: percent, by split.
        random: percent, by split, of random exits at the same mean number of experts m: ⌊m⌋ for some images and one
            more for the others, whichever. The expected value, exact; no other random choice is better where every
            further expert adds less.
        thresholds: (E − 1,), from which score the next expert runs; empty where no router decides.
    """

    name: str
    used: np.ndarray
    macs: float
    accuracy: Accuracies
    random: Accuracies
    thresholds: tuple[float, ...] = ()

    @property
    def mean_experts(self) -> float:
        """Of an image."""
        return float(self.used.mean())


def oracle(right: np.ndarray) -> np.ndarray:
    """
    (N,): the fewest experts whose mean logits are right, one where none are.

    Args:
        right: (E, N), bool.
    """
    return np.asarray(np.where(right.any(axis=0), right.argmax(axis=0) + 1, 1))


def report(
    run: Path, out: Path, max_mean_experts: float | None = None, *, data: str | None = None,
    settings: dict[str, str] | None = None,
) -> str:  # fmt: skip
    """
    Write report.md, per_class.csv, curve.csv and the plots of a finished run in `out`.

    Thresholds are chosen on held-out images, figures are of test images. Scores are the sigmoids of the routers'
    decisions divided by the decisions' standard deviation on held-out images, so that they fill [0, 1]; this moves no
    decision across 0.5.

    Args:
        max_mean_experts: look closely at the most accurate thresholds of at most so many; None: at 0.5, as published.
        data: where the images of the run lie now; None: where the recipe says.
        settings: `image_root` at most, likewise.

    Returns:
        The Markdown.

    Raises:
        ReportError: for a run without routers, or a budget below one expert.
        CheckpointError: for a run that is not finished.
        DataError: where its images cannot be read.
        RecipeError: for a setting other than `image_root`.
    """
    checkpoint, model = trained_model(run)
    recipe = checkpoint.recipe
    if recipe.n_experts == 1:
        raise ReportError(f"{run}: has one expert, which every image uses; there is nothing to route")
    if "routers" not in recipe.stage_epochs():
        raise ReportError(f"{run}: its routers were never trained (router_epochs=0)")
    if max_mean_experts is not None and not max_mean_experts >= 1:  # NaN is not
        raise ReportError(f"--max-mean-experts {max_mean_experts:g}: every image uses one expert at least")
    images = load_data(recipe.with_images_at(data, settings or {}), checked=True)
    refuse_other_images(checkpoint, images)
    device = best_device()
    model.to(device)
    macs = macs_of(model, recipe.image_size)
    temperature = fit_temperature(model, images.heldout)
    on_heldout, judge = (
        _Judge(predict(model, part.to(device)), images.counts, macs) for part in (images.heldout, images.test)
    )

    candidates = frontier(on_heldout.predictions, images.counts, macs)
    curve = sorted((judge.routed("routed", thresholds) for thresholds in candidates), key=lambda point: point.macs)
    chosen = judge.routed("routed, thresholds 0.5 as published", (PUBLISHED_THRESHOLD,) * (recipe.n_experts - 1))
    points = [*judge.prefixes(), chosen]
    if max_mean_experts is not None:
        thresholds = _within(max_mean_experts, [on_heldout.routed("held out", each) for each in candidates])
        chosen = judge.routed(f"routed, at most {max_mean_experts:g} experts on held-out images", thresholds)
        points.append(chosen)
    points.append(judge.oracle())

    out.mkdir(parents=True, exist_ok=True)
    text = _text(run, judge, points, chosen, curve, images.heldout_note, temperature)
    write_atomically(out / "report.md", text)
    _write_curve(out / "curve.csv", [*points, *curve])
    _write_classes(out / "per_class.csv", judge, chosen, points[-1], images.classes)
    plot_shares({scope: shares for scope, shares in judge.shares(chosen).items() if shares}, out / "shares.png")
    used = {
        name: judge.by_class(point.used.astype(float)) for name, point in (("router", chosen), ("oracle", points[-1]))
    }
    plot_experts({name: _by_frequency(values, images.counts) for name, values in used.items()}, out / "experts.png")
    _plot_curve(curve, points, recipe.n_experts, chosen, out / "curve.png")
    return text


def _within(max_mean_experts: float, points: Sequence[Point]) -> tuple[float, ...]:
    """The thresholds of the most accurate point of at most so many experts, of the cheapest among equals."""
    kept = [point for point in points if point.mean_experts <= max_mean_experts]
    if not kept:
        least = min(point.mean_experts for point in points)
        raise ReportError(f"--max-mean-experts {max_mean_experts:g}: the thriftiest thresholds need {least:.4f}")
    return max(kept, key=lambda point: (point.accuracy["all"] or 0.0, -point.macs)).thresholds


class _Judge:
    """Images and what is known of them; makes points."""

    def __init__(self, predictions: Predictions, counts: Sequence[int], macs: Costs) -> None:
        self.predictions, self.counts, self.macs = predictions, counts, macs
        self.labels = predictions.labels
        self.right = prefix_right(predictions)
        self.n_experts, self.n_images = self.right.shape
        self.of_prefix = [accuracy_by_split(row, self.labels, counts) for row in self.right]

    def point(self, name: str, used: np.ndarray, thresholds: tuple[float, ...] = ()) -> Point:
        """Of images that use so many experts (N,); routers cost only where there are thresholds."""
        shares = experts_share(used, self.n_experts)
        at_random = np.clip(1 - np.abs(np.arange(1, self.n_experts + 1) - used.mean()), 0, None)
        paid = self.macs if thresholds else self.macs._replace(routers=[])
        random = {scope: _mixed(at_random, [row[scope] for row in self.of_prefix]) for scope in SCOPES}
        accuracy = accuracy_by_split(self.right[used - 1, np.arange(self.n_images)], self.labels, self.counts)
        return Point(name, used, mean_macs(paid, shares), accuracy, random, thresholds)

    def prefixes(self) -> list[Point]:
        """The first 1 to E experts for every image."""
        names = ["one expert", *(f"{count} experts" for count in range(2, self.n_experts + 1))]
        return [self.point(name, np.full(self.n_images, count)) for count, name in enumerate(names, start=1)]

    def routed(self, name: str, thresholds: tuple[float, ...]) -> Point:
        """The routers at `thresholds`."""
        return self.point(name, route(self.predictions.router_scores, thresholds), thresholds)

    def oracle(self) -> Point:
        """As one who knows the labels would route: the fewest experts that are right."""
        return self.point("oracle", oracle(self.right))

    def shares(self, point: Point) -> dict[str, list[float]]:
        """By split, the shares of the images that use 1 to E experts. Empty without images."""
        rows = rows_by_split(self.labels, self.counts)
        return {scope: experts_share(point.used[chosen], self.n_experts) for scope, chosen in rows.items()}

    def by_class(self, values: np.ndarray) -> list[float | None]:
        """(C,): means of `values` (N,); None for a class without images."""
        means = mean_by_class(values, self.labels, len(self.counts)).tolist()
        return [None if math.isnan(mean) else mean for mean in means]


def _mixed(shares: np.ndarray, accuracies: Sequence[float | None]) -> float | None:
    known = [accuracy for accuracy in accuracies if accuracy is not None]
    return round(float(shares @ known), 3) if len(known) == len(accuracies) else None


def _text(
    run: Path,
    judge: _Judge,
    points: Sequence[Point],
    chosen: Point,
    curve: Sequence[Point],
    heldout_note: str,
    temperature: float,
) -> str:
    columns = ("experts", "M MACs", *SCOPES, "random exits, all")
    rows = [
        [point.name, *_cost(point), *(number(point.accuracy[scope]) for scope in SCOPES), number(point.random["all"])]
        for point in points
    ]  # fmt: skip
    text = f"# Routers of {run.name}\n\n{markdown(('', *columns), rows)}\n\n"
    text += f"Percent on {judge.n_images:,} test images, means of per-class accuracies. {WAYS_LEGEND}\n"
    text += f"Thresholds are chosen on {heldout_note}.\n"

    counts = range(1, judge.n_experts + 1)
    rows = []
    for name, point in (("router", chosen), ("oracle", points[-1])):
        for scope, shares in judge.shares(point).items():
            if shares:
                mean = sum(count * share for count, share in zip(counts, shares, strict=True))
                rows.append([name, scope, number(mean), *(f"{share:.1%}" for share in shares)])
    of_splits = ("", "test images of", "mean experts", *(f"use {count}" for count in counts))
    text += f"\n## Experts an image uses: {chosen.name}\n\n{markdown(of_splits, rows)}\n"
    many, few = (judge.shares(chosen)[scope] for scope in ("many", "few"))
    if many and few:
        text += (
            f"\nMore than one expert: {1 - few[0]:.1%} of the few-shot images; one expert only: {many[0]:.1%} of the "
        )
        text += "many-shot images.\nRIDE's authors report more than half of each.\n"

    rows = [
        [", ".join(f"{value:.3f}" for value in point.thresholds), *_cost(point),
         *(number(point.accuracy[scope]) for scope in SCOPES), number(point.random["all"])]
        for point in _thinned(curve)
    ]  # fmt: skip
    text += f"\n## Accuracy and cost\n\n{markdown(('thresholds', *columns), rows)}\n\n"
    text += "A router sends an image on where its score reaches the threshold. Scores are the\n"
    text += f"sigmoids of decisions divided by {temperature:.2f}, their standard deviation on held-out images.\n"
    return text


def _cost(point: Point) -> list[str]:
    return [number(point.mean_experts), number(point.macs / 1e6, 1)]


def _thinned(curve: Sequence[Point]) -> list[Point]:
    """At most 12 points, about evenly spaced by cost, both ends among them."""
    wanted = np.linspace(curve[0].macs, curve[-1].macs, MOST_ROWS)
    macs = np.array([point.macs for point in curve])
    nearest = {int(np.abs(macs - cost).argmin()) for cost in wanted}
    return [curve[index] for index in sorted(nearest)]


def _write_curve(file: Path, points: Sequence[Point]) -> None:
    heads = ("name", "thresholds", "mean_experts", "macs", *SCOPES, *(f"random_{scope}" for scope in SCOPES))
    rows: list[list[Cell]] = [
        [point.name, " ".join(map(str, point.thresholds)), round(point.mean_experts, 5), round(point.macs),
         *(point.accuracy[scope] for scope in SCOPES), *(point.random[scope] for scope in SCOPES)]
        for point in points
    ]  # fmt: skip
    write_csv(file, heads, rows)


def _write_classes(file: Path, judge: _Judge, chosen: Point, oracle: Point, classes: Sequence[str]) -> None:
    counts = range(1, judge.n_experts + 1)
    right = {name: judge.right[used - 1, np.arange(judge.n_images)].astype(float) for name, used in (
        ("accuracy", np.full(judge.n_images, judge.n_experts)), ("routed_accuracy", chosen.used),
        ("oracle_accuracy", oracle.used),
    )}  # fmt: skip
    columns = {name: judge.by_class(100 * values) for name, values in right.items()}
    columns["mean_experts"] = judge.by_class(chosen.used.astype(float))
    columns |= {f"share_{count}": judge.by_class((chosen.used == count).astype(float)) for count in counts}
    columns["oracle_mean_experts"] = judge.by_class(oracle.used.astype(float))
    images = np.bincount(judge.labels, minlength=len(classes)).tolist()
    rows: list[list[Cell]] = [
        [name, count, split_of(count), tested, *(None if value is None else round(value, 5) for value in values)]
        for name, count, tested, *values in zip(classes, judge.counts, images, *columns.values(), strict=True)
    ]
    write_csv(file, ("class", "training_images", "split", "test_images", *columns), rows)


def _by_frequency(values: Sequence[float | None], counts: Sequence[int]) -> list[tuple[float, float]]:
    return [(count, value) for count, value in zip(counts, values, strict=True) if value is not None]


def _plot_curve(curve: Sequence[Point], points: Sequence[Point], n_experts: int, chosen: Point, file: Path) -> None:
    panels = {}
    for scope in SCOPES:
        if chosen.accuracy[scope] is not None:
            lines = {"routed": _line(curve, scope), "random exits": _line(curve, scope, random=True)}
            marks = {"1, 2, ... experts for all": _line(points[:n_experts], scope), chosen.name: _line([chosen], scope),
                     "oracle": _line(points[-1:], scope)}  # fmt: skip
            panels[scope] = (lines, marks)
    plot_curve(panels, file)


def _line(points: Sequence[Point], scope: str, random: bool = False) -> list[tuple[float, float]]:
    found = [(point.macs / 1e6, (point.random if random else point.accuracy)[scope]) for point in points]
    return [(macs, accuracy) for macs, accuracy in found if accuracy is not None]
