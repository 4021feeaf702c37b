"""
Several processes that are one service: started, watched, restarted and stopped together.

The supervisor answers no request. It forks once everything is imported and checked, so that the workers share that
memory, and before any thread of ours runs or any graph is open, which no fork would survive.
"""

import ctypes
import gc
import logging
import math
import os
import resource
import select
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from socket import socket
from typing import Final

from service.counters import BEAT, DEAD_CPU_S, PID, READY, RESTARTS, WAITING, WAS_READY, Counters
from service.logs import log, set_worker
from service.sockets import let_connections_in

START_FAILED: Final = 3  # a worker's exit code: it cannot start, and its successor could not either
SHORT_LIFE_S: Final = 60.0  # a worker that dies sooner makes its successor wait ...
RESTART_PAUSES_S: Final = (0.0, 0.5, 1.0, 2.0, 4.0)  # ... so long; after the last of them the service gives up
STARTING_S: Final = 1800.0  # one that is not ready by then is killed as well; TensorRT's engines take minutes to build
STUCK_S: Final = 30.0  # a worker whose event loop has stood still for so long is killed, ...
LOOK_EVERY_S: Final = 5.0  # ... which is looked for so often
PAUSE_S: Final = 2 * LOOK_EVERY_S  # longer between two looks: everything stood still
PATIENCE_S: Final = 5.0  # beyond the time to drain, until a worker that does not end is killed
STARTING_TICK_S: Final = 0.05  # how often the supervisor looks whether the workers are ready; only until they are

# A terminal that closes says SIGHUP, which nohup has us ignore.
HANGUP: Final = () if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else (signal.SIGHUP,)
STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, *HANGUP)
WATCHED_SIGNALS: Final = (*STOP_SIGNALS, signal.SIGCHLD)
PR_SET_PDEATHSIG: Final = 1


@dataclass(slots=True)
class Worker:
    """
    A worker's place, and who has it; the process that runs the graphs for all of them is one more, the last.

    Attributes:
        slot: its number, and its row of counters.
        name: how the log calls it.
        sockets: on which it listens. The supervisor holds them too, so that connections wait for a successor.
        pid: 0 while nobody does.
        started, due: time.monotonic() of its start, or of its successor's.
        killed: the pid that was killed for being stuck or late.
        short_lives: how many of its processes, one after another, died soon.
        ready: whether this process has been; one that drains is ready no more, and is not late for that.
    """

    slot: int
    name: int | str
    sockets: Sequence[socket]
    pid: int = 0
    started: float = 0.0
    due: float = 0.0
    short_lives: int = 0
    killed: int = 0
    ready: bool = False


