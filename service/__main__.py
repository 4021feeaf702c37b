"""The command line: ride-serve."""

import asyncio
import logging
import os
import signal
import sys
import time
from types import FrameType

import uvicorn
from prometheus_client import CollectorRegistry

from model_export.bundle import BundleError, read_bundle
from service.app import create_app
from service.classifier import Classifier
from service.engine import open_engine
from service.logs import log, set_up
from service.protocol import GuardedProtocol
from service.settings import SettingsError, read_settings, unknown_variables

KEEP_ALIVE_S = 30
BACKLOG = 2048
LAST_WORDS_S = 0.2  # for whoever has connected, but not asked yet, when the service stops to listen


class DrainingServer(uvicorn.Server):
    """
    On SIGTERM or SIGINT it goes on listening, so that new work is refused politely, until accepted work is answered.

    A second SIGINT, from an impatient person, ends it at once, and so does the end of the time for it: with status 1.
    """

    def __init__(self, config: uvicorn.Config, classifier: Classifier, drain_s: float) -> None:
        super().__init__(config)
        self._classifier = classifier
        self._drain_s = drain_s
        self._told_to_stop = False
        self._drain: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        """Listen, and say where."""
        await super().startup(sockets)  # type: ignore[arg-type]
        for server in self.servers:
            for socket in server.sockets:
                host, port = socket.getsockname()[:2]
                log(logging.INFO, "listening", url=f"http://{host}:{port}")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Note it for the next tick: a signal may come in the midst of anything, even of itself."""
        if sig == signal.SIGINT and self._told_to_stop:
            self.should_exit = self.force_exit = True
        self._told_to_stop = True

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: begin to drain if told so, stop if the engine could not start."""
        if self._told_to_stop and self._drain is None:
            self._drain = asyncio.create_task(self._drain_then_exit())
        if self._classifier.state == "failed":
            self.should_exit = True
        return await super().on_tick(counter)

    async def _drain_then_exit(self) -> None:
        started = time.monotonic()
        if not await self._classifier.drain(self._drain_s):
            logging.shutdown()
            os._exit(1)  # a batch that does not end cannot be stopped, and an orderly exit would wait for it
        for server in self.servers:
            server.close()
        await asyncio.sleep(LAST_WORDS_S)
        left = self._drain_s - (time.monotonic() - started)
        self.config.timeout_graceful_shutdown = max(1, round(left))  # for clients that read their answer slowly
        self.should_exit = True


def main(arguments: list[str] | None = None) -> int:
    """Serve until told to stop. Returns 0, 1 where work was lost or the engine failed, 2 for the caller's mistakes."""
    try:
        settings = read_settings(arguments)
        set_up(settings.log_level)
        for line in unknown_variables():
            log(logging.WARNING, "unknown_variable", message=line)
        classifier = Classifier(read_bundle(settings.bundle), settings, CollectorRegistry(), open_engine)
    except (SettingsError, BundleError) as error:
        print(f"ride-serve: {error}", file=sys.stderr)
        return 2
    log(logging.INFO, "starting", settings=settings.model_dump(mode="json"))
    config = uvicorn.Config(
        create_app(classifier), host=settings.host, port=settings.port, log_config=None, access_log=False,
        loop="uvloop", http=GuardedProtocol, ws="none", server_header=False, proxy_headers=False, backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_S, timeout_graceful_shutdown=1,
    )  # fmt: skip
    server = DrainingServer(config, classifier, settings.drain_s)
    try:
        server.run()
    except SystemExit:  # uvicorn has logged why, such as a port in use
        return 1
    return 1 if server.force_exit or classifier.state == "failed" else 0


if __name__ == "__main__":
    sys.exit(main())
