"""A front's end of the shared engine: looks like the batcher, and passes everything on to another process."""

import asyncio
import logging
import math
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from model_export.bundle import InputSpec
from service.cascade import Job, NotFiniteError, Outcome
from service.engine import EngineError
from service.errors import ServiceError
from service.logs import log
from service.places import MAX_RETRY_S, BatcherStoppedError, Places
from service.settings import PREFIX, SettingsError
from service.slots import Slots
from service.sockets import BACKLOG
from service.wire import Connection, Packer

JOBS: Final = Packer(Job, without=("image", "abandoned"))
OUTCOMES: Final = Packer(Outcome)
RECONNECT_S: Final = 0.5


class RemoteError(Exception):
    """What failed in the engine's process; the log of that process has its stack trace."""


class RemoteBatcher(Places[Job, Outcome]):
    """
    The places of one front, whose work is done by the engine's process, together with that of other fronts.

    Pixels go into a slot, whose number and the job's parameters into a message. As many images as the engine may just
    be working on do not count as waiting; beyond them there is a slot for every place.

    While the engine's process is gone, work is refused with not_ready, and what it had is answered with that. The
    supervisor holds the socket that it listened on, so a new connection waits there for the successor.

    Attributes:
        front: whose slots are used; to be set before connecting.
    """

    def __init__(self, *, max_queue: int, slots: Slots, address: str | bytes) -> None:
        """
        Args:
            max_queue: places of this front.
            slots: at least as many for each front.
            address: of the Unix socket on which the engine's process listens.
        """
        super().__init__(max_queue)
        self._slots = slots
        self._address = address
        self._working = slots.per_front - max_queue  # images that the engine may be working on
        self.front = 0
        self._loop: asyncio.AbstractEventLoop
        self._free = list(range(slots.per_front))[::-1]  # the lowest first: the others may never need memory
        self._pending: dict[int, tuple[asyncio.Future[Outcome], float]] = {}  # by slot; since when
        self._image_s = 0.0  # from submission to answer
        self._engine: _ToEngine | None = None  # None while its process is not there
        self._ready: asyncio.Future[None]
        self._greeted: Callable[[str, str], None]
        self._keeper: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """Places that are taken."""
        return self._reserved + max(0, len(self._pending) - self._working)

    @property
    def wait_s(self) -> float:
        """As the batcher's: as long as the images that are answered now, their work included."""
        return self._image_s if self.waiting else 0.0

    async def connect(self, greeted: Callable[[str, str], None]) -> None:
        """
        Wait until the engine's process is ready; stay connected from then on.

        Args:
            greeted: gets the provider and the variant that it runs, and those of each successor.

        Raises:
            EngineError: where there will be none.
        """
        self._loop = asyncio.get_running_loop()
        self._ready = self._loop.create_future()
        self._greeted = greeted
        self._keeper = asyncio.create_task(self._stay_connected())
        await self._ready

    async def stop(self) -> None:
        """Leave the engine's process. What is not finished gets BatcherStoppedError."""
        self._fail_pending(BatcherStoppedError())
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)

    def check(self) -> None:
        """As the batcher's; raises ServiceError not_ready while the engine's process is gone."""
        self._check_connected()
        super().check()

    def reserve(self, count: int) -> None:
        """As the batcher's; raises ServiceError not_ready while the engine's process is gone."""
        self._check_connected()
        super().reserve(count)

    def submit(self, item: Job) -> asyncio.Future[Outcome]:
        """As the batcher's."""
        future: asyncio.Future[Outcome] = self._loop.create_future()
        self._reserved -= 1
        if self._engine is None:
            future.set_exception(engine_gone())
            return future
        slot = self._free.pop()
        self._slots.pixels[self.front, slot] = item.image
        self._pending[slot] = (future, time.monotonic())
        self._engine.send((slot, JOBS.values(item)))
        future.add_done_callback(partial(self._pass_on, slot))
        return future

    def _retry_after(self) -> int:
        """A full queue takes about as long as the images that are answered now."""
        return min(MAX_RETRY_S, max(1, math.ceil(self._image_s)))

    def _check_connected(self) -> None:
        if self._engine is None:
            raise engine_gone()

    def _pass_on(self, slot: int, future: asyncio.Future[Outcome]) -> None:
        """Where nobody waits any more, tell the engine's process; the slot stays taken until that has answered."""
        pending = self._pending.get(slot)
        if future.cancelled() and self._engine is not None and pending is not None and pending[0] is future:
            self._engine.send((slot,))

    async def _stay_connected(self) -> None:
        """Until cancelled, or until nobody holds the engine's socket any more."""
        while True:
            try:
                transport, engine = await self._reach_engine()
            except ConnectionRefusedError as error:
                if not self._ready.done():
                    self._ready.set_exception(EngineError(f"the engine's process has ended ({error.strerror})"))
                return
            except OSError as error:  # such as one file too many: it may pass
                log(logging.WARNING, "engine_unreachable", reason=str(error), retry_s=RECONNECT_S)
                await asyncio.sleep(RECONNECT_S)
                continue
            try:
                await engine.gone.wait()
            finally:
                transport.abort()
                self._engine = None
                self._fail_pending(engine_gone())

    async def _reach_engine(self) -> tuple[asyncio.Transport, "_ToEngine"]:
        with ExitStack() as on_failure:
            ours = on_failure.enter_context(socket.socket(socket.AF_UNIX))
            ours.connect(self._address)  # does not wait: who starts the engine's process listens already
            reached = await self._loop.create_unix_connection(lambda: _ToEngine(self._received), sock=ours)
            on_failure.pop_all()
        return reached

    def _received(self, engine: "_ToEngine", message: list[Any]) -> None:
        """First comes a greeting, [provider, variant]; then answers."""
        if self._engine is not None:
            self._answer(message)
            return
        self._engine = engine
        self._greeted(*message)
        if not self._ready.done():
            self._ready.set_result(None)

    def _answer(self, answers: list[Any]) -> None:
        """[slot, fields of Outcome] or [slot, name of a failure, text] each."""
        now = time.monotonic()
        for slot, *answer in answers:
            future, since = self._pending.pop(slot)
            self._free.append(slot)
            self._image_s += 0.1 * (now - since - self._image_s)
            if future.done():
                continue
            if len(answer) == 1:
                future.set_result(OUTCOMES.data(answer[0]))
            else:
                name, text = answer
                future.set_exception((NotFiniteError if name == NotFiniteError.__name__ else RemoteError)(text))

    def _fail_pending(self, error: Exception) -> None:
        for slot, (future, _) in self._pending.items():
            self._free.append(slot)
            if not future.done():
                future.set_exception(error)
        self._pending.clear()


