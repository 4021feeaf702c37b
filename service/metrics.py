"""Every figure that Prometheus can read of the service."""

import platform
from collections.abc import Callable
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, disable_created_metrics

from model_export.bundle import SPLITS, Manifest
from service import __version__
from service.cascade import EXIT_REASONS, BatchReport, Outcome
from service.errors import STATUS
from service.operating_point import Operation

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for every first, which nobody reads

CLIENT_GONE: Final = 499  # nginx's number for a client that hung up before its answer
REQUEST_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
STAGE_BUCKETS: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
BATCH_BUCKETS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SCORE_BUCKETS: Final = tuple(tenth / 10 for tenth in range(1, 11))


class Metrics:
    """
    The service's metrics, in a registry of the caller's.

    Every label that can be known at the start is there from the start, at 0: a panel then shows 0 instead of "no data".
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        manifest: Manifest,
        operation: Operation,
        waiting: Callable[[], int],
        limit: int,
    ) -> None:
        """
        Args:
            operation: thresholds in force, and what calibration expects of them.
            waiting: images that wait now.
            limit: images that may wait.
        """
        self.registry = registry
        self._manifest = manifest
        self._splits = manifest.splits
        macs = manifest.macs
        self._macs = [image_macs(manifest, used) for used in range(manifest.n_experts + 1)]

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, namespace="ride", registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(name, text, labels, namespace="ride", buckets=buckets, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(name, text, labels, namespace="ride", registry=registry)

        self.requests = counter(
            "requests", f"Answers of POST /classify by HTTP status; {CLIENT_GONE}: the client hung up first.", "code"
        )
        self.request_seconds = histogram(
            "request_seconds", "From a request's first byte to its answer, refusals included.", REQUEST_BUCKETS
        )
        self.images = counter("images", "Images answered, by how many experts ran.", "experts")
        self.exits = counter("exits", "Images answered, by what ended their way.", "reason")
        self.router_score = histogram(
            "router_score", "Score of a router, each time it is asked.", SCORE_BUCKETS, "router"
        )
        self.stage_seconds = histogram(
            "stage_seconds",
            "Time of a step: decode for each image, trunk and expert_i (its router included) for each batch.",
            STAGE_BUCKETS,
            "stage",
        )
        self.batch_images = histogram("batch_images", "Images in one run of trunk or expert_i.", BATCH_BUCKETS, "stage")
        self.queue_seconds = histogram(
            "queue_seconds", "From an image's arrival in the queue until its batch closes.", REQUEST_BUCKETS
        )
        gauge("queue_images", "Images that wait now, those being decoded included.").set_function(waiting)
        gauge("queue_limit_images", "Images that may wait (RIDE_MAX_QUEUE).").set(limit)
        self.refused = counter("refused", "Images or requests refused or failed, by error code.", "reason")
        self.predictions = counter("predictions", "Images answered, by the split of the most probable class.", "split")
        self.macs = counter("macs", "Multiply-accumulates spent on images answered.")
        self.macs_saved = counter(
            "macs_saved", "Multiply-accumulates that images answered did without, against running all experts."
        )
        calibrated = gauge(
            "calibrated_mean_experts",
            "Experts per image that calibration expects at the thresholds in force; NaN where it did not measure them.",
        )
        share = gauge(
            "calibrated_experts_share", "Share of images that calibration expects to use so many experts.", "experts"
        )
        self.model_info = gauge(
            "model_info", "1, for the model that is served.", "name", "version", "variant", "provider"
        )
        self.build_info = gauge("build_info", "1, for what serves it.", "version", "python", "onnxruntime")
        self.ready = gauge("ready", "1 while the service takes work, 0 while it starts or drains.")

        calibrated.set(operation.expected.mean_experts if operation.expected else float("nan"))
        for used in range(1, manifest.n_experts + 1):
            self.images.labels(str(used))
            share.labels(str(used)).set(
                operation.expected.experts_share[used - 1] if operation.expected else float("nan")
            )
        for code in sorted({200, CLIENT_GONE, *STATUS.values()} - {404, 405}):
            self.requests.labels(str(code))
        for reason in STATUS:
            if reason not in ("not_found", "method_not_allowed"):
                self.refused.labels(reason)
        for reason in EXIT_REASONS:
            self.exits.labels(reason)
        for split in SPLITS:
            self.predictions.labels(split)
        for router in range(len(macs.routers)):
            self.router_score.labels(str(router))
        stages = ["trunk", *(f"expert_{expert}" for expert in range(manifest.n_experts))]
        self._decode = self.stage_seconds.labels("decode")
        for stage in stages:
            self.stage_seconds.labels(stage)
            self.batch_images.labels(stage)
        ProcessCollector(registry=registry)

    def engine_started(self, *, variant: str, provider: str, onnxruntime: str) -> None:
        """Say what is served, and by what."""
        self.model_info.labels(self._manifest.name, self._manifest.version, variant, provider).set(1)
        self.build_info.labels(__version__, platform.python_version(), onnxruntime).set(1)

    def image_decoded(self, seconds: float) -> None:
        """Count an image's decoding."""
        self._decode.observe(seconds)

    def batch_done(self, report: BatchReport) -> None:
        """Count a batch's stages, router scores and waits."""
        for stage, rows, seconds in report.stages:
            self.stage_seconds.labels(stage).observe(seconds)
            self.batch_images.labels(stage).observe(rows)
        for router, scores in report.router_scores:
            of_router = self.router_score.labels(str(router))
            for score in scores:
                of_router.observe(score)
        for wait in report.waits:
            self.queue_seconds.observe(wait)

    def image_answered(self, outcome: Outcome) -> None:
        """Count an image that is part of an answer."""
        spent = self._macs[outcome.experts_used]
        self.images.labels(str(outcome.experts_used)).inc()
        self.exits.labels(outcome.exit_reason).inc()
        self.predictions.labels(self._splits[outcome.classes[0]]).inc()
        self.macs.inc(spent)
        self.macs_saved.inc(self._macs[-1] - spent)

    def request_done(self, status: int, seconds: float) -> None:
        """Count a request's end."""
        self.requests.labels(str(status)).inc()
        self.request_seconds.observe(seconds)


def image_macs(manifest: Manifest, experts_used: int) -> int:
    """Multiply-accumulates of one image: trunk, the experts that ran and the routers that were asked."""
    macs = manifest.macs
    return macs.trunk + sum(macs.experts[:experts_used]) + sum(macs.routers[:experts_used])