class Supervisor:
    """Keeps one process per worker alive until it is told to stop, or until that proves hopeless."""

    def __init__(
        self,
        work: Callable[[int, Sequence[socket]], int],
        sockets: Sequence[Sequence[socket]],
        counters: Counters,
        drain_s: float,
    ) -> None:
        """
        Args:
            work: a worker's life, given its number and sockets, in a process of its own; returns the exit code. It
                finds STOP_SIGNALS blocked, and lets them in once it can handle them.
            sockets: for each worker, then, where they share an engine, for that.
            counters: with a row for each of them, then one for the supervisor.
            drain_s: seconds that workers need at most to end once they are told to.
        """
        self._work = work
        self._workers = [
            Worker(slot, "engine" if slot == counters.engine else slot, own) for slot, own in enumerate(sockets)
        ]
        self._counters = counters
        self._drain_s = drain_s
        self._began = time.monotonic()
        self._all_ready = False
        self._stopping = False
        self._kill_at = math.inf
        self._looked = self._went_on = self._began  # when it last looked, and when the last pause was over
        self._exit_code = 0

    def run(self) -> int:
        """Until the last worker has ended. Returns 0 if all did what they should, else 1."""
        signals, poll = self._watch_signals(), select.poll()  # poll takes any descriptor, select the first 1024
        poll.register(signals, select.POLLIN)
        self._counters.take(self._counters.supervisor)
        gc.collect()
        gc.freeze()  # what is there now is not looked at again, or it would be copied
        while not self._stopping or any(worker.pid for worker in self._workers):
            self._start_those_due()
            if poll.poll(math.ceil(1000 * self._time_to_wait())):
                for sig in os.read(signals, 1024):
                    if sig in STOP_SIGNALS:
                        self._stop(sig)
            self._reap()
            self._tell_when_ready()
            self._kill_the_stuck()
        return self._exit_code

    @staticmethod
    def _watch_signals() -> int:
        """
        Have every signal's number written into a pipe; returns its end to read.

        Waiting for blocked signals would be simpler, but numpy and onnxruntime have started threads, in which they are
        not blocked, and which would take and lose them.
        """
        read, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for sig in WATCHED_SIGNALS:
            signal.signal(sig, lambda *_: None)
        return read

    def _time_to_wait(self) -> float:
        """Seconds until there is something to do without a signal."""
        if not self._all_ready and not self._stopping:
            return STARTING_TICK_S
        due = [worker.due for worker in self._workers if not worker.pid and not self._stopping]
        return max(0.0, min([self._kill_at, *due, time.monotonic() + LOOK_EVERY_S]) - time.monotonic())

    def _start_those_due(self) -> None:
        for worker in reversed(self._workers):  # first of all, the engine that the others wait for
            if not self._stopping and not worker.pid and worker.due <= time.monotonic():
                self._start(worker)

    def _start(self, worker: Worker) -> None:
        supervisor = os.getpid()
        worker.started, worker.ready = time.monotonic(), False
        signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED_SIGNALS)  # the worker's are not for the supervisor's pipe
        try:
            worker.pid = os.fork()
        except OSError as error:  # no memory, or no more processes: that may pass, and the others still serve
            unblock_signals()
            cause = f"fork: {error.strerror}"
            pause = self._plan_successor(worker, cause)
            if pause is not None:
                log(logging.ERROR, "worker_not_started", worker=worker.name, cause=cause, retry_in_s=pause)
            return
        if not worker.pid:
            os._exit(self._live(worker, supervisor))  # nothing of the supervisor's own end is the worker's business
        unblock_signals()

    def _live(self, worker: Worker, supervisor: int) -> int:
        """In the worker's process: all of its life."""
        try:
            signal.set_wakeup_fd(-1)
            for sig in WATCHED_SIGNALS:
                signal.signal(sig, signal.SIG_DFL)
            os.setpgid(0, 0)  # or a terminal's Ctrl-C would reach it as well as the supervisor, who passes it on
            _die_with(supervisor)
            set_worker(worker.name)
            self._counters.take(worker.slot)
            for other in self._workers:
                if other is not worker:
                    _close(other.sockets)
            return self._work(worker.slot, worker.sockets)
        except BaseException as error:
            log(logging.CRITICAL, "worker_failed", error=error)
            return 1
        finally:
            logging.shutdown()

    def _stop(self, sig: int) -> None:
        """Pass the first signal on as SIGTERM, whichever it was; a second SIGINT as it is, which ends them at once."""
        if self._stopping and sig != signal.SIGINT:
            return
        passed_on = signal.SIGINT if self._stopping else signal.SIGTERM
        self._kill_at = time.monotonic() + PATIENCE_S + (0 if self._stopping else self._drain_s)
        self._stopping = True
        for worker in self._workers:
            _close(worker.sockets)  # each now closes with its worker, and the others get its connections
            if worker.pid:
                os.kill(worker.pid, passed_on)

    def _reap(self) -> None:
        """Note which workers have ended, and decide when, or whether, they get successors."""
        for worker in self._workers:
            if not worker.pid:
                continue
            pid, status, used = os.wait4(worker.pid, os.WNOHANG)
            if pid:
                self._note_end(worker, used)
                self._judge(worker, pid, os.waitstatus_to_exitcode(status))

    def _note_end(self, worker: Worker, used: resource.struct_rusage) -> None:
        worker.pid = 0
        row = self._counters.row(worker.slot)
        row[PID] = row[READY] = row[WAITING] = 0
        row[DEAD_CPU_S] += used.ru_utime + used.ru_stime

    def _judge(self, worker: Worker, pid: int, code: int) -> None:
        """What a worker's end means for the service; a negative exit code is a signal's number."""
        row = self._counters.row(worker.slot)
        if self._stopping:
            if code:
                self._exit_code = 1
                log(logging.ERROR, "worker_lost", worker=worker.name, pid=pid, cause=_cause(code))
            return
        if code == START_FAILED and not row[WAS_READY]:
            self._give_up("a worker cannot start; its log line start_failed says why")
            return
        for listening in worker.sockets:  # a worker that is told to stop, by whomever, shuts them
            let_connections_in(listening)
        pause, age = self._plan_successor(worker, _cause(code)), time.monotonic() - worker.started
        if pause is not None:
            row[RESTARTS] += 1
            log(
                logging.ERROR, "worker_died",
                worker=worker.name, pid=pid, cause=_cause(code), seconds=round(age, 3), restart_in_s=pause,
            )  # fmt: skip

    def _plan_successor(self, worker: Worker, cause: str) -> float | None:
        """In how many seconds one starts. None: after too many short lives never, the service ends."""
        age = time.monotonic() - worker.started
        worker.short_lives = worker.short_lives + 1 if age < SHORT_LIFE_S else 1
        if worker.short_lives > len(RESTART_PAUSES_S):
            self._give_up(
                f"worker {worker.name} failed {worker.short_lives} times, each time within {SHORT_LIFE_S:g} s "
                f"of its start, at last of {cause}"
            )
            return None
        pause = RESTART_PAUSES_S[worker.short_lives - 1]
        worker.due = time.monotonic() + pause
        return pause

    def _give_up(self, reason: str) -> None:
        log(logging.CRITICAL, "gave_up", reason=reason)
        self._exit_code = 1
        self._stop(signal.SIGTERM)

    def _tell_when_ready(self) -> None:
        """Once, when the last of them is for the first time."""
        if self._all_ready or self._stopping:
            return
        self._all_ready = all(self._counters.column(WAS_READY)[: len(self._workers)])
        if self._all_ready:
            seconds = round(time.monotonic() - self._began, 3)
            log(logging.INFO, "ready", workers=self._counters.workers, seconds=seconds)

    def _kill_the_stuck(self) -> None:
        """
        End those that do not end by themselves in time, are ready but do nothing any more, or never get ready.

        Where this process, too, stood still (the container was paused), all but those that are to end have the whole
        time once more.
        """
        now = time.monotonic()
        if now - self._looked > PAUSE_S:
            self._went_on = now
        self._looked = now
        overdue = now >= self._kill_at
        if overdue:
            self._kill_at = math.inf
        for worker in self._workers:
            row = self._counters.row(worker.slot)
            worker.ready = worker.ready or bool(row[READY])
            stuck = row[READY] and now - max(row[BEAT], self._went_on) > STUCK_S
            late = not worker.ready and now - max(worker.started, self._went_on) > STARTING_S
            if worker.pid and worker.killed != worker.pid and (overdue or stuck or late):
                log(logging.ERROR, "worker_killed", worker=worker.name, pid=worker.pid)
                os.kill(worker.pid, signal.SIGKILL)
                worker.killed = worker.pid


def unblock_signals() -> None:
    """Take the signals that came while they were blocked, and those to come."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, WATCHED_SIGNALS)


def _die_with(supervisor: int) -> None:
    """Have this process killed when its supervisor ends in whatever way."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != supervisor:  # it ended before it could be noticed
        os._exit(1)


def _cause(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _close(sockets: Sequence[socket]) -> None:
    for one in sockets:
        one.close()
