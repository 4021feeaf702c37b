"""Every figure that Prometheus can read of the service."""

import math
import platform
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from model_export.bundle import SPLITS, Manifest, Rule
from service import __version__
from service.cascade import EXIT_REASONS, BatchReport, Outcome
from service.counters import BEAT, DEAD_CPU_S, OWN_CELLS, PID, READY, RESTARTS, WAITING, WAS_READY, Counters, Row
from service.errors import ELSEWHERE, STATUS
from service.operating_point import Operation
from service.processes import process_families

CLIENT_GONE: Final = 499  # nginx's number for a client that hung up before its answer
REQUEST_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 12, 30)
STAGE_BUCKETS: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
QUEUE_BUCKETS: Final = (*STAGE_BUCKETS, 5, 10)
BATCH_BUCKETS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SCORE_BUCKETS: Final = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)  # many are small


@dataclass(frozen=True, slots=True)
class CounterCells:
    """A counter: a cell for each value of its label."""

    name: str
    text: str
    label: str
    cells: dict[str, int]

    def family(self, sums: Sequence[float]) -> Metric:
        """As Prometheus reads it."""
        family = CounterMetricFamily(f"ride_{self.name}", self.text, labels=[self.label])
        for value, cell in self.cells.items():
            family.add_metric([value], sums[cell])
        return family


@dataclass(frozen=True, slots=True)
class HistogramCells:
    """
    A histogram: for each value of its label the cells of its buckets, one for what exceeds them, and the sum.

    Where it has no label, that is "", and so is its one value.
    """

    name: str
    text: str
    bounds: tuple[float, ...]
    label: str
    cells: dict[str, int]

    def add(self, row: Row, first: int, value: float) -> None:
        """Count a value in the cells from `first` on."""
        row[first + bisect_left(self.bounds, value)] += 1
        row[first + len(self.bounds) + 1] += value

    def add_all(self, row: Row, first: int, values: Sequence[float]) -> None:
        """Count several values."""
        bounds = self.bounds
        for value in values:
            row[first + bisect_left(bounds, value)] += 1
        row[first + len(bounds) + 1] += sum(values)

    def family(self, sums: Sequence[float]) -> Metric:
        """As Prometheus reads it."""
        family = HistogramMetricFamily(f"ride_{self.name}", self.text, labels=[self.label] if self.label else [])
        names = [*(repr(float(bound)) for bound in self.bounds), "+Inf"]  # 1.0, not 1: part of a series' name
        for value, first in self.cells.items():
            end = first + len(names)
            counts = accumulate(sums[first:end])
            family.add_metric([value] if self.label else [], list(zip(names, counts, strict=True)), sums[end])
        return family


