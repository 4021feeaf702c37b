"""The table of several recipes and seeds: mean and spread over seeds, beside the published figures."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.data.longtail import SCOPES
from training.files import write_atomically
from training.plots import plot_accuracy, plot_cost, plot_experts
from training.recipe import NO_EFFECT_FIELDS, PLACE_FIELDS, Recipe
from training.recipes import RECIPES
from training.recipes.published import PUBLISHED, Published
from training.runs import RunsError, read_results, refuse_equal_names, train_all
from training.tables import MISSING, Cell, markdown, number, write_csv

FIGURES = (*SCOPES, "ece", "mean_experts", "macs")
LEGEND = """Percent on the test images after the last epoch, means of per-class accuracies; ± is the sample standard
deviation over seeds. Routed: thresholds of 0.5, as published."""
DATA_FIELDS = ("data", "profile", "imbalance", "n_max")
UNCOMPARED_FIELDS = ("seed", "compile", *NO_EFFECT_FIELDS)  # runs that differ in nothing else are seeds of one method


@dataclass(frozen=True)
class Figure:
    """
    One number of a method over its seeds.

    Attributes:
        mean: over the seeds; percent, images' experts, or multiply-accumulates.
        deviation: sample standard deviation; None with one seed.
    """

    mean: float
    deviation: float | None


@dataclass(frozen=True)
class Row:
    """
    A line of the table: one method, all its experts or routed.

    Attributes:
        label: name of the recipe, and in which fields it is another than the recipe of that name.
        routed: routers chose the number of experts, at the published threshold.
        seeds: in ascending order.
        figures: "all", "many", "medium", "few", "ece" (percent), "mean_experts", "macs"; None: no images.
        published: what the recipe's papers report for the same kind of row.
        results: the results.json of each seed.
    """

    label: str
    routed: bool
    seeds: tuple[int, ...]
    figures: dict[str, Figure | None]
    published: tuple[Published, ...]
    results: tuple[dict[str, Any], ...]

    @property
    def name(self) -> str:
        """Label and kind."""
        n_experts = self.results[0]["recipe"].n_experts
        if self.routed:
            return f"{self.label}, routed"
        return self.label if n_experts == 1 else f"{self.label}, all {n_experts} experts"


def rows_of(runs: Sequence[Path]) -> list[Row]:
    """
    The rows of finished runs: seeds of one method together, methods in the order of their first run.

    Raises:
        RunsError: for a run without results, two with the same recipe and seed, or two of a name that are no seeds of
            one method: of other settings, or trained or tested on other images.
    """
    methods: dict[str, list[tuple[Path, dict[str, Any]]]] = {}
    for run in dict.fromkeys(path.resolve() for path in runs):
        results = read_results(run)
        methods.setdefault(label_of(results["recipe"]), []).append((run, results))
    rows = []
    for label, members in methods.items():
        members.sort(key=lambda member: int(member[1]["recipe"].seed))
        for (one, first), (other, second) in itertools.pairwise(members):
            if first["recipe"].seed == second["recipe"].seed:
                raise RunsError(f"{one} and {other}: both are {label} with seed {first['recipe'].seed}; leave one out")
            if differs := _difference(first, second):
                raise RunsError(
                    f"{one} and {other}: both are {label}, with other {differs}, so that no mean of them means "
                    "anything; leave one out"
                )
        seeds = tuple(results for _, results in members)
        rows.append(_row(label, seeds, routed=False))
        if _has_routers(seeds[0]["recipe"]):
            rows.append(_row(label, seeds, routed=True))
    return rows


def _difference(one: dict[str, Any], other: dict[str, Any]) -> str | None:
    """In what two results differ that should differ in the seed alone; what older ones do not have is not compared."""
    for key, what in (("classes", "classes"), ("images_digest", "training images"), ("unseen_digest", "test images")):
        if one.get(key) and other.get(key) and one[key] != other[key]:
            return what
    same_images = one.get("images_digest") and other.get("images_digest")
    places = PLACE_FIELDS if same_images else ()
    different = one["recipe"].differences(other["recipe"], (*UNCOMPARED_FIELDS, *places))
    return ", ".join(f"{field} ({ours} and {theirs})" for field, (ours, theirs) in different.items()) or None


def label_of(recipe: Recipe) -> str:
    """The recipe's name, with the fields in which it is another than the recipe that has this name."""
    named = RECIPES.get(recipe.name)
    if named is None:
        return recipe.name
    changed = recipe.differences(named, ("name", *UNCOMPARED_FIELDS))
    return ", ".join([recipe.name, *(f"{field}={value}" for field, (value, _) in changed.items())])


