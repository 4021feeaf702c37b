"""What Linux tells of the service's processes, summed over all of them."""

import os
import resource
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

PROC: Final = Path("/proc")
TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")
PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")


STARTED: Final = time.time()  # of the service: before the fork, and not moved where the clock is set


class _Spare:
    """
    A file descriptor that is kept, to be there for reading /proc when all others are taken.

    For the event loop's thread, as all that takes descriptors there: nobody else gets it meanwhile.
    """

    def __init__(self) -> None:
        self._descriptor: int | None = None
        self._take()

    @contextmanager
    def given_up(self) -> Iterator[None]:
        """Inside there is one descriptor to be had."""
        if self._descriptor is not None:
            os.close(self._descriptor)
        try:
            yield
        finally:
            self._take()

    def _take(self) -> None:
        try:
            self._descriptor = os.open(os.devnull, os.O_RDONLY)
        except OSError:
            self._descriptor = None


SPARE: Final = _Spare()  # a fork gives each process its own


@dataclass(frozen=True, slots=True)
class ProcessFigures:
    """One process: processor time in seconds since its start, memory in bytes."""

    cpu_s: float
    resident_bytes: int
    virtual_bytes: int
    open_files: int


def process_families(pids: Iterable[int], dead_cpu_s: float) -> Iterator[Metric]:
    """
    The metrics named process_*, as prometheus_client names them, over several processes, and how near the one with most
    open files is to the limit; none where there is no /proc.

    Args:
        dead_cpu_s: processor seconds of those that are no more, so that the sum does not fall.
    """
    with SPARE.given_up():
        figures = [process for pid in pids if (process := read_process(pid)) is not None]
    if not figures:
        return
    most_files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    yield CounterMetricFamily(
        "process_cpu_seconds",
        "User and system time of all processes of the service.",
        value=dead_cpu_s + sum(process.cpu_s for process in figures),
    )
    for name, text, value in (
        (
            "resident_memory_bytes",
            "Resident memory of all processes; what they share counts for each.",
            sum(process.resident_bytes for process in figures),
        ),
        ("virtual_memory_bytes", "Virtual memory of all processes.", sum(process.virtual_bytes for process in figures)),
        (
            "open_fds",
            "File descriptors that are open, in all processes.",
            sum(process.open_files for process in figures),
        ),
        (
            "max_fds",
            "File descriptors that may be open, in all processes.",
            len(figures) * most_files,
        ),
        ("start_time_seconds", "Start of the service, in seconds since 1970.", STARTED),
    ):
        yield GaugeMetricFamily(f"process_{name}", text, value=value)
    yield GaugeMetricFamily(
        "ride_open_files_share",
        "Open file descriptors of the process that has most of them, as a share of what one process may have.",
        value=max(process.open_files for process in figures) / most_files,
    )


def read_process(pid: int) -> ProcessFigures | None:
    """A process's figures; None where it is gone."""
    try:
        # The name, in brackets, may hold anything. What follows is counted from field 3 of proc(5).
        fields = (PROC / f"{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    try:
        open_files = len(os.listdir(PROC / f"{pid}/fd"))
    except OSError:  # just dead and not buried yet: its processor time still counts here, or the sum would fall
        open_files = 0
    return ProcessFigures(
        cpu_s=(int(fields[11]) + int(fields[12])) / TICKS_PER_S,
        resident_bytes=int(fields[21]) * PAGE_BYTES,
        virtual_bytes=int(fields[20]),
        open_files=open_files,
    )
