"""The command line: ride-export RUN -o BUNDLE."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from model_export.bundle import BundleError, Manifest


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, or 2 after a message for the caller's mistakes."""
    options = _parser().parse_args(arguments)
    from model_export.export import export
    from training.checkpoint import CheckpointError
    from training.data.sets import DataError

    try:
        manifest = export(
            options.run, options.output, name=options.name, version=options.version,
            max_mean_experts=options.max_mean_experts, max_accuracy_loss=options.max_accuracy_loss, data=options.data,
        )  # fmt: skip
    except (BundleError, CheckpointError, DataError) as error:
        print(f"ride-export: {error}", file=sys.stderr)
        return 2
    print(table(manifest))
    print(f"next: ride-serve --bundle {options.output}")
    return 0


def table(manifest: Manifest) -> str:
    """The calibration table and the parity figures, as text."""
    parity = manifest.variants[manifest.default_variant].parity
    lines = [
        f"{manifest.name} {manifest.version}: {len(manifest.classes)} classes, {manifest.n_experts} experts",
        f"parity on {parity.images} held-out images: logits within {parity.max_abs_logit_difference:g}, "
        f"same class on {parity.top1_agreement:.2%}, same number of experts on {parity.experts_used_agreement:.2%}",
        f"calibration on {manifest.calibration.images} images ({manifest.calibration.data}); * is the default",
        "  experts  M MACs    all   many  medium   few  thresholds",
    ]
    for point in manifest.calibration.points:
        accuracy = (point.accuracy.all, point.accuracy.many, point.accuracy.medium, point.accuracy.few)
        cells = " ".join("     –" if value is None else f"{value:6.2f}" for value in accuracy)
        mark = "*" if point.thresholds == manifest.thresholds else " "
        thresholds = " ".join(f"{threshold:.4f}" for threshold in point.thresholds)
        lines.append(f"{mark} {point.mean_experts:7.3f}  {point.mean_macs / 1e6:6.1f} {cells}  {thresholds}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ride-export",
        description="Write a finished run as a bundle: graphs, manifest, parity figures, calibration table.",
    )
    parser.add_argument("run", type=Path, help="run directory that ride-train made")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="BUNDLE", help="directory to write")
    parser.add_argument("--name", help="of the model, in every answer [default: the recipe's]")
    parser.add_argument("--version", default="1", help="of the model, in every answer [default: 1]")
    parser.add_argument("--data", help="where the images lie now, if not where the recipe says")
    parser.add_argument(
        "--max-mean-experts", type=float, metavar="N",
        help="the default thresholds are instead the most accurate that need at most so many experts per image",
    )  # fmt: skip
    parser.add_argument(
        "--max-accuracy-loss", type=float, default=0.3, metavar="POINTS",
        help="the default thresholds are the cheapest that lose at most so many percentage points on held-out images; "
             "more saves experts and costs accuracy, of rare classes first [default: 0.3]",
    )  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(main())