def sweep(
    recipes: Sequence[Recipe], seeds: Sequence[int], out: Path, settings: dict[str, Any], also: Sequence[Path] = ()
) -> tuple[str, dict[str, str]]:
    """
    Train every recipe with every seed in out/RECIPE-seedN, and write table.md, table.csv and the plots in `out`.

    The table holds every finished run of `out`, those of earlier calls too, and is written anew after each.

    Args:
        recipes: may be none, for a table of `also` alone.
        settings: what the recipes were overridden with; a later call in the same directory must repeat it.
        also: finished runs elsewhere that the table takes in.

    Returns:
        The table as Markdown; the runs that failed, with the reason.

    Raises:
        ClaimedError, RunsError: before anything is trained.
    """
    refuse_equal_names(recipes)
    runs = {f"{recipe.name}-seed{seed}": dataclasses.replace(recipe, seed=seed) for recipe in recipes for seed in seeds}
    planned = {(label_of(recipe), recipe.seed) for recipe in runs.values()}
    for run, recipe in ((run, read_results(run)["recipe"]) for run in also):
        if (label_of(recipe), recipe.seed) in planned:
            raise RunsError(f"--also {run}: the sweep trains {label_of(recipe)} with seed {recipe.seed} itself")

    def rows() -> list[Row]:
        return rows_of([*sorted(file.parent for file in out.glob("*/results.json")), *also])

    rows()  # what cannot be one table now will not be one after days of training
    failures = train_all(runs, out, settings, finish=lambda _: write_tables(rows(), out, {}))
    finished = rows()
    text = write_tables(finished, out, failures)
    if finished:
        write_plots(finished, out)
    return text, failures


def write_tables(rows: Sequence[Row], directory: Path, failures: Mapping[str, str]) -> str:
    """
    Write table.md and table.csv.

    Args:
        failures: name of the run to the reason.

    Returns:
        The Markdown.
    """
    heads = ("method", "seeds", "experts", "M MACs", *SCOPES, "ECE", "published: all (many / medium / few)")
    lines = [
        [row.name, _seeds(row.seeds), _shown(row, "mean_experts"), _shown(row, "macs"),
         *(_shown(row, key) for key in (*SCOPES, "ece")), "; ".join(map(_published, row.published)) or MISSING]
        for row in rows
    ]  # fmt: skip
    text = markdown(heads, lines)
    text += f"\n\n{LEGEND}\n"
    sources = dict.fromkeys(f"{entry.all:.1f} {entry.source}" for row in rows for entry in row.published)
    if sources:
        text += f"Published: {'; '.join(sources)}.\n"
    if failures:
        text += "\nFailed:\n\n" + "".join(f"- {name}: {reason}\n" for name, reason in failures.items())
    write_atomically(directory / "table.md", text)
    _write_csv(directory / "table.csv", rows)
    return text


def write_plots(rows: Sequence[Row], directory: Path) -> None:
    """
    Write accuracy.png, cost.png and, where there are routers, experts.png.

    The last leaves out runs whose results.json has no figures per class: an older version made them.
    """
    plot_accuracy(
        {row.name: _by_split(row) for row in rows},
        {row.name: _published_by_split(row.published[0]) for row in rows if row.published},
        directory / "accuracy.png",
    )
    plot_cost(*_costs(rows), directory / "cost.png")
    used = {row.label: points for row in rows if row.routed and (points := _experts_per_class(row))}
    if used:
        plot_experts(used, directory / "experts.png")


def _has_routers(recipe: Recipe) -> bool:
    return "routers" in recipe.stage_epochs()


def _row(label: str, results: tuple[dict[str, Any], ...], routed: bool) -> Row:
    n_experts = results[0]["recipe"].n_experts
    measured = []
    for result in results:
        figures = result["routed"] if routed else result["experts"][-1]
        mean_experts = figures["mean_experts"]["all"] if routed else float(n_experts)
        measured.append({**{key: figures[key] for key in (*SCOPES, "ece", "macs")}, "mean_experts": mean_experts})
    return Row(
        label=label, routed=routed, seeds=tuple(result["recipe"].seed for result in results),
        figures={key: _figure([figures[key] for figures in measured]) for key in FIGURES},
        published=tuple(entry for entry in _published_of(results[0]["recipe"]) if entry.routed == routed),
        results=results,
    )  # fmt: skip


