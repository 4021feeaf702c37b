"""A server under test: started, found with all its children, looked at, and stopped without leaving anything behind."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import psutil

from benchmarks.machine import ROOT

START_S: Final = 60.0
STOP_S: Final = 20.0
POLL_S: Final = 0.01


class StartError(RuntimeError):
    """A server did not answer; has the last lines that it wrote."""


@dataclass(frozen=True)
class Memory:
    """Megabytes of one process: resident, and with shared pages divided among those who share them."""

    name: str
    rss_mb: float
    pss_mb: float


class Server:
    """
    A command and every process that comes of it. A context manager: stopped when its block is left.

    It inherits no settings of ours (RIDE_*): what it is to have, it is given.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RIDE_")}
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed by `stop`
        self.started = time.perf_counter()
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**inherited, "PYTHONPATH": str(ROOT), **environment},
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )
        self._root = psutil.Process(self._process.pid)
        self._known: dict[int, psutil.Process] = {}

    def __enter__(self) -> "Server":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def wait_until(self, ready: Callable[[], Any]) -> tuple[Any, float]:
        """
        Poll until `ready` returns something true: that, and the seconds since the start.

        Raises:
            StartError: when the process ends, or after START_S.
        """
        while time.perf_counter() < self.started + START_S:
            if found := ready():
                return found, time.perf_counter() - self.started
            if self._process.poll() is not None:
                raise StartError(f"ended with status {self._process.returncode}: {self.last_lines()}")
            time.sleep(POLL_S)
        raise StartError(f"does not answer after {START_S:g} s: {self.last_lines()}")

    def log(self) -> str:
        """All that it wrote so far."""
        self._log.flush()
        return Path(f"/proc/self/fd/{self._log.fileno()}").read_text(errors="replace")

    def last_lines(self) -> str:
        """The last thousand characters of its log."""
        return self.log()[-1000:].strip()

    def processes(self) -> list[psutil.Process]:
        """The process that was started and all that descend from it and live, also those whose parent has gone."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in (self._root, *self._root.children(recursive=True)):
                self._known[process.pid] = process
        for process in psutil.process_iter():  # a child whose parent ended is nobody's child, but keeps the session
            with contextlib.suppress(OSError, psutil.NoSuchProcess):
                if os.getsid(process.pid) == self._root.pid:
                    self._known[process.pid] = process
        return [process for process in self._known.values() if _lives(process)]

    def memory(self) -> list[Memory]:
        """Of each process, the largest first."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                full = process.memory_full_info()
                words = " ".join(Path(word).name for word in process.cmdline())  # no paths of this machine
                found.append(Memory(words[-60:], full.rss / 1e6, full.pss / 1e6))
        return sorted(found, key=lambda memory: -memory.pss_mb)

    def cpu_seconds(self) -> float:
        """Processor time of all its processes so far."""
        total = 0.0
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def terminate(self) -> float:
        """
        SIGTERM to the process that was started, and to it alone; it should see to its children.

        Returns:
            time.perf_counter() just before.
        """
        self.processes()
        told = time.perf_counter()
        self._process.terminate()
        return told

    def wait(self) -> int | None:
        """Its exit status; None after STOP_S."""
        try:
            return self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            return None

    def stop(self) -> None:
        """End it, and kill what is left of it."""
        self.terminate()
        self.wait()
        left = self.processes()
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=STOP_S)
        self._process.wait()
        self._log.close()


def end_like_an_error() -> None:
    """From now on SIGTERM raises SystemExit, so that whoever ends the benchmark ends its servers, too."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on, nor on the one after it."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port: int = first.getsockname()[1]
            with contextlib.suppress(OSError, OverflowError):
                second.bind(("127.0.0.1", port + 1))
                return port


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