class Layout:
    """
    Which cell of a row holds what; the same for every process that serves the same model.

    Attributes:
        size: cells in a row.
        families: all that follow, in their order.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.size = OWN_CELLS
        self.families: list[CounterCells | HistogramCells] = []
        errors = [code for code in STATUS if code not in ELSEWHERE]
        stages = ["trunk", *(f"expert_{expert}" for expert in range(manifest.n_experts))]
        self.requests = self._counter(
            "requests",
            f"Answers of POST /classify by HTTP status; {CLIENT_GONE}: the client hung up first.",
            "code",
            sorted({"200", str(CLIENT_GONE), *(str(STATUS[code]) for code in errors)}),
        )
        self.request_seconds = self._histogram(
            "request_seconds",
            "From the first look at a request to its answer or refusal; the upload counts where it came in pieces.",
            REQUEST_BUCKETS,
        )
        self.images = self._counter(
            "images",
            "Images answered, by how many experts ran.",
            "experts",
            [str(used) for used in range(1, manifest.n_experts + 1)],
        )
        self.exits = self._counter("exits", "Images answered, by what ended their way.", "reason", EXIT_REASONS)
        self.router_score = self._histogram(
            "router_score",
            "Score of the exit rule after expert i, each time it decides.",
            SCORE_BUCKETS,
            "router",
            map(str, range(manifest.n_experts - 1)),
        )
        self.stage_seconds = self._histogram(
            "stage_seconds",
            "Time of a step: decode for each image, trunk and expert_i (its router included) for each batch.",
            STAGE_BUCKETS,
            "stage",
            ["decode", *stages],
        )
        self.batch_images = self._histogram(
            "batch_images", "Images in one run of trunk or expert_i.", BATCH_BUCKETS, "stage", stages
        )
        self.queue_seconds = self._histogram(
            "queue_seconds", "From an image's arrival in the queue until its batch closes.", QUEUE_BUCKETS
        )
        self.refused = self._counter(
            "refused", "Images or requests refused or failed, by error code.", "reason", errors
        )
        self.predictions = self._counter(
            "predictions", "Images answered, by the split of the most probable class.", "split", SPLITS
        )

    def _counter(self, name: str, text: str, label: str, values: Iterable[str]) -> CounterCells:
        self.families.append(family := CounterCells(name, text, label, self._places(values, 1)))
        return family

    def _histogram(
        self, name: str, text: str, bounds: tuple[float, ...], label: str = "", values: Iterable[str] = ("",)
    ) -> HistogramCells:
        cells = self._places(values, len(bounds) + 2)
        self.families.append(family := HistogramCells(name, text, bounds, label, cells))
        return family

    def _places(self, values: Iterable[str], cells: int) -> dict[str, int]:
        places = {}
        for value in values:
            places[value] = self.size
            self.size += cells
        return places


class Metrics:
    """
    The service's metrics: this process records its own, and any process can show the sum over all.

    Every label that can be known at the start is there from the start, at 0: a panel then shows 0 instead of "no data".

    `batch_done` is for the thread that runs the batches, everything else for the event loop's: no cell is written by
    both, so that nothing needs a lock.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        manifest: Manifest,
        operation: Operation,
        waiting: Callable[[], int],
        limit: int,
        counters: Counters | None = None,
    ) -> None:
        """
        Args:
            operation: thresholds in force, and what calibration expects of them.
            waiting: images that wait now in this process.
            limit: images that may wait in this process.
            counters: as `shared_counters` makes them; None where this process is the whole service.
        """
        self.registry = registry
        self._rule = operation.rule
        self._manifest = manifest
        self._operation = operation
        self._waiting = waiting
        self._limit = limit
        self._layout = layout = Layout(manifest)
        if counters is None:
            counters = Counters(1, layout.size)
            counters.take(0)
        self._counters = counters
        self._info: dict[str, dict[str, str]] = {}

        self._requests = {int(code): cell for code, cell in layout.requests.cells.items()}
        self._request_seconds = layout.request_seconds.cells[""]
        self._decode = layout.stage_seconds.cells["decode"]
        self._queue_seconds = layout.queue_seconds.cells[""]
        self._images = [0, *layout.images.cells.values()]  # by experts used
        self._predictions = [layout.predictions.cells[split] for split in manifest.splits]  # by class
        self._router_score = list(layout.router_score.cells.values())
        registry.register(self)

    def engine_started(self, *, variant: str, provider: str, onnxruntime: str) -> None:
        """Say what is served, and by what."""
        self._info = {
            "model": {
                "name": self._manifest.name, "version": self._manifest.version, "variant": variant, "provider": provider
            },
            "build": {"version": __version__, "python": platform.python_version(), "onnxruntime": onnxruntime},
        }  # fmt: skip

    def set_ready(self, ready: bool) -> None:
        """Whether this process takes work from now on."""
        self.publish()  # or the beat of a predecessor would count
        own = self._counters.own
        own[READY] = ready
        if ready:
            own[WAS_READY] = 1

    def image_decoded(self, seconds: float) -> None:
        """Count an image's decoding."""
        self._layout.stage_seconds.add(self._counters.own, self._decode, seconds)

    def batch_done(self, report: BatchReport) -> None:
        """Count a batch's stages, router scores and waits."""
        own, layout = self._counters.own, self._layout
        for stage, rows, seconds in report.stages:
            layout.stage_seconds.add(own, layout.stage_seconds.cells[stage], seconds)
            layout.batch_images.add(own, layout.batch_images.cells[stage], rows)
        for router, scores in report.router_scores:
            layout.router_score.add_all(own, self._router_score[router], scores)
        layout.queue_seconds.add_all(own, self._queue_seconds, report.waits)

    def image_answered(self, outcome: Outcome) -> None:
        """Count an image that is part of an answer."""
        own = self._counters.own
        own[self._images[outcome.experts_used]] += 1
        own[self._layout.exits.cells[outcome.exit_reason]] += 1
        own[self._predictions[outcome.classes[0]]] += 1

    def request_done(self, status: int, seconds: float) -> None:
        """Count a request's end."""
        own = self._counters.own
        own[self._requests[status]] += 1
        self._layout.request_seconds.add(own, self._request_seconds, seconds)

    def refused(self, code: str) -> None:
        """Count an image or a request that got this error instead of an answer."""
        self._counters.own[self._layout.refused.cells[code]] += 1

    def publish(self) -> None:
        """Let the other processes see how many images wait here, and that this one lives; called again and again."""
        own = self._counters.own
        own[WAITING] = self._waiting()
        own[BEAT] = time.monotonic()

    @property
    def workers(self) -> int:
        """Worker processes that there should be."""
        return self._counters.workers

    def workers_to_come(self) -> int:
        """Workers that have not been ready yet, not even for a moment."""
        counters = self._counters
        return counters.column(WAS_READY)[: counters.workers].count(0)

    def ready_workers(self) -> int:
        """Workers that take work; none while the process that runs the graphs for all of them does not."""
        counters = self._counters
        ready = counters.column(READY)
        if counters.engine is not None and not ready[counters.engine]:
            return 0
        return int(sum(ready[: counters.workers]))

    def collect(self) -> Iterator[Metric]:
        """All of it, summed over the processes: what prometheus_client asks of a collector."""
        self.publish()
        counters = self._counters
        sums = counters.sums()
        for cells in self._layout.families:
            yield cells.family(sums)
        yield from self._macs(sums)
        yield from self._state(sums)
        yield from self._calibration()
        for name, text in (("model", "1, for the model that is served."), ("build", "1, for what serves it.")):
            labels = self._info.get(name, {})  # none before the engine has started
            family = GaugeMetricFamily(f"ride_{name}_info", text, labels=list(labels))
            if labels:
                family.add_metric(list(labels.values()), 1)
            yield family
        pids = [int(pid) for pid in counters.column(PID) if pid]
        yield from process_families(pids, sums[DEAD_CPU_S])

    def _macs(self, sums: Sequence[float]) -> Iterator[Metric]:
        """What images cost follows from how many of them used how many experts."""
        answered = [(used, sums[cell]) for used, cell in enumerate(self._images) if used]
        spent = sum(images * image_macs(self._manifest, used, self._rule) for used, images in answered)
        full = sum(images for _, images in answered) * image_macs(self._manifest, self._manifest.n_experts, self._rule)
        yield CounterMetricFamily("ride_macs", "Multiply-accumulates spent on images answered.", value=spent)
        yield CounterMetricFamily(
            "ride_macs_saved",
            "Multiply-accumulates that images answered did without, against running all experts.",
            value=full - spent,
        )

    def _state(self, sums: Sequence[float]) -> Iterator[Metric]:
        counters = self._counters
        alive = sum(pid > 0 for pid in counters.column(PID)[: counters.workers])
        waiting = sum(counters.column(WAITING)[: counters.workers])
        for name, text, value in (
            ("queue_images", "Images that wait now, those being decoded included.", waiting),
            ("queue_limit_images", "Images that may wait, at all workers together.", self._limit * self.workers),
            ("ready", "Workers that take work; 0 while the service starts or drains.", self.ready_workers()),
            ("workers", "Worker processes that are alive.", alive),
            ("workers_configured", "Worker processes that there should be (RIDE_WORKERS).", self.workers),
        ):
            yield GaugeMetricFamily(f"ride_{name}", text, value=value)
        yield CounterMetricFamily(
            "ride_worker_restarts",
            "Deaths of workers, or of the engine's process, after which another one is started.",
            value=sums[RESTARTS],
        )

    def _calibration(self) -> Iterator[Metric]:
        expected = self._operation.expected
        yield GaugeMetricFamily(
            "ride_calibrated_mean_experts",
            "Experts per image that calibration expects at the thresholds in force; NaN where it did not measure them.",
            value=expected.mean_experts if expected else math.nan,
        )
        share = GaugeMetricFamily(
            "ride_calibrated_experts_share",
            "Share of images that calibration expects to use so many experts.",
            labels=["experts"],
        )
        for used in range(1, self._manifest.n_experts + 1):
            share.add_metric([str(used)], expected.experts_share[used - 1] if expected else math.nan)
        yield share


def shared_counters(manifest: Manifest, workers: int, *, shared_engine: bool = False) -> Counters:
    """Counters for the processes of a service."""
    return Counters(workers, Layout(manifest).size, shared_engine=shared_engine)


def image_macs(manifest: Manifest, experts_used: int, rule: Rule) -> int:
    """Multiply-accumulates of one image: trunk, the experts that ran and, by the rule "router", those asked."""
    macs = manifest.macs
    routers = sum(macs.routers[:experts_used]) if rule == "router" else 0
    return macs.trunk + sum(macs.experts[:experts_used]) + routers
