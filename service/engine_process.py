"""The engine's end: one process that answers the jobs of all fronts, so that batches form across them."""

import asyncio
import logging
import os
import signal
import socket
import struct
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import uvloop

from service.cascade import Job, NotFiniteError, Outcome
from service.classifier import Classifier
from service.health import end_if_broken
from service.logs import log
from service.remote import JOBS, OUTCOMES
from service.slots import Slots
from service.supervisor import START_FAILED, STOP_SIGNALS, unblock_signals
from service.wire import Connection, pack

BEAT_EVERY_S: Final = 1.0
LAST_CALL_S: Final = 0.1  # after which fronts that have connected, but were not let in yet, have been
CREDENTIALS: Final = struct.Struct("3i")  # of the process that connected: its id, and those of its user and group


class EngineProcess:
    """
    Answers fronts until it is told to stop and the last of them has left.

    To a front goes a greeting, [provider, variant], and then lists of answers: [slot, fields of Outcome], or
    [slot, name of a failure, text]. From a front come lists of jobs, [slot, fields of Job], and of those that nobody
    waits for any more, [slot].
    """

    def __init__(
        self, classifier: Classifier, slots: Slots, listening: socket.socket, front_of: Callable[[int], int | None]
    ) -> None:
        """
        Args:
            classifier: which is started here.
            listening: a Unix socket.
            front_of: the number of the front that is this process, None where it is none.
        """
        self.classifier = classifier
        self.slots = slots
        self._listening = listening
        self._front_of = front_of
        self._fronts: set[_ToFront] = set()
        self._told_to_stop = asyncio.Event()
        self._left = asyncio.Event()
        self._logged: Exception | None = None

    def run(self) -> int:
        """All of the process's life; returns the exit code, 0 or START_FAILED."""
        return uvloop.run(self._serve_until_signalled())

    async def _serve_until_signalled(self) -> int:
        loop = asyncio.get_running_loop()
        for sig in STOP_SIGNALS:
            loop.add_signal_handler(sig, self._handle, sig)
        unblock_signals()
        return await self.serve()

    def _handle(self, sig: signal.Signals) -> None:
        if self.classifier.state == "starting":  # nothing has been accepted yet
            os._exit(0)
        if sig == signal.SIGINT and self._told_to_stop.is_set():
            os._exit(1)
        self.stop()

    async def serve(self) -> int:
        """Start the classifier and answer fronts; returns as `run`."""
        await self.classifier.start()
        if self.classifier.state == "failed":
            return START_FAILED
        loop = asyncio.get_running_loop()
        server = await loop.create_unix_server(lambda: _ToFront(self), sock=self._listening)
        beating = asyncio.create_task(self._beat())
        try:
            await self._told_to_stop.wait()
            await asyncio.sleep(LAST_CALL_S)
            while self._fronts:
                self._left.clear()
                await self._left.wait()
        finally:
            beating.cancel()
            server.close()
        await self.classifier.stop()
        return 0

    async def _beat(self) -> None:
        while True:
            self.classifier.metrics.publish()
            end_if_broken(self.classifier.engine_watch)
            await asyncio.sleep(BEAT_EVERY_S)

    def stop(self) -> None:
        """End when the last front has left."""
        self._told_to_stop.set()

    def enter(self, front: "_ToFront") -> int | None:
        """Its number, by the process at the other end; None for a stranger, who is not let in."""
        credentials = front.transport.get_extra_info("socket").getsockopt(
            socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size
        )
        number = self._front_of(CREDENTIALS.unpack(credentials)[0])
        if number is not None:
            self._fronts.add(front)
        return number

    def leave(self, front: "_ToFront") -> None:
        """It has ended; or it was never let in."""
        self._fronts.discard(front)
        self._left.set()

    def explain(self, error: BaseException) -> tuple[str, str]:
        """A failure as a front gets it; a surprising one is logged here, once for all that it befell."""
        if isinstance(error, Exception) and not isinstance(error, NotFiniteError) and error is not self._logged:
            self._logged = error
            log(logging.ERROR, "batch_failed", error=error)
        return type(error).__name__, str(error)


class _ToFront(Connection):
    """The connection to one front, and its jobs that are not answered yet, by slot."""

    def __init__(self, process: EngineProcess) -> None:
        super().__init__()
        self._process = process
        self._jobs: dict[int, tuple[Job, asyncio.Future[Outcome]]] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        number = self._process.enter(self)
        if number is None:
            transport.close()
            return
        self._pixels = self._process.slots.pixels[number]
        classifier = self._process.classifier
        self.transport.write(pack((classifier.provider, classifier.variant)))

    def received(self, message: list[Any]) -> None:
        for slot, *job in message:
            if job:
                self._begin(slot, JOBS.data(job[0], image=self._pixels[slot]))
            elif slot in self._jobs:
                self._abandon(*self._jobs[slot])

    def connection_lost(self, error: Exception | None) -> None:
        self._process.leave(self)
        for job, future in self._jobs.values():
            self._abandon(job, future)

    def _begin(self, slot: int, job: Job) -> None:
        future = self._process.classifier.submit(job)
        self._jobs[slot] = (job, future)
        future.add_done_callback(partial(self._answer, slot))

    def _answer(self, slot: int, future: asyncio.Future[Outcome]) -> None:
        del self._jobs[slot]
        error = asyncio.CancelledError() if future.cancelled() else future.exception()
        if self.transport.is_closing():
            return
        if error is None:
            self.send((slot, OUTCOMES.values(future.result())))
        else:
            self.send((slot, *self._process.explain(error)))

    @staticmethod
    def _abandon(job: Job, future: asyncio.Future[Outcome]) -> None:
        job.abandoned = True
        future.cancel()
