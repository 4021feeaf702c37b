"""
Trunk, expert, router, stop or go on: the early exit.

Rows that are finished leave the batch before the next expert runs. An image never stops early, or is carried along,
because of the company it happens to be in.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float32]
Rows: TypeAlias = NDArray[np.int64]

EXIT_REASONS: Final = ("confident", "last", "budget")
CONFIDENT, LAST, BUDGET = range(3)


class Engine(Protocol):
    """
    Runs the graphs. What stays on the device is opaque here (Any); what the cascade decides on comes as numpy.

    B rows, C classes.
    """

    def trunk(self, images: NDArray[np.uint8]) -> Any:
        """(B, H, W, 3) to features."""

    def expert(self, index: int, features: Any, logits_sum: Floats) -> tuple[Floats, Any]:
        """Features and (B, C) to the new (B, C) and the expert's feature."""

    def router(self, index: int, expert_feature: Any, logits_sum: Floats) -> Floats:
        """The expert's feature and (B, C) to (B,), how much the next expert is needed."""

    def take(self, features: Any, rows: Rows) -> Any:
        """The features of these rows only."""


@dataclass(frozen=True, slots=True)
class Job:
    """
    One image and how far its caller lets it go.

    Attributes:
        image: (H, W, 3), uint8.
        thresholds: one per router; the next expert runs where score >= threshold.
        queued_at: time.perf_counter() when it began to wait.
    """

    image: NDArray[np.uint8]
    thresholds: tuple[float, ...]
    max_experts: int
    top_k: int
    queued_at: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """The answer for one image: classes by falling probability; seconds per step, of the batch that it was in."""

    classes: list[int]
    probabilities: list[float]
    experts_used: int
    exit_reason: str
    router_scores: list[float]
    queue_s: float
    trunk_s: float
    experts_s: list[float]


@dataclass(slots=True)
class BatchReport:
    """What a batch did, for the metrics: (stage, rows, seconds) of each run, router scores, waits in seconds."""

    stages: list[tuple[str, int, float]] = field(default_factory=list)
    router_scores: list[tuple[int, list[float]]] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)


class Observer(Protocol):
    """Is told of every batch."""

    def batch_done(self, report: BatchReport) -> None:
        """Called from the engine's thread."""


class NotFiniteError(ArithmeticError):
    """A graph gave NaN or infinity for this image."""


class Cascade:
    """Answers batches of jobs. Not thread-safe: one thread at a time, as the engine."""

    def __init__(self, engine: Engine, *, n_experts: int, n_classes: int, observer: Observer) -> None:
        self._engine = engine
        self._n_experts = n_experts
        self._n_classes = n_classes
        self.observer = observer

    def run(self, jobs: Sequence[Job]) -> list[Outcome | Exception]:
        """
        Answer a batch, in its order.

        An image for which a graph gives NaN or infinity gets NotFiniteError, the others their answers. What the engine
        raises goes through, and is the fate of all.
        """
        started = time.perf_counter()
        n_jobs, n_experts = len(jobs), self._n_experts
        report = BatchReport(waits=[started - job.queued_at for job in jobs])
        thresholds = np.array([job.thresholds for job in jobs], np.float32).reshape(n_jobs, n_experts - 1)
        max_experts = np.array([job.max_experts for job in jobs])
        final_logits = np.zeros((n_jobs, self._n_classes), np.float32)
        scores = np.zeros((n_jobs, n_experts - 1), np.float32)
        experts_used = np.zeros(n_jobs, np.int64)  # 0 until finished, and for failures
        reasons = np.zeros(n_jobs, np.int64)

        features = self._engine.trunk(np.stack([job.image for job in jobs]))
        report.stages.append(("trunk", n_jobs, _since(started)))
        rows = np.arange(n_jobs)  # the jobs that are still under way, by their place in the batch
        logits_sum = np.zeros((n_jobs, self._n_classes), np.float32)
        for expert in range(n_experts):
            stage_started = time.perf_counter()
            logits_sum, expert_feature = self._engine.expert(expert, features, logits_sum)
            usable = np.isfinite(logits_sum).all(axis=1)
            if expert == n_experts - 1:
                stops, reason = usable, LAST
            else:
                asked = self._engine.router(expert, expert_feature, logits_sum)
                scores[rows, expert] = asked
                usable &= np.isfinite(asked)
                report.router_scores.append((expert, asked[usable].tolist()))  # NaN would spoil a sum for ever
                confident = asked < thresholds[rows, expert]
                stops = usable & (confident | (max_experts[rows] == expert + 1))
                reason = np.where(confident, CONFIDENT, BUDGET)[stops]
            final_logits[rows[stops]] = logits_sum[stops]
            experts_used[rows[stops]] = expert + 1
            reasons[rows[stops]] = reason
            goes_on = np.flatnonzero(usable & ~stops)
            n_ran = len(rows)
            if 0 < len(goes_on) < n_ran:
                rows, logits_sum = rows[goes_on], logits_sum[goes_on]
                features = self._engine.take(features, goes_on)
            report.stages.append((f"expert_{expert}", n_ran, _since(stage_started)))
            if not len(goes_on):
                break
        outcomes = self._outcomes(jobs, final_logits, experts_used, reasons, scores, report)
        self.observer.batch_done(report)
        return outcomes

    def _outcomes(
        self,
        jobs: Sequence[Job],
        final_logits: Floats,
        experts_used: Rows,
        reasons: Rows,
        scores: Floats,
        report: BatchReport,
    ) -> list[Outcome | Exception]:
        probabilities = softmax(final_logits / np.maximum(experts_used, 1)[:, None])
        classes = top_classes(probabilities, np.array([job.top_k for job in jobs]))
        seconds = [stage[2] for stage in report.stages]
        outcomes: list[Outcome | Exception] = []
        for row, (used, reason, row_scores) in enumerate(
            zip(experts_used.tolist(), reasons.tolist(), scores.tolist(), strict=True)
        ):
            if not used:
                outcomes.append(NotFiniteError("a graph gave NaN or infinity"))
                continue
            outcomes.append(
                Outcome(
                    classes=classes[row].tolist(),
                    probabilities=probabilities[row, classes[row]].tolist(),
                    experts_used=used,
                    exit_reason=EXIT_REASONS[reason],
                    router_scores=row_scores[:used],
                    queue_s=report.waits[row],
                    trunk_s=seconds[0],
                    experts_s=seconds[1 : used + 1],
                )
            )
        return outcomes


def softmax(logits: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Softmax of each row, in double precision."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=1, keepdims=True))


def top_classes(probabilities: NDArray[np.float64], top_k: NDArray[np.int64]) -> list[Rows]:
    """The `top_k` most probable classes of each row, most probable first, the lower index first among equals."""
    classes: list[Rows] = [np.empty(0, np.int64)] * len(probabilities)
    for count in np.unique(top_k):
        rows = np.flatnonzero(top_k == count)
        least = -np.partition(-probabilities[rows], count - 1, axis=1)[:, count - 1]
        for row, bound in zip(rows, least, strict=True):
            found = np.flatnonzero(probabilities[row] >= bound)  # more than `count` where some tie for the last place
            classes[row] = found[np.argsort(-probabilities[row, found], kind="stable")[:count]]
    return classes


def _since(started: float) -> float:
    return time.perf_counter() - started
