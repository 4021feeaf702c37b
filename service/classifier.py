"""Behind the door: decoding threads, batcher, cascade and engine, from start-up to drained."""

import asyncio
import gc
import logging
import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry

from model_export.bundle import Bundle, BundleError
from service.batcher import Batcher
from service.cascade import Cascade, Job, NotFiniteError, Outcome
from service.cores import available_cores
from service.counters import Counters
from service.engine import RUNTIME_VERSION, EngineError
from service.errors import ServiceError
from service.health import LONGEST_STEP_S, EngineWatch
from service.images import decode, decode_if_small
from service.logs import log
from service.metrics import Metrics
from service.operating_point import choose_operation
from service.places import MAX_RETRY_S, QueueFullError
from service.remote import RemoteBatcher
from service.schedule import Schedule
from service.settings import Settings
from service.uploads import Upload, UploadMemory
from service.warm_up import RunningEngine, choose_variant, warm_up

State = Literal["starting", "ready", "draining", "failed"]
NOT_READY: Final = "graphs are being loaded and run for the first time; retry in 1 s"
LONG_STEP_S: Final = 0.025  # for which the event loop shall not stand still
MOST_WAITING: Final = 0.5  # of the time for a request: who waited longer would rarely be answered in the rest of it
DECODING_S: Final = 0.005  # of one request after the other in the event loop, before it looks at others


class OpenEngine(Protocol):
    """Opens a bundle's graphs, as engine.open_engine does; may take its time."""

    def __call__(self, bundle: Bundle, variant: str | None, *, provider: str, threads: int) -> RunningEngine: ...


@dataclass(frozen=True, slots=True)
class Choice:
    """How a request wants its images treated; everything is within the bundle's and the operator's limits."""

    thresholds: tuple[float, ...]
    max_experts: int
    min_confidence: float
    top_k: int


@dataclass(frozen=True, slots=True)
class ClassifiedImage:
    """One image's outcome, and the seconds its decoding took."""

    outcome: Outcome
    decode_s: float


