"""The command line: ride-train RECIPE, or one of COMMANDS."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.errors import TrainingError
from training.recipe import NO_EFFECT_FIELDS, Recipe, RecipeError, parse_settings, refuse_without_effect
from training.recipes import RECIPES
from training.tables import markdown, number

SMOKE = {
    "epochs": "2",
    "router_epochs": "1",
    "n_max": "50",
    "imbalance": "10",
    "compile": "false",
    "warmup_epochs": "1",
    "retrain_epochs": "1",
    "oltr_epochs": "1",
    "lfme_epochs": "1",
    "m2m_from": "0.5",
    "cycles": "1",
}
SMOKE_OF_ALL_SPLITS = {"n_max": "150"}  # of lfme, which has a teacher for classes of more than 100 images
BIAS_VARIANCE_RECIPES = ["ce-cifar100", "crt-cifar100", "tau-norm-cifar100", "ldam-drw-cifar100", "ride-cifar100"]


def main(arguments: list[str] | None = None) -> int:
    """
    Run a command, or the training of a recipe.

    Returns:
        The exit status: 0; 1 where some of several runs failed; 2 after a message for the caller's mistakes, or where a
        file cannot be read or written; 130 after Ctrl-C.
    """
    given = sys.argv[1:] if arguments is None else arguments
    try:
        if given and given[0] in COMMANDS:
            command = COMMANDS[given[0]]
            return command.run(command.parser().parse_args(given[1:]))
        return _train(_parser().parse_args(given))
    except TrainingError as error:
        return _fail(error)
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else error)
    except ModuleNotFoundError as error:  # the service can be installed without what training needs
        return _fail(f"{error}; install the extra 'train', as README.md says")
    except KeyboardInterrupt:
        print("ride-train: interrupted", file=sys.stderr)
        return 130


def _train(options: argparse.Namespace) -> int:
    (recipe,) = _recipes([options.recipe], options)
    from training.data.report import UnreadableError
    from training.distributed import LostProcessError
    from training.train import train

    run = options.out or Path("runs", recipe.name)
    first = os.environ.get("RANK", "0") == "0"  # of several processes, all of which fail or end alike, this one speaks
    if (run / "checkpoints").exists() and not options.resume:
        return _fail(f"{run}: has checkpoints already; --resume goes on with them, --out names another directory")
    try:
        results = train(recipe, run)
    except (LostProcessError, UnreadableError):  # which the other processes may not know
        raise
    except TrainingError:
        if first:
            raise
        return 2
    if not first:
        return 0
    print(table(results))
    print(f"{run / 'results.json'} holds all figures; next: ride-export {run} -o bundle")
    return 0


def _sweep(options: argparse.Namespace) -> int:
    recipes = _recipes(options.recipes, options)
    seeds = _whole_numbers("--seeds", options.seeds)
    _refuse_settings(options, {"seed": "a sweep takes its seeds from --seeds"})
    if not recipes and not options.also:
        raise RecipeError("sweep: name recipes to train, or finished runs with --also")
    from training.sweep import sweep

    text, failures = sweep(recipes, seeds, options.out, _settings_record(options), options.also)
    print(_printable(text))
    return _report_failures(failures, options.out)


def _bias_variance(options: argparse.Namespace) -> int:
    recipes = _recipes(options.recipes, options)
    _refuse_settings(options, {
        "n_max": "the size of a draw is --n-max", "subset_order": "draws are random subsets",
        "router_epochs": "all experts are run, so that there are no routers to train",
    })  # fmt: skip
    from training.bias_variance import DRAWS, N_MAX, SMOKE_DRAWS, SMOKE_N_MAX, bias_variance

    draws = options.draws or (SMOKE_DRAWS if options.smoke else DRAWS)
    n_max = options.n_max or (SMOKE_N_MAX if options.smoke else N_MAX)
    settings = _settings_record(options)
    text, failures = bias_variance(recipes, draws, options.out, settings, n_max=n_max, splits_n_max=options.split_n_max)
    print(_printable(text))
    return _report_failures(failures, options.out)


def _report(options: argparse.Namespace) -> int:
    from training.router_report import report

    out, settings = options.out or options.run / "report", parse_settings(options.set)
    print(report(options.run, out, options.max_mean_experts, data=options.data, settings=settings))
    return 0


def _check(options: argparse.Namespace) -> int:
    from training.data.check import check_data
    from training.data.sets import share_out, summary_of
    from training.data.sources import open_set

    recipe = _recipe("ride-own", options)
    found, image_set = check_data(recipe, decode=not options.quick), open_set(recipe)
    shares = None if found.has_errors else share_out(image_set, recipe, found)
    print(_printable(f"{options.data}: {summary_of(image_set, shares)}"))
    print(_printable(str(found)) if found.findings else "nothing is wrong with it")
    return 2 if found.has_errors else 0


def _printable(text: str) -> str:
    r"""What is not UTF-8 in the names of files as \udcXX, which any output takes."""
    return text.encode(errors="backslashreplace").decode()


def _list(options: argparse.Namespace) -> int:
    from training.recipes.published import PUBLISHED

    for recipe in RECIPES.values():
        experts = f"{recipe.n_experts} expert{'s' * (recipe.n_experts > 1)}"
        kind = "as given" if recipe.profile == "natural" else f"imbalance {recipe.imbalance:g}"
        print(f"{recipe.name:28} {recipe.method}, {experts}, {recipe.data or 'own images'}, {kind}")
        for entry in PUBLISHED.get(recipe.name, ()):
            splits = " / ".join(
                "-" if value is None else f"{value:.1f}" for value in (entry.many, entry.medium, entry.few)
            )
            print(f"{'':28}   published: {entry.all:.1f} ({splits}){' routed' * entry.routed}, {entry.source}")
    return 0


def table(results: dict[str, Any]) -> str:
    """The figures on the test images, as Markdown."""
    rows = [(str(index + 1), row) for index, row in enumerate(results["experts"])]
    if "routed" in results:
        rows.append((f"routed: {results['routed']['mean_experts']['all']:.2f}", results["routed"]))
    return markdown(
        ("experts", "all", "many", "medium", "few", "ECE", "M MACs"),
        [
            [name, *(number(row[key]) for key in ("all", "many", "medium", "few", "ece")), number(row["macs"] / 1e6, 1)]
            for name, row in rows
        ],
    )


def _recipes(names: Sequence[str], options: argparse.Namespace) -> list[Recipe]:
    """Each recipe once, with the settings, of which each must mean something to one of them."""
    recipes = [_recipe(name, options) for name in dict.fromkeys(names)]
    refuse_without_effect(recipes, parse_settings(options.set))
    return recipes


def _recipe(name: str, options: argparse.Namespace) -> Recipe:
    if name not in RECIPES:
        raise RecipeError(f"{name}: no such recipe; there are {', '.join(RECIPES)}")
    settings = parse_settings(options.set)
    recipe = RECIPES[name]
    if options.data is not None:
        recipe = dataclasses.replace(recipe, data=options.data)
    return recipe.override((_small(recipe, settings) if options.smoke else {}) | settings)


def _small(recipe: Recipe, settings: dict[str, str]) -> dict[str, str]:
    """What --smoke sets, of the fields that mean something in `recipe` with `settings`."""
    method, profile = settings.get("method", recipe.method), settings.get("profile", recipe.profile)
    without = {
        "imbalance": profile == "natural", "retrain_epochs": not recipe.retrain_epochs,
        "router_epochs": not recipe.router_epochs or settings.get("n_experts", str(recipe.n_experts)) == "1",
        "oltr_epochs": method != "oltr",
        "lfme_epochs": method != "lfme", "m2m_from": method != "m2m", "cycles": recipe.cycles == 1,
    }  # fmt: skip
    small = SMOKE | (SMOKE_OF_ALL_SPLITS if method == "lfme" else {})
    return {field: text for field, text in small.items() if not without.get(field, False)}


def _settings_record(options: argparse.Namespace) -> dict[str, Any]:
    """What several runs of one directory have in common, less what changes no result."""
    settings = {key: value for key, value in sorted(parse_settings(options.set).items()) if key not in NO_EFFECT_FIELDS}
    return {"data": options.data, "smoke": options.smoke, "set": settings}


def _refuse_settings(options: argparse.Namespace, reasons: dict[str, str]) -> None:
    """
    Refuse what the command itself decides on.

    Raises:
        RecipeError: for a field in --set that the command itself decides on.
    """
    for field, text in parse_settings(options.set).items():
        if field in reasons:
            raise RecipeError(f"--set {field}={text}: {reasons[field]}; leave it out")


def _whole_numbers(option: str, text: str) -> list[int]:
    try:
        return sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise RecipeError(f"{option} {text}: must be whole numbers, separated by commas") from None


def _report_failures(failures: dict[str, str], out: Path) -> int:
    for name, reason in failures.items():
        print(_printable(f"ride-train: {out / name}: failed: {reason}"), file=sys.stderr)
    if failures:
        print("ride-train: the same command again goes on with the runs that failed", file=sys.stderr)
    return 1 if failures else 0


def _parser() -> argparse.ArgumentParser:
    usages = "".join(
        f"  {name:15}{command.help}\n      {command.parser().format_usage().strip()}\n"
        for name, command in COMMANDS.items()
    )
    parser = argparse.ArgumentParser(
        prog="ride-train",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train a recipe and evaluate it on its test images. A run can be killed and resumed at any moment.",
        epilog=f"other commands, in place of the recipe:\n{usages}\n{_about_recipes()}",
    )
    parser.add_argument("recipe", help="name of the recipe")
    parser.add_argument("--out", type=Path, metavar="DIR", help="run directory [default: runs/RECIPE]")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of the run directory")
    return _with_settings(parser)


def _sweep_parser() -> argparse.ArgumentParser:
    parser = _several("sweep", "Train several recipes with several seeds, one after another, and tabulate them.")
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help="names of recipes; none: only tabulate --also")
    parser.add_argument("--seeds", default="0", metavar="N,N", help="seeds of every recipe [default: 0]")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/sweep"), metavar="DIR", help="directory [default: %(default)s]"
    )
    parser.add_argument(
        "--also",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        metavar="RUN",
        help="finished run directories to tabulate with them",
    )
    return _with_settings(parser)


def _bias_variance_parser() -> argparse.ArgumentParser:
    parser = _several(
        "bias-variance",
        "Train recipes on several draws of the training set, and split their test error into bias and variance.",
    )
    compared = f"the first is what the others are compared with [default: {' '.join(BIAS_VARIANCE_RECIPES)}]"
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", default=BIAS_VARIANCE_RECIPES, help=compared)
    parser.add_argument("--draws", type=_from(2), metavar="M", help="training sets [default: 20; with --smoke 3]")
    parser.add_argument(
        "--n-max", type=_from(1), metavar="N",
        help="images of the largest class in a draw; fewer than there are, so that draws differ "
        "[default: 300; with --smoke 30]",
    )  # fmt: skip
    parser.add_argument(
        "--split-n-max", type=_from(1), default=500, metavar="N",
        help="classes are many, medium or few as if the largest had N images [default: %(default)s]",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bias-variance"), metavar="DIR", help="directory [default: %(default)s]"
    )
    return _with_settings(parser)


def _report_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ride-train report",
        description="What the routers of a finished run do: how many experts images get, what that costs and gives, "
        "beside random exits and an oracle. Thresholds are chosen on held-out images, figures are of test images.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("--out", type=Path, metavar="DIR", help="directory of the report [default: RUN/report]")
    parser.add_argument("--data", metavar="DIR", help="where the images lie now, if not where the recipe says")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="image_root=DIR, if it is not where it was"
    )
    parser.add_argument(
        "--max-mean-experts", type=float, metavar="X",
        help="look closely at the best thresholds of at most so many experts [default: at 0.5, as published]",
    )  # fmt: skip
    return parser


def _check_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ride-train check",
        description="Look at every image of a set and tell everything that is wrong with it at once. Trains nothing.",
        epilog="Exit status: 2 where it cannot be trained on, 0 otherwise, oddities included.",
    )
    parser.add_argument("data", help="cifar10, cifar100, or a directory of images")
    parser.add_argument("--quick", action="store_true", help="look at headers only, which finds no damage further in")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="such as train_list=FILE")
    parser.set_defaults(smoke=False)
    return parser


def _list_parser() -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog="ride-train list", description="The recipes, with their published figures.")


def _several(name: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"ride-train {name}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=description
        + "\nIt can be killed at any moment: the same command again skips what is finished and goes on with the rest.",
        epilog=_about_recipes(),
    )


def _with_settings(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument(
        "--data", help="cifar10, cifar100, or a directory: of class folders, with train*.parquet, or with list files"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="override a field of the recipe"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="two epochs on a small subset: shows that all works, learns little"
    )
    return parser


def _about_recipes() -> str:
    fields = ", ".join(field.name for field in dataclasses.fields(Recipe))
    return textwrap.fill(
        f"Recipes: {', '.join(RECIPES)}. Fields for --set: {fields}. What they mean: training/recipe.py.", 100
    )


def _from(low: int) -> Callable[[str], int]:
    def whole(text: str) -> int:
        if int(text) < low:
            raise ValueError
        return int(text)

    whole.__name__ = f"whole number from {low}"  # argparse says "invalid whole number from 2 value"
    return whole


@dataclass(frozen=True)
class Command:
    """What may stand in the recipe's place: one line on what it does, its options, what it runs."""

    help: str
    parser: Callable[[], argparse.ArgumentParser]
    run: Callable[[argparse.Namespace], int]


COMMANDS = {
    "list": Command("the recipes, with their published figures", _list_parser, _list),
    "sweep": Command("several recipes and seeds, and their table", _sweep_parser, _sweep),
    "bias-variance": Command("several draws of the training set", _bias_variance_parser, _bias_variance),
    "report": Command("what the routers of a finished run do", _report_parser, _report),
    "check": Command("whether a set of images can be trained on", _check_parser, _check),
}


def _fail(reason: object) -> int:
    print(f"ride-train: {reason}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
