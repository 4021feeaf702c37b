"""The command line: ride-train RECIPE."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

from training.recipe import Recipe, RecipeError
from training.recipes import RECIPES

SMOKE = {
    "epochs": "2",
    "router_epochs": "1",
    "n_max": "50",
    "imbalance": "10",
    "compile": "false",
    "warmup_epochs": "1",
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, or 2 after a message for the caller's mistakes."""
    options = _parser().parse_args(arguments)
    try:
        recipe = _recipe(options)
        from training.checkpoint import CheckpointError
        from training.data.sets import DataError
        from training.distributed import LostProcessError
        from training.loop import DivergedError
        from training.train import train
    except RecipeError as error:
        return _fail(error)
    run = options.out or Path("runs", recipe.name)
    first = os.environ.get("RANK", "0") == "0"  # of several processes, all of which fail or end alike, this one speaks
    if (run / "checkpoints").exists() and not options.resume:
        return _fail(f"{run}: has checkpoints already; --resume goes on with them, --out names another directory")
    try:
        results = train(recipe, run)
    except LostProcessError as error:
        return _fail(error)
    except (CheckpointError, DataError, DivergedError, RecipeError) as error:
        return _fail(error) if first else 2
    if not first:
        return 0
    print(table(results))
    print(f"{run / 'results.json'} holds all figures; next: ride-export {run} -o bundle")
    return 0


def table(results: dict[str, Any]) -> str:
    """The figures on the test images, as Markdown."""
    lines = ["| experts | all | many | medium | few | ECE | M MACs |", "| --- | --- | --- | --- | --- | --- | --- |"]
    rows = [(str(index + 1), row) for index, row in enumerate(results["experts"])]
    if "routed" in results:
        rows.append((f"routed: {results['routed']['mean_experts']['all']:.2f}", results["routed"]))
    for name, row in rows:
        cells = ["–" if row[key] is None else f"{row[key]:.2f}" for key in ("all", "many", "medium", "few", "ece")]
        lines.append(f"| {name} | {' | '.join(cells)} | {row['macs'] / 1e6:.1f} |")
    return "\n".join(lines)


def _recipe(options: argparse.Namespace) -> Recipe:
    if options.recipe not in RECIPES:
        raise RecipeError(f"{options.recipe}: no such recipe; there are {', '.join(RECIPES)}")
    settings: dict[str, str] = {}
    for text in options.set:
        key, separator, value = text.partition("=")
        if not separator:
            raise RecipeError(f"--set {text}: must be field=value")
        settings[key] = value
    recipe = RECIPES[options.recipe]
    if options.smoke:
        natural = recipe.profile == "natural"
        recipe = recipe.override(
            {key: text for key, text in SMOKE.items() if not natural or key not in ("n_max", "imbalance")}
        )
    if options.data:
        recipe = dataclasses.replace(recipe, data=options.data)
    return recipe.override(settings)


def _parser() -> argparse.ArgumentParser:
    fields = ", ".join(field.name for field in dataclasses.fields(Recipe))
    parser = argparse.ArgumentParser(
        prog="ride-train",
        description="Train a recipe and evaluate it on its test images. A run can be killed and resumed at any moment.",
        epilog=f"Recipes: {', '.join(RECIPES)}. Fields for --set: {fields}. What they mean: training/recipe.py.",
    )
    parser.add_argument("recipe", help="name of the recipe")
    parser.add_argument("--data", help="cifar10, cifar100, a directory of class folders, or one with train*.parquet")
    parser.add_argument("--out", type=Path, help="run directory [default: runs/RECIPE]")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="override a field of the recipe"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of the run directory")
    parser.add_argument(
        "--smoke", action="store_true", help="two epochs on a small subset: shows that all works, learns little"
    )
    return parser


def _fail(reason: object) -> int:
    print(f"ride-train: {reason}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