class Classifier:
    """
    A bundle being served.

    Attributes:
        state: "starting" until every graph has run, then "ready"; "draining" for ever once drain() was called; "failed"
            if it could not start.
        engine_watch: to be asked from time to time; None where no engine runs in this process.
    """

    def __init__(
        self,
        bundle: Bundle,
        settings: Settings,
        registry: CollectorRegistry,
        open_engine: OpenEngine,
        counters: Counters | None = None,
        remote: RemoteBatcher | None = None,
    ) -> None:
        """
        Args:
            counters: of all workers; None where this process is the whole service.
            remote: leads to the process that runs the graphs; None where this one does.

        Raises:
            SettingsError: where the settings ask for what the bundle does not have.
        """
        manifest = bundle.manifest
        self.bundle = bundle
        self.settings = settings
        self.operation = choose_operation(manifest, settings)
        self.variant = choose_variant(manifest, settings)
        self.threads = settings.threads or available_cores()
        self.provider = ""  # known once the engine is open
        self.state: State = "starting"
        self.upload_memory = UploadMemory(settings.max_inflight_bytes)
        self._open_engine = open_engine
        self._batcher: Batcher[Job, Outcome] | RemoteBatcher = remote or Batcher(max_queue=settings.max_queue)
        self.metrics = Metrics(
            registry, manifest, self.operation, lambda: self._batcher.waiting, settings.max_queue, counters
        )
        self._decoding: dict[str, Any] = {
            "spec": manifest.input, "max_pixels": settings.max_pixels, "scaled": settings.scaled_decode
        }  # fmt: skip
        self._decoders = ThreadPoolExecutor(self.threads, thread_name_prefix="ride-decode")
        self._decoded_s = 0.0  # in this turn of the event loop
        self._in_flight = 0
        self.engine_watch: EngineWatch | None = None  # once the engine runs, in this process
        self._idle = asyncio.Event()
        self._idle.set()

    async def start(self) -> None:
        """Open the engine and run every graph, off the event loop; ready, or failed, when this returns."""
        started = time.perf_counter()
        try:
            threaded = await self._open()
        except Exception as error:
            self.state = "failed"
            explained = isinstance(error, BundleError | EngineError)  # then its message says all
            log(logging.ERROR, "start_failed", error=None if explained else error, reason=str(error))
            return
        gc.collect()
        gc.freeze()  # what start-up made stays; to look through it again and again would stop everything for 20 ms
        self.state = "ready"
        self.metrics.set_ready(True)
        log(
            logging.INFO,
            "worker_ready",
            bundle=str(self.bundle.path),
            model=f"{self.bundle.manifest.name} {self.bundle.manifest.version}",
            variant=self.variant,
            provider=self.provider,
            threads=self.threads,
            engine_thread=threaded,
            rule=self.operation.rule,
            thresholds=self.operation.thresholds,
            max_experts=self.operation.max_experts,
            seconds=round(time.perf_counter() - started, 3),
        )

    async def drain(self, seconds: float) -> bool:
        """Refuse new work, wait for accepted work; whether all of it was answered in time."""
        self.state = "draining"
        self.metrics.set_ready(False)
        log(logging.INFO, "draining", requests=self._in_flight, seconds=seconds)
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except TimeoutError:
            log(logging.ERROR, "drain_incomplete", requests=self._in_flight, seconds=seconds)
            return False
        return True

    async def stop(self) -> None:
        """End the threads."""
        self._decoders.shutdown(wait=False, cancel_futures=True)
        await self._batcher.stop()

    def check_ready(self) -> None:
        """Raise ServiceError not_ready or shutting_down unless new work is welcome."""
        if self.state == "ready":
            return
        if self.state == "draining":
            raise ServiceError("shutting_down", "service is stopping; retry in 1 s, at another instance", retry_after=1)
        raise ServiceError("not_ready", NOT_READY, retry_after=1)

    def enter(self) -> None:
        """Let a request in: drain() waits until it leaves. Raises ServiceError not_ready or shutting_down."""
        self.check_ready()
        self._in_flight += 1
        self._idle.clear()

    def leave(self) -> None:
        """A request that entered is answered."""
        self._in_flight -= 1
        if not self._in_flight:
            self._idle.set()

    def check_room(self) -> None:
        """Raise ServiceError overloaded while not even one image would find a place, whoever sends it."""
        self._check_wait()
        try:
            self._batcher.check()
        except QueueFullError as error:
            raise self._overloaded(error, "") from None

    async def classify(self, uploads: Sequence[Upload], choice: Choice) -> list[ClassifiedImage | ServiceError]:
        """
        Answer images, in order; one that cannot be decoded, or for which a graph gives NaN, gets its ServiceError.

        Cancel it, and what has not begun does not begin.

        Raises:
            ServiceError: overloaded.
            Exception: whatever failed the batch of one of them.
        """
        self._reserve(len(uploads))
        if len(uploads) == 1:
            return [await self._classify_one(uploads[0], choice)]
        begun = 0

        async def one(upload: Upload) -> ClassifiedImage | ServiceError:
            nonlocal begun
            while self._decoded_s > DECODING_S:  # noqa: ASYNC110, the next turn of the loop is the event
                await asyncio.sleep(0)
            begun += 1  # from here on it sees to its place itself
            return await self._classify_one(upload, choice)

        tasks = [asyncio.create_task(one(upload)) for upload in uploads]
        try:
            return list(await asyncio.gather(*tasks))
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._batcher.release(len(tasks) - begun)
            raise

    def submit(self, job: Job) -> asyncio.Future[Outcome]:
        """Queue the image of a process that keeps the limits by itself. Cancel the future, and it is dropped."""
        self._batcher.reserve(1)
        return self._batcher.submit(job)

    async def _classify_one(self, upload: Upload, choice: Choice) -> ClassifiedImage | ServiceError:
        """Decode, queue and answer one image, on a place that is already reserved."""
        try:
            decoded = self._decode_if_small(upload.data)
            if decoded is not None:
                self._count_decoding(decoded[1])
            else:
                decoded = await self._decode_apart(upload.data)
        except ServiceError as error:
            self._batcher.release(1)
            return error
        except BaseException:
            self._batcher.release(1)
            raise
        job = self._job(*decoded, choice)
        try:
            return ClassifiedImage(await self._batcher.submit(job), decoded[1])
        except asyncio.CancelledError:
            job.abandoned = True
            raise
        except NotFiniteError as error:
            return not_finite(error)

    async def _decode_apart(self, data: bytes) -> tuple[NDArray[np.uint8], float]:
        """Decode in a thread. Whoever gives up before one is free leaves no image behind in the executor's queue."""
        waiting = [data]
        try:
            return await asyncio.get_running_loop().run_in_executor(self._decoders, lambda: self._decode(waiting.pop()))
        finally:
            waiting.clear()

    def _count_decoding(self, seconds: float) -> None:
        """Of this turn of the event loop; what waits for the next turn is begun after the count is back at 0."""

        def reset() -> None:
            self._decoded_s = 0.0

        if not self._decoded_s:
            asyncio.get_running_loop().call_soon(reset)
        self._decoded_s += seconds

    def begin(self, data: bytes, choice: Choice) -> tuple[Job, asyncio.Future[Outcome], float] | None:
        """
        Decode and queue one image that is quickly decoded, here and now.

        To give it up, cancel the future and mark the job as abandoned.

        Returns:
            The job, its outcome to come, and the seconds that its decoding took; None for any other image.

        Raises:
            ServiceError: overloaded, or what is wrong with the image.
        """
        self._reserve(1)
        decoded = None
        try:
            decoded = self._decode_if_small(data)
        finally:
            if decoded is None:
                self._batcher.release(1)
        if decoded is None:
            return None
        job = self._job(*decoded, choice)
        return job, self._batcher.submit(job), decoded[1]

    def _job(self, pixels: NDArray[np.uint8], decode_s: float, choice: Choice) -> Job:
        self.metrics.image_decoded(decode_s)
        return Job(
            pixels, choice.thresholds, choice.max_experts, choice.min_confidence, choice.top_k, time.perf_counter()
        )

    def _decode(self, data: bytes) -> tuple[NDArray[np.uint8], float]:
        """Pixels, and the seconds that they took."""
        started = time.perf_counter()
        return decode(data, **self._decoding), time.perf_counter() - started

    def _decode_if_small(self, data: bytes) -> tuple[NDArray[np.uint8], float] | None:
        started = time.perf_counter()
        pixels = decode_if_small(data, **self._decoding)
        return None if pixels is None else (pixels, time.perf_counter() - started)

    def _reserve(self, count: int) -> None:
        self._check_wait()
        try:
            self._batcher.reserve(count)
        except QueueFullError as error:
            raise self._overloaded(error, f", this request has {count}") from None

    def _check_wait(self) -> None:
        """Raise ServiceError overloaded where an image would wait so long that its work would be for nobody."""
        most, wait = MOST_WAITING * self.settings.timeout_s, self._batcher.wait_s
        if wait > most:
            retry_after = min(MAX_RETRY_S, math.ceil(wait - most))
            raise ServiceError(
                "overloaded",
                f"{self._batcher.waiting} images are waiting, about {wait:.1f} s, the limit is {most:g} s (half of "
                f"RIDE_TIMEOUT_S); retry in {retry_after} s",
                retry_after=retry_after,
            )

    def _overloaded(self, error: QueueFullError, asked: str) -> ServiceError:
        kept = f", {error.saved} places are kept for an earlier request" if error.saved else ""
        limit = "RIDE_MAX_QUEUE" if self.metrics.workers == 1 else "this worker's share of RIDE_MAX_QUEUE"
        return ServiceError(
            "overloaded",
            f"{error.waiting} images are waiting{kept}, the limit is {self.settings.max_queue} ({limit})"
            f"{asked}; retry in {error.retry_after} s",
            retry_after=error.retry_after,
        )

    async def _open(self) -> bool:
        """Begin to work off what is queued, here or in the engine's process; whether apart from the event loop."""
        if isinstance(self._batcher, RemoteBatcher):
            await self._batcher.connect(self._engine_started)
            threaded = True
        else:
            cascade, threaded = await asyncio.to_thread(self._prepare)
            self._batcher.start(cascade, threaded=threaded)
            self.engine_watch = EngineWatch(cascade, max(LONGEST_STEP_S, self.settings.timeout_s))
            self._engine_started(self.provider, self.variant)
        return threaded

    def _engine_started(self, provider: str, variant: str) -> None:
        """What runs, here or in the engine's process, whose successor may have found another provider."""
        self.provider, self.variant = provider, variant
        self.metrics.engine_started(variant=variant, provider=provider, onnxruntime=RUNTIME_VERSION)

    def _prepare(self) -> tuple[Cascade, bool]:
        """Open and warm up the engine, in a thread; whether steps need one too."""
        settings, manifest = self.settings, self.bundle.manifest
        engine = self._open_engine(self.bundle, settings.variant, provider=settings.provider, threads=self.threads)
        self.provider, self.variant = engine.provider, engine.variant
        warm = warm_up(engine, manifest, settings, self.operation.rule)
        point = self.operation.expected
        share = point.experts_share if point is not None else (0.0,) * (manifest.n_experts - 1) + (1.0,)
        schedule = Schedule(
            warm.max_batch,
            merges=warm.on_gpu if settings.merge == "auto" else settings.merge == "on",
            profile=warm.profile,
            reach=[sum(share[expert:]) for expert in range(manifest.n_experts)],
        )
        threaded = warm.on_gpu or warm.profile.longest_step(warm.max_batch) > LONG_STEP_S
        cascade = Cascade(
            engine, n_experts=manifest.n_experts, n_classes=len(manifest.classes), rule=self.operation.rule,
            schedule=schedule, observer=self.metrics,
        )  # fmt: skip
        return cascade, threaded if settings.engine_thread == "auto" else settings.engine_thread == "on"


def not_finite(error: NotFiniteError) -> ServiceError:
    """What is said to the client."""
    return ServiceError("internal", f"{error} for this image; please report it with the request id")
