"""The command line: ride-serve."""

import asyncio
import ctypes
import logging
import os
import resource
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from socket import socket
from types import FrameType
from typing import Any, Final, NoReturn, cast

import uvicorn
from prometheus_client import CollectorRegistry

from model_export.bundle import Bundle, BundleError, read_bundle
from service.app import create_app
from service.classifier import GPU_BATCH, Classifier
from service.counters import PID, READY, Counters
from service.engine import open_engine
from service.engine_process import EngineProcess
from service.health import end_if_broken
from service.logs import log, set_up
from service.metrics import shared_counters
from service.protocol import GuardedProtocol
from service.remote import EngineLink, open_link
from service.settings import Settings, SettingsError, read_settings, unknown_variables
from service.shares import choose_shared_engine, choose_workers, engine_share_of, share_of
from service.sockets import BACKLOG, admit, open_sockets, refuse_connections
from service.supervisor import HANGUP, START_FAILED, STOP_SIGNALS, Supervisor, let_signals_in

KEEP_ALIVE_S: Final = 30
QUEUE_EMPTY_S: Final = 0.2  # by then, whoever was connecting when the service stopped listening has been let in
LAST_WORDS_S: Final = 2.0  # for whoever has connected, but not asked yet
LARGE_BYTES: Final = 4 << 20
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


