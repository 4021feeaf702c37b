"""The HTTP server of one process: it drains before it stops."""

import asyncio
import logging
import os
import signal
import time
from collections.abc import Sequence
from functools import partial
from socket import socket
from types import FrameType
from typing import Any, Final, cast

import uvicorn

from service.app import create_app
from service.classifier import Classifier
from service.health import end_if_broken
from service.protocol import GuardedProtocol
from service.sockets import BACKLOG, admit, refuse_connections
from service.supervisor import HANGUP, START_FAILED, unblock_signals

KEEP_ALIVE_S: Final = 30
QUEUE_EMPTY_S: Final = 0.2  # by then, whoever was connecting when the service stopped listening has been let in
LAST_WORDS_S: Final = 2.0  # for whoever has connected, but not asked yet


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
        protocol = partial(GuardedProtocol, fast_url_path=b"/classify", fast_path=app.classify.fast_path)
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
        except SystemExit as end:  # uvicorn has logged why; 0: told to stop before signals were handled here
            return START_FAILED if end.code else 0
        return START_FAILED if self._classifier.state == "failed" else 0

    async def startup(self, sockets: list[socket] | None = None) -> None:
        """From here on signals are handled."""
        for sig in HANGUP:  # uvicorn knows the others
            signal.signal(sig, self.handle_exit)
        unblock_signals()
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
