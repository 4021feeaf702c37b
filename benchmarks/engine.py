"""
The engine by itself, in this process: images per second for each batch size, against what its graphs allow.

    python -m benchmarks.engine                                       # the bundle that ships, on this machine
    python -m benchmarks.engine --provider cuda --random ride-imagenet-lt-x50 --batches 1,8,32,128

No HTTP, no decoding: the service's cascade and engine on pixels that are ready. The bound is what an image would take
if each of its stages ran at the batch size that suits it best: the trunk, and every expert as often as the thresholds
call for it. Answers are compared with those of the fp32 graphs on the CPU; the command fails where fp32 or fp16 on
another device say something else (`TOLERANCES`).
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.floor import MAX_PIXELS
from benchmarks.images import SMALL, make_images
from benchmarks.machine import describe
from model_export.bundle import Bundle, Manifest, read_bundle
from service.cascade import BatchReport, Cascade, Engine, Job, Outcome
from service.engine import open_engine
from service.images import decode
from service.schedule import Profile, Schedule
from service.settings import DEFAULT_BUNDLE

BATCHES: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
REPEATS: Final = 5  # of each stage at each size, the median counts
COMPARED: Final = 256  # images whose answers are compared
RANDOM_CLASSES: Final = 100
# By variant: how far the first probability may be from the CPU's, and the least share of images with the same class,
# and with as many experts. What int8 and bf16 may lose, parity says.
TOLERANCES: Final = {"fp32": (1e-3, 0.99), "fp16": (2e-2, 0.98)}


@dataclass(frozen=True)
class EngineResult:
    """
    What one engine does.

    Attributes:
        stages: stage -> batch size -> microseconds per image, an expert with its router.
        bound: images per second, every stage at its best batch size.
        routed: batch size -> images per second, every batch to its end.
        merged: the same where survivors of several batches may meet.
        all_experts: the same without early exit.
        one_image_ms: median of one image alone, routed.
        agreement: with the fp32 graphs on the CPU: largest difference of a probability, shares of images with the same
            first class and with as many experts.
    """

    provider: str
    variant: str
    stages: Mapping[str, Mapping[int, float]]
    mean_experts: float
    bound: float
    routed: Mapping[int, float]
    merged: Mapping[int, float]
    all_experts: Mapping[int, float]
    one_image_ms: float
    agreement: Mapping[str, float]


class NullObserver:
    """Ignores every step."""

    def batch_done(self, report: BatchReport) -> None:
        """Nothing."""


class _Bench:
    """An engine, the images, and how they are routed."""

    def __init__(self, bundle: Bundle, engine: Engine, images: Sequence[NDArray[np.uint8]]) -> None:
        self.manifest = bundle.manifest
        self.thresholds = bundle.manifest.thresholds
        self.engine = engine
        self.images = images

    def route_like(self, reach: Sequence[float]) -> None:
        """Set the thresholds so that these shares of the images reach expert 0, 1, ..."""
        self.thresholds = (0.0,) * len(self.thresholds)
        scores = np.array([outcome.router_scores for outcome in self.answers(32)])
        thresholds: list[float] = []
        for index in range(len(self.thresholds)):  # no score reaches 2
            least = (
                float(np.quantile(scores[:, index], 1 - reach[index + 1] / reach[index])) if reach[index + 1] else 2.0
            )
            thresholds.append(least)
            scores = scores[scores[:, index] >= least]
        self.thresholds = tuple(thresholds)

    def cascade(self, schedule: Schedule) -> Cascade:
        manifest = self.manifest
        return Cascade(
            self.engine, n_experts=manifest.n_experts, n_classes=len(manifest.classes), rule=manifest.rule,
            schedule=schedule, observer=NullObserver(),
        )  # fmt: skip

    def jobs(self, *, routed: bool = True) -> list[Job]:
        manifest = self.manifest
        thresholds = self.thresholds if routed else (0.0,) * len(self.thresholds)
        return [Job(image, thresholds, manifest.n_experts, 0.0, 1, 0.0) for image in self.images]

    def answers(self, batch: int) -> list[Outcome]:
        """Of every image."""
        cascade, jobs = self.cascade(Schedule(batch)), self.jobs()
        found = [
            outcome for first in range(0, len(jobs), batch) for outcome in cascade.run(jobs[first : first + batch])
        ]
        for outcome in found:
            if isinstance(outcome, Exception):
                raise outcome
        return [outcome for outcome in found if isinstance(outcome, Outcome)]

    def stages(self, batches: Sequence[int], reach: Sequence[float]) -> dict[str, dict[int, float]]:
        """Seconds of each stage and batch size; an expert that no image reaches is left out."""
        times: dict[str, dict[int, float]] = {}
        for size in batches:
            pixels = np.stack([self.images[row % len(self.images)] for row in range(size)])
            logits_sum = np.zeros((size, len(self.manifest.classes)), np.float32)
            features = self.engine.trunk(pixels)
            times.setdefault("trunk", {})[size] = _median(partial(self.engine.trunk, pixels))
            for index in range(self.manifest.n_experts):
                if reach[index]:
                    run = partial(self._expert, index, features, logits_sum)
                    times.setdefault(f"expert_{index}", {})[size] = _median(run)
        return times

    def _expert(self, index: int, features: Any, logits_sum: NDArray[np.float32]) -> None:
        logits_sum, expert_feature = self.engine.expert(index, features, logits_sum)
        if index < self.manifest.n_experts - 1 and self.manifest.rule == "router":
            self.engine.router(index, expert_feature, logits_sum)

    def rate(self, schedule: Schedule, seconds: float, *, routed: bool = True) -> float:
        """Images per second where there are always more of them than a batch takes."""
        cascade, jobs = self.cascade(schedule), self.jobs(routed=routed)
        while len(jobs) < 4 * schedule.max_batch:  # none is under way twice
            jobs += self.jobs(routed=routed)
        cascade.run(jobs[: schedule.max_batch])
        done, turn = 0, 0
        began = time.perf_counter()
        while (now := time.perf_counter()) < began + seconds:
            fresh = cascade.wants(schedule.max_batch)
            batch = [jobs[(turn + place) % len(jobs)] for place in range(fresh)]
            turn += fresh
            done += len(cascade.step(batch))
        return done / (now - began)


def measure_engine(
    bundle: Bundle, *, provider: str, variant: str | None, threads: int, batches: Sequence[int], seconds: float,
    seed: int, like: Sequence[float] | None = None,
) -> EngineResult:  # fmt: skip
    """
    Measure one engine at each batch size.

    Args:
        like: shares of the images that reach expert 0, 1, ..., in place of what the bundle's thresholds say.
        seconds: of each rate.

    Raises:
        BundleError, EngineError: as `open_engine`.
        NotFiniteError: where a graph gives NaN or infinity for one of the images.
    """
    manifest = bundle.manifest
    jpegs = make_images(SMALL, count=512, seed=seed).jpegs
    images = [decode(jpeg, manifest.input, MAX_PIXELS) for jpeg in jpegs]
    engine = open_engine(bundle, variant, provider=provider, threads=threads)
    bench = _Bench(bundle, engine, images)
    reference = open_engine(bundle, "fp32", provider="cpu", threads=threads)
    compared, expected = (_Bench(bundle, each, images[:COMPARED]) for each in (engine, reference))
    if like is not None:
        bench.route_like(like)
        compared.thresholds = expected.thresholds = bench.thresholds
    agreement = _agreement(compared.answers(32), expected.answers(32))
    used = np.array([outcome.experts_used for outcome in bench.answers(32)])
    reach = [float((used > expert).mean()) for expert in range(manifest.n_experts)]
    stages = bench.stages(batches, reach)
    best = {stage: min(taken / size for size, taken in times.items()) for stage, times in stages.items()}
    needed = best["trunk"] + sum(reach[index] * best.get(f"expert_{index}", 0.0) for index in range(manifest.n_experts))
    profile = Profile(stages)
    one = bench.cascade(Schedule(1))
    jobs = bench.jobs()
    return EngineResult(
        provider=engine.provider, variant=engine.variant,
        stages={stage: {size: 1e6 * taken / size for size, taken in times.items()} for stage, times in stages.items()},
        mean_experts=float(used.mean()), bound=1 / needed,
        routed={size: bench.rate(Schedule(size), seconds) for size in batches},
        merged={
            size: bench.rate(Schedule(size, merges=True, profile=profile, reach=reach), seconds)
            for size in batches if all(reach)
        },
        all_experts={size: bench.rate(Schedule(size), seconds, routed=False) for size in batches},
        one_image_ms=1000 * statistics.median(_timed(partial(one.run, [job])) for job in jobs[:200]),
        agreement=agreement,
    )  # fmt: skip


def random_bundle(recipe_name: str, directory: Path, seed: int) -> Path:
    """
    A bundle of an untrained network, for its speed alone, made by ride-export from a run that never took place.

    Args:
        recipe_name: of a recipe that trains routers.

    Returns:
        The bundle's directory, below `directory`.
    """
    import torch

    from model_export.export import Wish, export
    from training.checkpoint import save_checkpoint
    from training.data.sets import load_data
    from training.recipe import CIFAR_MEAN, CIFAR_STD
    from training.recipes import RECIPES
    from training.train import METHODS

    folder, run, target = directory / "images", directory / "run", directory / "bundle"
    jpegs = make_images(SMALL, count=4 * RANDOM_CLASSES, seed=seed).jpegs
    for number, jpeg in enumerate(jpegs):
        home = folder / f"class {number % RANDOM_CLASSES:03}"
        home.mkdir(parents=True, exist_ok=True)
        (home / f"{number}.jpg").write_bytes(jpeg)
    recipe = RECIPES[recipe_name].override({"data": str(folder), "profile": "natural", "holdout_share": "0.25"})
    data = load_data(recipe)
    mean, std = recipe.mean or CIFAR_MEAN, recipe.std or CIFAR_STD
    torch.manual_seed(seed)
    model, _ = METHODS[recipe.method](recipe, data.counts, mean, std)
    info = {
        "recipe": recipe.to_dict(), "classes": data.classes, "class_counts": data.counts,
        "mean": mean, "std": std, "metrics": {}, "commit": "untrained",
    }  # fmt: skip
    for stage, epochs in recipe.stage_epochs().items():
        save_checkpoint(run, stage, epochs, model, None, info)
    export(
        run, target, name=f"untrained-{recipe_name}", version="0", wish=Wish(max_mean_experts=2.08),
        precisions=("fp32", "fp16"), data=None,
    )  # fmt: skip
    return target


def default_share(manifest: Manifest) -> tuple[float, ...]:
    """
    Shares of held-out images that use 1, 2, ... experts by the bundle's own thresholds.

    Raises:
        ValueError: where calibration did not measure these.
    """
    point = manifest.default_point
    if point is None:
        raise ValueError(f"{manifest.name}: its calibration table has no point of its own thresholds")
    return point.experts_share


def reach_of(share: Sequence[float]) -> list[float]:
    """Shares of the images that reach expert 0, 1, ..., of those that use 1, 2, ... experts."""
    return [sum(share[expert:]) for expert in range(len(share))]


def _agreement(found: Sequence[Outcome], expected: Sequence[Outcome]) -> dict[str, float]:
    """Of the probabilities only where both used as many experts."""
    pairs = list(zip(found, expected, strict=True))
    alike = [(one, other) for one, other in pairs if one.experts_used == other.experts_used]
    same = [(one, other) for one, other in alike if one.classes[0] == other.classes[0]]
    return {
        "images": len(pairs),
        "same_first_class": float(np.mean([one.classes[0] == other.classes[0] for one, other in pairs])),
        "same_experts_used": len(alike) / len(pairs),
        "largest_difference": max(
            (abs(one.probabilities[0] - other.probabilities[0]) for one, other in same), default=math.inf
        ),
    }


def beyond_tolerance(result: EngineResult) -> str | None:
    """What is not as on the CPU; None where all is."""
    if result.variant not in TOLERANCES:
        return None
    difference, share = TOLERANCES[result.variant]
    found = result.agreement
    wrong = [
        f"{name} {found[name]:.3f}, at least {share}"
        for name in ("same_first_class", "same_experts_used")
        if found[name] < share
    ]
    if not found["largest_difference"] <= difference:
        wrong.append(f"largest_difference {found['largest_difference']:.1e}, at most {difference:g}")
    if not wrong:
        return None
    return f"{result.variant} on {result.provider} is not what fp32 is on the CPU: {'; '.join(wrong)}"


def _median(run: Callable[[], object]) -> float:
    run()  # warms up
    return statistics.median(_timed(run) for _ in range(REPEATS))


def _timed(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def table(result: EngineResult) -> str:
    """As Markdown."""
    stages = list(result.stages)
    lines = [
        f"{result.variant} on {result.provider}; {result.mean_experts:.2f} experts; bound {result.bound:,.0f} "
        f"images/s, reached {max(result.routed.values()) / result.bound:.2f} of it; "
        f"one image {result.one_image_ms:.3f} ms; "
        f"against fp32 on the CPU: {100 * result.agreement['same_first_class']:.1f} % the same first class, "
        f"{100 * result.agreement['same_experts_used']:.1f} % as many experts, probabilities within "
        f"{result.agreement['largest_difference']:.1e} where both are",
        "",
        f"| batch | {' | '.join(f'{stage}, us per image' for stage in stages)} | routed, images/s | survivors may meet "
        "| all experts |",
        "| --- |" + " --- |" * (len(stages) + 3),
    ]
    for size in result.routed:
        times = " | ".join(f"{result.stages[stage][size]:.0f}" for stage in stages)
        merged = f"{result.merged[size]:,.0f}" if size in result.merged else "–"
        lines.append(f"| {size} | {times} | {result.routed[size]:,.0f} | {merged} | {result.all_experts[size]:,.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table, and keep all of it as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=DEFAULT_BUNDLE, metavar="DIR", help="[default: the one we ship]")
    parser.add_argument(
        "--random", metavar="RECIPE", help="in place of a bundle, a recipe's network with random weights"
    )
    parser.add_argument(
        "--provider", choices=("auto", "cpu", "openvino", "cuda", "tensorrt"), default="auto",
        help="[default: %(default)s]",
    )  # fmt: skip
    parser.add_argument("--variant", metavar="NAME", help="[default: what the provider is fastest at]")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU [default: 1]")
    parser.add_argument(
        "--batches", type=lambda text: tuple(int(size) for size in text.split(",")), default=BATCHES, metavar="N,N",
        help="[default: 1 to 512]",
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, default=1.0, help="of each rate [default: 1]")
    parser.add_argument("--seed", type=int, default=0, help="of images and random weights [default: 0]")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write everything there as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        path, like = options.bundle, None
        if options.random:
            path = random_bundle(options.random, Path(scratch), options.seed)
            like = reach_of(default_share(read_bundle(DEFAULT_BUNDLE).manifest))
        result = measure_engine(
            read_bundle(path), provider=options.provider, variant=options.variant, threads=options.threads,
            batches=options.batches, seconds=options.seconds, seed=options.seed, like=like,
        )  # fmt: skip
    print(table(result))
    failure = beyond_tolerance(result)
    if options.out is not None:
        more = {"engine": asdict(result), "measured": describe(options.seed, {"threads": options.threads})}
        options.out.write_text(json.dumps(more, indent=2) + "\n", encoding="utf-8")
    if failure:
        raise SystemExit(failure)


if __name__ == "__main__":
    main()