class DrainingServer(uvicorn.Server):
    """
    On SIGTERM, SIGINT or SIGHUP it goes on listening, so that new work is refused politely, until what was accepted is
    answered.

    A second SIGINT, from an impatient person, ends it at once, and so does the end of the time for it: with status 1.
    """

    def __init__(self, classifier: Classifier, sockets: Sequence[socket], *, listen_at_once: bool = True) -> None:
        """
        Args:
            sockets: to listen on.
            listen_at_once: whether to do so before the classifier is ready.
        """
        app = create_app(classifier, listen_at_once=listen_at_once)
        protocol = partial(GuardedProtocol, short_path=b"/classify", short_way=app.classify.short_way)
        config = uvicorn.Config(
            app, log_config=None, access_log=False, loop="uvloop",
            http=cast(Any, protocol), ws="none", server_header=False, proxy_headers=False, backlog=BACKLOG,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=1,
        )  # fmt: skip
        super().__init__(config)
        self._classifier = classifier
        self._sockets = sockets
        self._drain_s = classifier.settings.drain_s
        self._told_to_stop = False
        self._drain: asyncio.Task[None] | None = None

    def serve_until_told(self) -> int:
        """Returns the exit code, 0 or START_FAILED; where work is lost, the process ends at once, with 1."""
        try:
            self.run(sockets=list(self._sockets))
        except SystemExit:  # uvicorn has logged why
            return START_FAILED
        return START_FAILED if self._classifier.state == "failed" else 0

    async def startup(self, sockets: list[socket] | None = None) -> None:
        """From here on signals are handled."""
        for sig in HANGUP:  # uvicorn knows the others
            signal.signal(sig, self.handle_exit)
        let_signals_in()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """
        Note it for the next tick: a signal may come in the midst of anything, even of itself.

        While the graphs are still warming up, which may take minutes, nothing has been accepted: end at once.
        """
        if self._classifier.state == "starting":
            os._exit(0)
        if sig == signal.SIGINT and self._told_to_stop:
            os._exit(1)
        self._told_to_stop = True

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: begin to drain if told so, stop if the engine could not start."""
        self._classifier.metrics.publish()
        end_if_broken(self._classifier.engine_watch)
        if self._classifier.state == "failed":  # also where told to stop just then: it stays a failure
            self.should_exit = True
        elif self._told_to_stop and self._drain is None:
            self._drain = asyncio.create_task(self._drain_then_exit())
        return await super().on_tick(counter)

    async def _drain_then_exit(self) -> None:
        end = time.monotonic() + self._drain_s
        if not await self._classifier.drain(self._drain_s):
            logging.shutdown()
            os._exit(1)  # a batch that does not end cannot be stopped, and an orderly exit would wait for it
        for listening in self._sockets:
            refuse_connections(listening)
        await asyncio.sleep(QUEUE_EMPTY_S)
        connections: set[Any] = self.server_state.connections
        for connection in connections:
            admit(connection.transport.get_extra_info("socket"))
        for server in self.servers:
            server.close()
        await self._wait_for_requests(min(end, time.monotonic() + LAST_WORDS_S))
        left = round(end - time.monotonic())
        self.config.timeout_graceful_shutdown = max(1, left)  # for clients that read their answer slowly
        self.should_exit = True

    async def _wait_for_requests(self, end: float) -> None:
        """Until every request that is on its way has come, and its answer has begun; at most until `end`."""
        connections: set[Any] = self.server_state.connections
        while any(one.expecting for one in connections) and time.monotonic() < end:  # noqa: ASYNC110, no event tells
            await asyncio.sleep(0.01)


def main(arguments: list[str] | None = None) -> int:
    """Serve until told to stop. Returns 0, 1 where work was lost or the engine failed, 2 for the caller's mistakes."""
    for sig in STOP_SIGNALS:  # until others handle them; the kernel keeps SIGTERM from a container's first process
        signal.signal(sig, _stop_early)
    try:
        settings = read_settings(arguments)
        set_up(settings.log_level)
        for line in unknown_variables():
            log(logging.WARNING, "unknown_variable", message=line)
        workers = choose_workers(settings)
        shared_engine = choose_shared_engine(settings, workers)
        share = share_of(settings, workers)
        bundle = read_bundle(settings.bundle)
        counters = shared_counters(bundle.manifest, workers, shared_engine=shared_engine)
        alone = workers == 1 and not shared_engine
        link, batcher = None, None
        if shared_engine:
            link = open_link(
                workers, bundle.manifest.input, max_queue=share.max_queue, max_batch=share.max_batch or GPU_BATCH
            )
            batcher = link.batcher
        classifier = Classifier(bundle, share, CollectorRegistry(), open_engine, None if alone else counters, batcher)
    except (SettingsError, BundleError) as error:
        print(f"ride-serve: {error}", file=sys.stderr)
        return 2
    _allow_open_files()
    _return_memory()
    log(logging.INFO, "starting", workers=workers, settings=settings.model_dump(mode="json"))
    try:
        groups = open_sockets(settings.host, settings.port, workers)
    except (OSError, UnicodeError) as error:  # the latter of a name that is none
        log(logging.ERROR, "cannot_listen", reason=getattr(error, "strerror", None) or str(error))
        return 1
    for listening in groups[0]:
        host, port = listening.getsockname()[:2]
        log(logging.INFO, "listening", url=f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")
    if alone:
        code = 1 if DrainingServer(classifier, groups[0]).serve_until_told() else 0
        logging.shutdown()
        os._exit(code)  # an orderly exit would wait for a decoding thread whose client is long gone

    def work(number: int, sockets: Sequence[socket]) -> int:
        if link is not None:
            if number == counters.engine:
                return _run_engine(bundle, settings, link, counters)
            link.batcher.front = number
        first = number == 0 and not any(counters.column(READY)[:workers])  # else another one answers /healthz
        return DrainingServer(classifier, sockets, listen_at_once=first).serve_until_told()

    if link is not None:
        groups.append([link.listening])
    return Supervisor(work, groups, counters, settings.drain_s).run()


def _stop_early(sig: int, frame: FrameType | None) -> NoReturn:
    """Nothing has been accepted yet, so that nothing is lost."""
    sys.exit(0)


def _allow_open_files() -> None:
    """As many as the system lets us have: each connection is one, and one too many is reset without a word."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # macOS names a limit that it does not grant
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _return_memory() -> None:
    """
    Have glibc give the memory of a large body or image back once it is free; by itself it keeps what one needed.

    What is smaller than `LARGE_BYTES`, as most images are, stays with the process, which asks the system for less then.
    """
    with suppress(AttributeError, OSError):  # another C library, which has no such function
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)
        mallopt(M_TRIM_THRESHOLD, 4 * LARGE_BYTES)


def _run_engine(bundle: Bundle, settings: Settings, link: EngineLink, counters: Counters) -> int:
    """The life of the process that runs the graphs for all workers."""
    classifier = Classifier(bundle, engine_share_of(settings), CollectorRegistry(), open_engine, counters)

    def front_of(pid: int) -> int | None:
        pids = counters.column(PID)[: counters.workers]
        return pids.index(pid) if pid in pids else None

    return EngineProcess(classifier, link.slots, link.listening, front_of).run()


if __name__ == "__main__":
    sys.exit(main())
