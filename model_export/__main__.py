"""The command line: ride-export RUN -o BUNDLE."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from model_export.bundle import RISK_CONFIDENCE, Accuracy, BundleError, Manifest, OperatingPoint, Risk, Rule

COMPARED_COSTS = (0.6, 0.75, 0.9)  # of all experts, at which the rules are compared


def main(arguments: list[str] | None = None) -> int:
    """
    Run the command.

    Returns:
        The exit status: 0; 2 after a message for the caller's mistakes; 130 after Ctrl-C.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.risk_confidence is not None and options.max_risk is None:
        parser.error("--risk-confidence: says how sure --max-risk must be, which is not given")
    for sig in (signal.SIGTERM, signal.SIGHUP):  # so that what is half written goes
        if signal.getsignal(sig) != signal.SIG_IGN:  # as nohup has it
            signal.signal(sig, lambda number, _: sys.exit(128 + number))
    try:
        from model_export.export import Wish, export
        from model_export.precision import obstacle, parse_precisions
        from training.errors import TrainingError
        from training.recipe import parse_settings
    except ModuleNotFoundError as error:  # the service can be installed without what exporting needs
        print(f"ride-export: {error}; install the extras 'train' and 'export', as README.md says", file=sys.stderr)
        return 2

    try:
        precisions = []
        for precision in parse_precisions(options.variants):
            reason = obstacle(precision)
            if reason is None:
                precisions.append(precision)
            else:
                print(f"variant {precision} is left out: {reason}")
        wish = Wish(
            options.rule, options.max_mean_experts, options.max_accuracy_loss, options.max_risk,
            RISK_CONFIDENCE if options.risk_confidence is None else options.risk_confidence,
        )  # fmt: skip
        manifest = export(
            options.run, options.output, name=options.name, version=options.version, wish=wish, precisions=precisions,
            data=options.data, settings=parse_settings(options.set),
        )  # fmt: skip
    except (BundleError, TrainingError) as error:
        print(f"ride-export: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"ride-export: {error.filename or options.output}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ride-export: interrupted", file=sys.stderr)
        return 130
    print(table(manifest))
    print(f"next: ride-serve --bundle {options.output}")
    return 0


def table(manifest: Manifest) -> str:
    """The variants' parity figures, the default rule's operating points and the rules beside each other, as text."""
    calibration = manifest.calibration
    lines = [
        f"{manifest.name} {manifest.version}: {len(manifest.classes)} classes, {manifest.n_experts} experts",
        *_published_lines(manifest),
        *_variant_lines(manifest),
        f"the rule {manifest.rule} on {calibration.images} images ({calibration.data}); * is the default",
        "  experts  M MACs    all   many  medium   few  thresholds",
    ]
    for point in calibration.points:
        if point.rule == manifest.rule:
            mark = "*" if point.thresholds == manifest.thresholds else " "
            thresholds = " ".join(f"{threshold:.4f}" for threshold in point.thresholds)
            lines.append(f"{mark} {_cost(point)} {_cells(point.accuracy)}  {thresholds}")
    if manifest.n_experts > 1:
        lines += _comparison(manifest)
    if calibration.risk is not None:
        lines += _risk_lines(calibration.risk, manifest)
    return "\n".join(lines)


def _published_lines(manifest: Manifest) -> Iterator[str]:
    """Of a checkpoint of the authors: which, and what was taken for things that it does not say."""
    published = manifest.provenance.get("published")
    if published is not None:
        yield f"{published['file']}: {published['arch']} after epoch {published['epoch']}; it does not say:"
        settings = [(name, value) for name, value in published["assumed"].items() if value is not None]
        yield "  " + ", ".join(f"{name}={','.join(map(str, _listed(value)))}" for name, value in settings)


def _listed(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]


def _variant_lines(manifest: Manifest) -> Iterator[str]:
    checkpoint = manifest.variants["fp32"].parity
    yield f"variants on {checkpoint.images} held-out images, routed by the default:"
    yield "  (closer than 0.001 to another decision counts as the same; classes are those after the checkpoint's exits)"
    yield "             all   many  medium   few  experts  same class  same experts  logits within"
    yield f"  checkpoint {_cells(checkpoint.checkpoint_accuracy)} {checkpoint.checkpoint_mean_experts:8.3f}"
    for name, variant in manifest.variants.items():
        parity = variant.parity
        line = (
            f"  {name:10} {_cells(parity.accuracy)} {parity.mean_experts:8.3f} {parity.top1_agreement:11.2%} "
            f"{parity.experts_used_agreement:13.2%} {parity.max_abs_logit_difference:14.3g}"
        )
        if not variant.faithful:
            loss, split = max((loss, split) for split, loss in parity.losses.items())
            line += f"  loses {loss:.2f} points on {split}: not used unless asked for"
        yield line


def _comparison(manifest: Manifest) -> Iterator[str]:
    """Each rule's most accurate point within a few costs, one line for each."""
    points = manifest.calibration.points
    full = max(point.mean_macs for point in points)
    yield "rules compared: the most accurate point of each that needs at most so many M MACs"
    yield "  at most  rule        experts  M MACs    all   many  medium   few"
    for share in COMPARED_COSTS:
        for rule in get_args(Rule):
            within = [point for point in points if point.rule == rule and point.mean_macs <= share * full]
            if within:
                best = max(within, key=lambda point: (point.accuracy.all, -point.mean_macs))
                yield f"  {share * full / 1e6:7.1f}  {rule:10} {_cost(best)} {_cells(best.accuracy)}"


def _risk_lines(risk: Risk, manifest: Manifest) -> Iterator[str]:
    exits = max(manifest.thresholds, default=0.0) > 0
    if exits:
        yield (
            f"risk: early exit loses at most {risk.max_risk:g} points of accuracy with {risk.confidence:.4g} "
            f"confidence, every held-out image counted alike: {risk.loss:.2f} on {risk.images} images that did not "
            f"choose, bound {risk.upper_bound:.2f}"
        )
    elif manifest.n_experts > 1:
        yield (
            f"risk: of the early exits by the rule {manifest.rule} that were tried none can be certified to lose at "
            f"most {risk.max_risk:g} points with {risk.confidence:.4g} confidence on {risk.images} images; every image "
            "runs all experts"
        )
    else:
        yield (
            f"risk: a single expert leaves nothing to exit from; at most {risk.max_risk:g} points with "
            f"{risk.confidence:.4g} confidence, on {risk.images} images, may be lost by precisions other than fp32"
        )
    for name, bound in risk.variants.items():
        failed = "" if bound <= risk.max_risk else ": not used unless asked for"
        yield f"  {name}, against all experts of the checkpoint: bound {bound:.2f}{failed}"
    if not exits:
        return
    tail = {name: loss for name, loss in risk.loss_by_split.items() if loss is not None}
    yield "  lost on " + ", ".join(f"{name} {loss:.2f}" for name, loss in tail.items())
    if tail.get("few", 0.0) > risk.max_risk:
        yield (
            f"  the few split loses {tail['few']:.2f} points, more than {risk.max_risk:g}: the bound holds for all "
            "images together, not for rare classes alone"
        )


def _cost(point: OperatingPoint) -> str:
    return f"{point.mean_experts:7.3f}  {point.mean_macs / 1e6:6.1f}"


def _cells(accuracy: Accuracy) -> str:
    values = (accuracy.all, accuracy.many, accuracy.medium, accuracy.few)
    return " ".join("     –" if value is None else f"{value:6.2f}" for value in values)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ride-export",
        description="Write a finished run as a bundle: graphs, manifest, parity figures, calibration table.",
    )
    parser.add_argument(
        "run", type=Path,
        help="run directory that ride-train made, or a checkpoint file that RIDE's authors published (.pth, stage 1 or "
             "with routers), of which no code is run",
    )  # fmt: skip
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="BUNDLE", help="directory to write")
    parser.add_argument("--name", help="of the model, in every answer [default: the recipe's]")
    parser.add_argument("--version", default="1", help="of the model, in every answer [default: 1]")
    parser.add_argument(
        "--data",
        help="where the images lie now, if not where the recipe says; a published checkpoint needs it, for classes, "
             "their counts and held-out images: cifar100, a directory with train and test class folders or parquet "
             "files",
    )  # fmt: skip
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE",
        help="what a published checkpoint does not say, as a field of the recipe: profile and imbalance of its data, "
             "mean, std, cosine_scale; a wrong one gives other answers than the authors' [default: as for CIFAR-100-LT "
             "with imbalance 100; for other nets than ResNet-32 a natural profile, ImageNet's mean and std]; "
             "of a run image_root, if that is not where it was",
    )  # fmt: skip
    parser.add_argument(
        "--variants", default="fp32,bf16,fp16,int8", metavar="LIST",
        help="precisions to write besides fp32, which is the reference; one that loses more than 0.3 points in a split "
             "is written with its figures and served only where it is asked for [default: fp32,bf16,fp16,int8]",
    )  # fmt: skip
    parser.add_argument(
        "--rule", choices=get_args(Rule),
        help="what decides by default whether another expert runs; the table has the points of every rule, and a "
             "service may choose another [default: router, or confidence for a published checkpoint without routers]",
    )  # fmt: skip
    wish = parser.add_mutually_exclusive_group()
    wish.add_argument(
        "--max-mean-experts", type=float, metavar="N",
        help="the default thresholds are instead the most accurate that need at most so many experts per image",
    )  # fmt: skip
    wish.add_argument(
        "--max-accuracy-loss", type=float, metavar="POINTS",
        help="the default thresholds are the cheapest that lose at most so many percentage points on held-out images; "
             "more saves experts and costs accuracy, of rare classes first [default: 0.3; the routers of a published "
             "checkpoint keep their threshold of 0.5]",
    )  # fmt: skip
    wish.add_argument(
        "--max-risk", type=float, metavar="POINTS",
        help="the default thresholds are instead the cheapest that are certified to lose at most so many percentage "
             "points against all experts, every held-out image counted alike; half of them choose, half of them test",
    )  # fmt: skip
    parser.add_argument(
        "--risk-confidence", type=float, metavar="SHARE",
        help=f"how sure --max-risk must be; more sure needs more experts [default: {RISK_CONFIDENCE}]",
    )  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(main())