@dataclass(frozen=True, slots=True)
class EngineLink:
    """What leads from the workers to the process that runs their graphs; made before either is forked."""

    slots: Slots
    listening: socket.socket
    batcher: RemoteBatcher


def open_link(fronts: int, image: InputSpec, *, max_queue: int, max_batch: int) -> EngineLink:
    """
    Slots for the images of several fronts, and a socket without a name in any directory.

    A front has a slot for every image that may wait, and for those of its own that the engine may be working on.

    Args:
        max_queue: images of one front that may wait.
        max_batch: images of all fronts that the engine may be working on.

    Raises:
        SettingsError: where there is no memory for so many.
    """
    try:
        slots = Slots(fronts, max_queue + -(-max_batch // fronts), image.height, image.width)
    except (OSError, OverflowError) as error:
        raise SettingsError(
            f"{PREFIX}MAX_QUEUE gives each of {fronts} workers {max_queue:,} places, and there is no memory to share "
            f"for as many images ({error}); lower it"
        ) from None
    listening = socket.socket(socket.AF_UNIX)
    listening.bind("")  # Linux then chooses a name of its own
    listening.listen(BACKLOG)
    listening.setblocking(False)
    return EngineLink(
        slots, listening, RemoteBatcher(max_queue=max_queue, slots=slots, address=listening.getsockname())
    )


class _ToEngine(Connection):
    """The connection to the engine's process, as long as that lives."""

    def __init__(self, received: Callable[["_ToEngine", list[Any]], None]) -> None:
        super().__init__()
        self._pass_on = received
        self.gone = asyncio.Event()

    def received(self, message: list[Any]) -> None:
        self._pass_on(self, message)

    def connection_lost(self, error: Exception | None) -> None:
        self.gone.set()


def engine_gone() -> ServiceError:
    """What is said to clients meanwhile."""
    return ServiceError(
        "not_ready", "the process that runs the graphs has died, another one is starting; retry in 1 s", retry_after=1
    )
