"""Every graph is run at several batch sizes before the first image comes, and its times are noted."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np

from model_export.bundle import Manifest, Rule
from service.cascade import BatchReport, Cascade, Engine, Job, NotFiniteError
from service.engine import EngineError, batch_size_for
from service.logs import log
from service.schedule import Profile, Schedule
from service.settings import GPU_PROVIDERS, Settings, SettingsError

PROFILE_RUNS: Final = 5
CPU_BATCH, INT8_BATCH, GPU_BATCH = 16, 24, 64  # by benchmarks/NOTES.md; the last one was never run


class RunningEngine(Engine, Protocol):
    """An engine that says what it runs, and on what."""

    provider: str
    variant: str


@dataclass(frozen=True, slots=True)
class WarmUp:
    """How long the graphs of an engine took, which has run all of them, and what follows for batches."""

    profile: Profile
    max_batch: int
    on_gpu: bool


def choose_variant(manifest: Manifest, settings: Settings) -> str:
    """
    The one that is asked for; else the bundle's default, in whose place the engine may choose another.

    Raises:
        SettingsError: where the bundle lacks it.
    """
    if settings.variant not in (None, *manifest.variants):
        raise SettingsError(
            f"RIDE_VARIANT is {settings.variant!r}, {manifest.name} has the variants {sorted(manifest.variants)}"
        )
    return settings.variant or manifest.default_variant


def warm_up(engine: RunningEngine, manifest: Manifest, settings: Settings, rule: Rule) -> WarmUp:
    """
    Run every graph, at the batch sizes that the settings allow.

    Raises:
        EngineError, NotFiniteError: as `measure_profile`.
    """
    on_gpu = engine.provider in GPU_PROVIDERS
    on_cpu = INT8_BATCH if manifest.variants[engine.variant].precision == "int8" else CPU_BATCH
    max_batch = settings.max_batch or (GPU_BATCH if on_gpu else on_cpu)
    return WarmUp(measure_profile(engine, manifest, rule, max_batch, on_gpu=on_gpu), max_batch, on_gpu)


class _Stopwatch:
    """Watches the warm-up, which is no work and shall not be counted: stage -> batch size -> shortest seconds."""

    def __init__(self) -> None:
        self.shortest: dict[str, dict[int, float]] = {}

    def batch_done(self, report: BatchReport) -> None:
        for stage, images, seconds in report.stages:
            times = self.shortest.setdefault(stage, {})
            times[images] = min(seconds, times.get(images, seconds))


def measure_profile(engine: RunningEngine, manifest: Manifest, rule: Rule, max_batch: int, *, on_gpu: bool) -> Profile:
    """
    Send blank images of several batch sizes through every graph, which also warms them up; keep the shortest times.

    Raises:
        EngineError: where a graph fails, as for want of memory.
        NotFiniteError: where a graph gives NaN or infinity even for a blank image.
    """
    watch = _Stopwatch()
    cascade = Cascade(
        engine, n_experts=manifest.n_experts, n_classes=len(manifest.classes), rule=rule,
        schedule=Schedule(max_batch), observer=watch,
    )  # fmt: skip
    blank = np.zeros((manifest.input.height, manifest.input.width, 3), np.uint8)
    thresholds = (0.0,) * (manifest.n_experts - 1)

    def failure(images: int, error: Exception) -> EngineError:
        log(logging.ERROR, "warm_up_failed", error=error)
        return EngineError(
            f"a batch of {images} images fails on {engine.provider}: {error}; where memory is short, "
            "lower RIDE_MAX_BATCH"
        )

    def run(limits: Sequence[int]) -> None:
        """A batch of images that may have so many experts each."""
        for outcome in cascade.run([Job(blank, thresholds, limit, 0.0, 1, 0.0) for limit in limits]):
            if isinstance(outcome, NotFiniteError):
                raise outcome
            if isinstance(outcome, Exception):
                raise failure(len(limits), outcome) from outcome

    for size in warm_up_sizes(max_batch, on_gpu=on_gpu):
        for _ in range(PROFILE_RUNS):
            run([manifest.n_experts] * size)
    if max_batch > 1:  # half of them stop after one expert, so that a batch is compacted as well
        run([1 + row % 2 for row in range(max_batch)])
        half = np.stack([blank] * (max_batch // 2))
        try:  # as survivors of two batches that meet
            engine.join([engine.trunk(half), engine.trunk(half)])
        except Exception as error:
            raise failure(2 * len(half), error) from error
    return Profile(watch.shortest)


def warm_up_sizes(max_batch: int, *, on_gpu: bool) -> list[int]:
    """
    Powers of two, and the largest batch; on a GPU all that are filled up to different sizes.

    There the largest comes first: TensorRT, by the source of its provider, builds a graph's engine for the range of
    sizes that it has seen, anew for each that lies outside, which takes minutes.
    """
    if on_gpu:
        *others, largest = sorted({min(batch_size_for(rows), max_batch) for rows in range(1, max_batch + 1)})
        return [largest, *others]
    sizes = [2**power for power in range(max_batch.bit_length()) if 2**power < max_batch]
    return [*sizes, max_batch]
