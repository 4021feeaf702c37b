"""The service as a client meets it: in this process over ASGI, and as a process of its own over a socket."""

import asyncio
import io
import logging
import os
import signal
import threading
import warnings
from contextlib import asynccontextmanager, contextmanager

import httpx
import numpy as np
import pytest
import uvicorn
from PIL import Image
from prometheus_client import CollectorRegistry

from model_export.bundle import read_bundle
from service.app import create_app
from service.classifier import Classifier
from service.engine import open_engine
from service.settings import Settings
from tests.tiny import TinyModel, write_bundle

PATIENCE_S = 60  # after which a test gives up on what should happen at once


@pytest.fixture(scope="session", autouse=True)
def _no_settings_from_outside():
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith("RIDE_") and name != "RIDE_DATA":  # no setting: tests of real images need it
                patch.delenv(name)
        yield


@pytest.fixture(scope="session", autouse=True)
def _heed_hangups():
    """Services that the tests start do so, although the tests may run under nohup, which they would inherit."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="session")
def anyio_backend():
    """Asynchronous tests run on asyncio, as the service does."""
    return "asyncio"


@pytest.fixture(scope="session")
def slow_bundle(tmp_path_factory):
    """The tiny bundle; a SLOW_COLOUR image keeps it busy for about a second."""
    return write_bundle(tmp_path_factory.mktemp("bundles") / "slow", TinyModel(), slow_turns=300_000)


def encode(image, kind="PNG", **options):
    """The bytes of an image file, from pixels (H, W, 3) or a Pillow image."""
    file = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(file, kind, **options)
    return file.getvalue()


async def until(condition):
    """Wait for what other tasks or threads bring about."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110, what it waits for is a thread's as often as a task's
            await asyncio.sleep(0.001)


class WatchedEngine:
    """
    The real engine; it notes the rows of each run, and can be held before its next batch.

    Attributes:
        runs: (stage, rows), in order.
        held: whether a batch waits at the gate.
    """

    def __init__(self, engine):
        self._engine = engine
        self._gate = threading.Event()
        self._gate.set()
        self.provider, self.variant = engine.provider, engine.variant
        self.runs = []
        self.held = False

    @contextmanager
    def hold(self):
        """Batches wait until the block is left."""
        self._gate.clear()
        try:
            yield
        finally:
            self._gate.set()

    def trunk(self, images):
        self.held = not self._gate.is_set()
        self._gate.wait()
        self.held = False
        self.runs.append(("trunk", len(images)))
        return self._engine.trunk(images)

    def expert(self, index, features, logits_sum):
        assert getattr(features, "rows", len(features)) == len(logits_sum)  # on a device, filled up beyond them
        self.runs.append((f"expert_{index}", len(logits_sum)))
        return self._engine.expert(index, features, logits_sum)

    def router(self, index, expert_feature, logits_sum):
        self.runs.append((f"router_{index}", len(logits_sum)))
        return self._engine.router(index, expert_feature, logits_sum)

    def take(self, features, rows):
        return self._engine.take(features, rows)

    def join(self, features):
        return self._engine.join(features)


class Running:
    """A service that runs in this process."""

    def __init__(self, app, client, classifier, registry):
        self.app = app
        self.client = client
        self.classifier = classifier
        self._registry = registry
        self.engine = None

    async def post(self, *files, **parameters):
        """POST /classify: bytes, or (name, bytes), each a file of a multipart body."""
        named = [file if isinstance(file, tuple) else (f"{number}.png", file) for number, file in enumerate(files)]
        return await self.client.post("/classify", files=[("file", file) for file in named], params=parameters)

    async def answer(self, *images, **parameters):
        """The results for images of these pixels."""
        response = await self.post(*map(encode, images), **parameters)
        assert response.status_code == 200, response.text
        return response.json()["results"]

    def metric(self, name, **labels):
        """A figure that /metrics shows, None where there is none."""
        return self._registry.get_sample_value(f"ride_{name}", labels)

    def decoded(self):
        """Images decoded so far, which are in the queue or beyond; its gauge also counts those on their way."""
        return self.metric("stage_seconds_count", stage="decode")


@asynccontextmanager
async def start(bundle, *, ready=True, opened=open_engine, **settings):
    """Serve a bundle, by settings, and wait until it is ready; `opened` opens the engine, which can be held."""
    registry = CollectorRegistry()
    engines = []

    def open_watched(*arguments, **options):
        engines.append(WatchedEngine(opened(*arguments, **options)))
        return engines[-1]

    classifier = Classifier(
        read_bundle(bundle), Settings(**{"threads": 1, "engine_thread": "on"} | settings), registry, open_watched
    )
    app = create_app(classifier)
    client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service", timeout=PATIENCE_S)
    running = Running(app, client, classifier, registry)
    async with app.api.router.lifespan_context(app.api), client:
        if ready:
            await until(lambda: classifier.state != "starting")
            running.engine = engines[0]
            running.engine.runs.clear()  # of the warm-up
        yield running


@pytest.fixture
async def service(tiny_bundle):
    """The tiny bundle, served with the usual settings."""
    async with start(tiny_bundle) as running:
        yield running


@pytest.fixture
def _logging_restored():
    """What `set_up` changes for the whole process is afterwards as it was."""
    handlers, level, filters = logging.root.handlers[:], logging.root.level, warnings.filters[:]
    yield
    logging.captureWarnings(False)
    warnings.filters[:] = filters
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


async def started(app, **options):
    """A uvicorn.Server that answers on a free port, until its `shutdown`."""
    config = uvicorn.Config(app, port=0, ws="none", lifespan="off", log_config=None, **options)
    config.load()
    server = uvicorn.Server(config)
    server.lifespan = config.lifespan_class(config)
    await server.startup()
    return server


@asynccontextmanager
async def connected(server):
    """A connection to it: reader and writer."""
    reader, writer = await asyncio.open_connection(*server.servers[0].sockets[0].getsockname()[:2])
    async with asyncio.timeout(30):
        try:
            yield reader, writer
        finally:
            writer.transport.abort()
