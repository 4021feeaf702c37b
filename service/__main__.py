"""The command line: ride-serve."""

import ctypes
import logging
import os
import resource
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from socket import socket
from types import FrameType
from typing import Final, NoReturn

from prometheus_client import CollectorRegistry

from model_export.bundle import Bundle, BundleError, read_bundle
from service.classifier import Classifier
from service.counters import PID, READY, Counters
from service.engine import open_engine
from service.engine_process import EngineProcess
from service.logs import log, set_up
from service.metrics import shared_counters
from service.remote import EngineLink, open_link
from service.server import DrainingServer
from service.settings import Settings, SettingsError, read_settings, unknown_variables
from service.shares import choose_shared_engine, choose_workers, engine_share_of, share_of
from service.sockets import open_sockets
from service.supervisor import STOP_SIGNALS, Supervisor
from service.warm_up import GPU_BATCH

LAST_STANDARD_STREAM: Final = 2
LARGE_BYTES: Final = 4 << 20
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


def main(arguments: list[str] | None = None) -> int:
    """Serve until told to stop. Returns 0, 1 where work was lost or the engine failed, 2 for the caller's mistakes."""
    _open_standard_streams()
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
        link, batcher = None, None
        if shared_engine:
            link = open_link(
                workers, bundle.manifest.input, max_queue=share.max_queue, max_batch=share.max_batch or GPU_BATCH
            )
            batcher = link.batcher
        classifier = Classifier(bundle, share, CollectorRegistry(), open_engine, counters, batcher)
    except (SettingsError, BundleError) as error:
        print(f"ride-serve: {error}", file=sys.stderr)
        return 2
    _allow_open_files()
    _return_memory()
    log(logging.INFO, "starting", workers=workers, settings=settings.model_dump(mode="json"))
    try:
        groups = open_sockets(settings.host, settings.port, workers)
    except OSError as error:
        log(logging.ERROR, "cannot_listen", reason=error.strerror)
        return 1
    for listening in groups[0]:
        host, port = listening.getsockname()[:2]
        log(logging.INFO, "listening", url=f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")

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


def _open_standard_streams() -> None:
    """Where one of them is closed, a socket would get its number, which libuv does not close."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= LAST_STANDARD_STREAM:
        pass
    os.close(descriptor)


def _stop_early(sig: int, frame: FrameType | None) -> NoReturn:
    """Nothing has been accepted yet, so that nothing is lost."""
    sys.exit(0)


def _allow_open_files() -> None:
    """As many as the system lets us have: each connection is one, and one too many is reset without a word."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # a limit from before the system's own, fs.nr_open, was lowered
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