def _published_of(recipe: Recipe) -> tuple[Published, ...]:
    """What the papers report for the recipe of this name, if the images are theirs."""
    named = RECIPES.get(recipe.name)
    if named is None or any(getattr(recipe, field) != getattr(named, field) for field in DATA_FIELDS):
        return ()
    return tuple(PUBLISHED.get(recipe.name, ()))


def _figure(values: Sequence[float | None]) -> Figure | None:
    known = [float(value) for value in values if value is not None]
    if len(known) < len(values):
        return None
    return Figure(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None)


def _shown(row: Row, key: str) -> str:
    figure = row.figures[key]
    if figure is None:
        return MISSING
    unit, digits = (1e6, 1) if key == "macs" else (1, 2)
    spread = None if figure.deviation is None else figure.deviation / unit
    if key in ("macs", "mean_experts") and not row.routed:
        spread = None  # the same for every seed
    return number(figure.mean / unit, digits, spread)


def _seeds(seeds: Sequence[int]) -> str:
    return f"{len(seeds)} ({', '.join(map(str, seeds))})"


def _published(entry: Published) -> str:
    splits = (entry.many, entry.medium, entry.few)
    if all(value is None for value in splits):
        return f"{entry.all:.1f}"
    return f"{entry.all:.1f} ({' / '.join(number(value, 1) for value in splits)})"


def _write_csv(file: Path, rows: Sequence[Row]) -> None:
    heads = ["method", "routed", "n_seeds", "seeds"]
    heads += [f"{key}_{part}" for key in FIGURES for part in ("mean", "sd")]
    heads += ["published_source", *(f"published_{key}" for key in SCOPES), "published_m_macs"]
    lines: list[list[Cell]] = []
    for row in rows:
        line: list[Cell] = [row.label, int(row.routed), len(row.seeds), " ".join(map(str, row.seeds))]
        for key in FIGURES:
            figure = row.figures[key]
            line += [figure.mean, figure.deviation] if figure is not None else [None, None]
        entry = row.published[0] if row.published else None
        line += [getattr(entry, key, None) for key in ("source", *SCOPES, "macs")]
        lines.append(line)
    write_csv(file, heads, lines)


def _by_split(row: Row) -> dict[str, tuple[float, float | None]]:
    found = {key: row.figures[key] for key in SCOPES}
    return {key: (figure.mean, figure.deviation) for key, figure in found.items() if figure is not None}


def _published_by_split(entry: Published) -> dict[str, float]:
    return {key: getattr(entry, key) for key in SCOPES if getattr(entry, key) is not None}


def _costs(
    rows: Sequence[Row],
) -> tuple[dict[str, list[tuple[float, float]]], dict[str, tuple[float, float]], dict[str, tuple[float, float]]]:
    """(M MACs, accuracy): of the first 1 to E experts by label; routed by label; published by label."""
    prefixes, routed, published = {}, {}, {}
    for row in rows:
        accuracy, macs = row.figures["all"], row.figures["macs"]
        assert accuracy is not None
        assert macs is not None
        if row.routed:
            routed[row.label] = (macs.mean / 1e6, accuracy.mean)
        else:
            each = zip(*(result["experts"] for result in row.results), strict=True)
            prefixes[row.label] = [
                (seeds[0]["macs"] / 1e6, statistics.fmean(result["all"] for result in seeds)) for seeds in each
            ]
        stated = next((entry for entry in row.published if entry.macs is not None), None)
        if stated is not None and stated.macs is not None:
            published[row.label] = (stated.macs, stated.all)
    return prefixes, routed, published


def _experts_per_class(row: Row) -> list[tuple[float, float]]:
    """(training images, mean experts over the seeds) of each class; empty where a run recorded none."""
    if any("per_class" not in result for result in row.results):
        return []
    columns = zip(*(result["per_class"]["mean_experts"] for result in row.results), strict=True)
    pairs = zip(row.results[0]["class_counts"], columns, strict=True)
    return [(count, statistics.fmean(used)) for count, used in pairs if None not in used]
