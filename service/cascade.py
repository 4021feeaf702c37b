"""
Trunk, expert, exit rule, stop or go on: the early exit.

Rows that are finished leave the batch before the next expert runs, and are answered at once. An image never stops
early, or is carried along, because of the company it happens to be in.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from model_export.bundle import Rule
from service.schedule import Schedule

Floats: TypeAlias = NDArray[np.float32]
Rows: TypeAlias = NDArray[np.int64]

EXIT_REASONS: Final = ("confident", "last", "budget")
FEW_CLASSES: Final = 12  # up to here, looking for the best so many times is faster than sorting all


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

    def join(self, features: Sequence[Any]) -> Any:
        """The features of several batches, one after the other."""


@dataclass(slots=True, eq=False)
class Job:
    """
    One image and how far its caller lets it go.

    Attributes:
        image: (H, W, 3), uint8.
        thresholds: one per expert but the last; the next expert runs where score >= threshold.
        min_confidence: the next expert also runs where the highest probability is below this.
        queued_at: time.perf_counter() when it began to wait.
        abandoned: nobody waits for the answer any more; it leaves its batch before the next expert.
    """

    image: NDArray[np.uint8]
    thresholds: tuple[float, ...]
    max_experts: int
    min_confidence: float
    top_k: int
    queued_at: float
    abandoned: bool = False


@dataclass(slots=True)
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
    """What a step did, for the metrics: (stage, rows, seconds) of each run, scores by expert, waits in seconds."""

    stages: list[tuple[str, int, float]] = field(default_factory=list)
    router_scores: list[tuple[int, list[float]]] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)


class Observer(Protocol):
    """Is told of every step."""

    def batch_done(self, report: BatchReport) -> None:
        """Called from the thread that runs the engine."""


class NotFiniteError(ArithmeticError):
    """A graph gave NaN or infinity for this image."""


class AbandonedError(Exception):
    """Nobody waited for this image any more, so that it was not answered."""


@dataclass(slots=True, eq=False)
class _Group:
    """B images that have come equally far; `expert` runs next. The seconds: waiting, trunk, each expert so far."""

    expert: int
    jobs: list[Job]
    features: Any
    logits_sum: Floats  # (B, C)
    thresholds: NDArray[np.float64]  # (B, E - 1)
    max_experts: Rows  # (B,)
    min_confidence: NDArray[np.float64]  # (B,)
    scores: Floats  # (B, E - 1)
    seconds: NDArray[np.float64]  # (B, 2 + E)
    best: Rows  # (B, E), each expert's own best class; kept only where the rule asks for it

    def keep(self, rows: Rows, features: Any) -> None:
        """Go on with these rows, whose features are given."""
        self.jobs = [self.jobs[row] for row in rows]
        self.features = features
        for name in _ROW_ARRAYS:
            setattr(self, name, getattr(self, name).take(rows, axis=0))


_ROW_ARRAYS: Final = ("logits_sum", "thresholds", "max_experts", "min_confidence", "scores", "seconds", "best")
Finished: TypeAlias = list[tuple[Job, Outcome | Exception]]


class Cascade:
    """
    Answers jobs, step by step. Not thread-safe: one step at a time, as the engine.

    A fresh batch passes trunk and first expert in one step; its survivors then wait for their next one, alone or, where
    the schedule says that it pays, for company.

    Attributes:
        observer: is told of every step.
        failures: how many steps in a row the engine failed as a whole.
        step_began: time.monotonic() when the step began that runs now; None between two.
    """

    def __init__(
        self, engine: Engine, *, n_experts: int, n_classes: int, rule: Rule, schedule: Schedule, observer: Observer
    ) -> None:
        self._engine = engine
        self._n_experts = n_experts
        self._n_classes = n_classes
        self._rule = rule
        self._schedule = schedule
        self._under_way: list[_Group] = []  # those that came furthest last; of equals, the one that came first first
        self._catching_up = False  # a batch was let pass; whoever came furthest waits until it has come as far
        self.observer = observer
        self.failures = 0
        self.step_began: float | None = None

    @property
    def busy(self) -> bool:
        """Whether images are between two stages."""
        return bool(self._under_way)

    def wants(self, waiting: int) -> int:
        """How many of the `waiting` jobs the next step begins with; 0: it goes on with those under way."""
        if not self._under_way:
            return min(waiting, self._schedule.max_batch)
        if self._catching_up:
            return 0
        furthest = next(group for group in self._under_way if group.expert == self._under_way[-1].expert)
        fresh = self._schedule.fresh_first(furthest.expert, len(furthest.jobs), waiting)
        self._catching_up = fresh > 0
        return fresh

    def step(self, jobs: Sequence[Job]) -> Finished:
        """
        Begin with `jobs`, or, without any, run the next expert on those that came furthest; return what is finished.

        An image for which a graph gives NaN or infinity gets NotFiniteError, the others their answers. What the engine
        raises is the fate of all that were in the step.
        """
        report = BatchReport()
        groups = [] if jobs else self._next_groups()
        finished: Finished = []
        self.step_began = time.monotonic()
        try:
            group = self._meet(groups, finished) if groups else self._begin(jobs, report)
            if group.jobs:
                finished += self._run_expert(group, report)
        except Exception as error:
            self.failures += 1
            fates: dict[Job, Outcome | Exception] = dict.fromkeys(jobs, error)
            fates |= {job: error for one in groups for job in one.jobs}
            return list((fates | dict(finished)).items())
        finally:
            self.step_began = None
        self.failures = 0
        self.observer.batch_done(report)
        return finished

    def run(self, jobs: Sequence[Job]) -> list[Outcome | Exception]:
        """Answer a batch to its end, in its order."""
        outcomes = dict(self.step(jobs))
        while self._under_way:
            outcomes.update(self.step([]))
        return [outcomes[job] for job in jobs]

    def _begin(self, jobs: Sequence[Job], report: BatchReport) -> _Group:
        started = time.perf_counter()
        n_jobs, n_experts = len(jobs), self._n_experts
        report.waits = [started - job.queued_at for job in jobs]
        images = np.concatenate([job.image for job in jobs]).reshape(n_jobs, *jobs[0].image.shape)  # faster than stack
        features = self._engine.trunk(images)
        seconds = np.zeros((n_jobs, 2 + n_experts))
        seconds[:, 0] = report.waits
        seconds[:, 1] = taken = time.perf_counter() - started
        report.stages.append(("trunk", n_jobs, taken))
        return _Group(
            expert=0, jobs=list(jobs), features=features,
            logits_sum=np.zeros((n_jobs, self._n_classes), np.float32),
            thresholds=np.array([job.thresholds for job in jobs], np.float64).reshape(n_jobs, n_experts - 1),
            max_experts=np.array([job.max_experts for job in jobs]),
            min_confidence=np.array([job.min_confidence for job in jobs], np.float64),
            scores=np.zeros((n_jobs, n_experts - 1), np.float32),
            seconds=seconds,
            best=np.zeros((n_jobs, n_experts if self._rule == "agreement" else 0), np.int64),
        )  # fmt: skip

    def _next_groups(self) -> list[_Group]:
        """
        Those whose turn it is and, where survivors of several batches may meet, all beside them that there is room for.

        Who came first goes first: a batch that was let pass shall not go before those that let it.
        """
        experts = [group.expert for group in self._under_way]
        self._catching_up &= experts[0] < experts[-1]
        expert = experts[0] if self._catching_up else experts[-1]
        beside = [group for group in self._under_way if group.expert == expert]
        groups, room = [beside[0]], self._schedule.max_batch - len(beside[0].jobs)
        for group in beside[1:]:
            if len(group.jobs) <= room:
                groups.append(group)
                room -= len(group.jobs)
        self._under_way = [group for group in self._under_way if group not in groups]
        return groups

    def _meet(self, groups: list[_Group], finished: Finished) -> _Group:
        """One group of several, without the jobs that nobody waits for any more: those are finished."""
        group = groups[0]
        if len(groups) > 1:
            jobs = [job for one in groups for job in one.jobs]
            arrays = {name: np.concatenate([getattr(one, name) for one in groups]) for name in _ROW_ARRAYS}
            group = _Group(group.expert, jobs, self._engine.join([one.features for one in groups]), **arrays)
        if any(job.abandoned for job in group.jobs):
            finished += [(job, AbandonedError()) for job in group.jobs if job.abandoned]
            wanted = _rows_of(np.array([not job.abandoned for job in group.jobs]))
            group.keep(wanted, self._engine.take(group.features, wanted) if len(wanted) else None)
        return group

    def _run_expert(self, group: _Group, report: BatchReport) -> Finished:
        """One expert, and the rule behind it; whoever goes on is under way again."""
        started = time.perf_counter()
        expert, n_rows = group.expert, len(group.jobs)
        before = group.logits_sum
        group.logits_sum, expert_feature = self._engine.expert(expert, group.features, before)
        usable: NDArray[np.bool_] = np.asarray(np.isfinite(group.logits_sum).all(axis=1))
        if group.best.size:
            group.best[:, expert] = (group.logits_sum - before).argmax(axis=1)
        probabilities = None
        if expert == self._n_experts - 1:
            stops, reasons = usable, ["last"] * n_rows
        else:
            if self._rule in ("confidence", "margin") or group.min_confidence.any():
                probabilities = softmax(np.where(usable[:, None], group.logits_sum, 0) / (expert + 1))
            asked = self._score(group, expert_feature, probabilities)
            group.scores[:, expert] = asked
            usable &= np.isfinite(asked)
            report.router_scores.append((expert, asked[usable].tolist()))  # NaN would spoil a sum for ever
            confident = asked < group.thresholds[:, expert]
            if probabilities is not None:
                confident &= probabilities.max(axis=1) >= group.min_confidence
            stops = usable & (confident | (group.max_experts == expert + 1))
            reasons = ["confident" if row else "budget" for row in confident.tolist()]
        taken = time.perf_counter() - started
        group.seconds[:, 2 + expert] = taken
        report.stages.append((f"expert_{expert}", n_rows, taken))

        finished: Finished = [
            (group.jobs[row], NotFiniteError("a graph gave NaN or infinity")) for row in _rows_of(~usable)
        ]
        finished += self._outcomes(group, _rows_of(stops), reasons)
        goes_on = _rows_of(usable & ~stops)
        if len(goes_on):
            if len(goes_on) < n_rows:
                group.keep(goes_on, self._engine.take(group.features, goes_on))
            group.expert += 1
            self._under_way.append(group)
            self._under_way.sort(key=lambda one: one.expert)
        return finished

    def _outcomes(self, group: _Group, rows: Rows, reasons: Sequence[str]) -> Finished:
        """
        The answers of these rows, which stop after the group's expert.

        Args:
            reasons: of all rows of the group.
        """
        if not len(rows):
            return []
        used = group.expert + 1
        jobs = [group.jobs[row] for row in rows]
        probabilities = softmax(group.logits_sum.take(rows, axis=0) / used)
        classes = best_classes(probabilities, max(job.top_k for job in jobs))
        columns = zip(
            rows.tolist(), jobs, classes.tolist(), probabilities[np.arange(len(rows))[:, None], classes].tolist(),
            group.scores[rows, :used].tolist(), group.seconds.take(rows, axis=0).tolist(), strict=True,
        )  # fmt: skip
        return [
            (
                job,
                Outcome(
                    classes=best[: job.top_k],
                    probabilities=values[: job.top_k],
                    experts_used=used,
                    exit_reason=reasons[row],
                    router_scores=scores,
                    queue_s=seconds[0],
                    trunk_s=seconds[1],
                    experts_s=seconds[2 : 2 + used],
                ),
            )
            for row, job, best, values, scores, seconds in columns
        ]

    def _score(self, group: _Group, expert_feature: Any, probabilities: NDArray[np.float64] | None) -> Floats:
        """(B,), by the exit rule: the next expert runs where it reaches the threshold. OperatingPoint defines each."""
        if self._rule == "router":
            return self._engine.router(group.expert, expert_feature, group.logits_sum)
        if self._rule == "agreement":
            return _disagreement(group)
        if self._rule == "depth":
            return np.full(len(group.jobs), 0.5, np.float32)
        assert probabilities is not None
        certainty = probabilities.max(axis=1) if self._rule == "confidence" else _margins(probabilities)
        return np.asarray(1 - certainty, np.float32)


def _margins(probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    """(B, C) to (B,): how far the highest lies above the second; 1 where there is but one class."""
    if probabilities.shape[1] == 1:
        return np.ones(len(probabilities))
    best_two = np.partition(probabilities, -2, axis=1)[:, -2:]
    return best_two[:, 1] - best_two[:, 0]


def _disagreement(group: _Group) -> Floats:
    """(B,): share of the experts so far whose own best class is not that of their mean; 1 after the first."""
    if group.expert == 0:
        return np.ones(len(group.jobs), np.float32)
    dissent = group.best[:, : group.expert + 1] != group.logits_sum.argmax(axis=1)[:, None]
    return np.asarray(dissent.mean(axis=1), np.float32)


def softmax(logits: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Softmax of each row, in double precision."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=1, keepdims=True))


def best_classes(probabilities: NDArray[np.float64], count: int) -> Rows:
    """(B, count): each row's most probable classes, most probable first, the lower index first among equals."""
    if count > FEW_CLASSES:
        return np.argsort(-probabilities, axis=1, kind="stable")[:, :count]
    left, rows = probabilities.copy(), np.arange(len(probabilities))
    best = np.empty((len(rows), count), np.int64)
    for place in range(count):
        best[:, place] = found = left.argmax(axis=1)
        left[rows, found] = -1
    return best


def _rows_of(mask: NDArray[np.bool_]) -> Rows:
    """Where it is true; as np.flatnonzero, in a fifth of the time."""
    return mask.nonzero()[0]
