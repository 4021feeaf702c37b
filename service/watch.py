"""
Looks after requests that take long: ends those whose time is over, and sees whether the clients of others hung up.

One timer for all of them. A timer for each would cost more than everything else that a request needs besides its
graphs, and most are answered before anybody needs to look.
"""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, Protocol

from service.errors import ClientGoneError, ServiceError
from service.uploads import Body

EVERY_S: Final = 0.05


class Watched(Protocol):
    """
    A request under way.

    Attributes:
        began: time.monotonic() when it did.
    """

    began: float

    def time_over(self, explain: Callable[[str], ServiceError]) -> None:
        """It took too long to be "received" or "answered", which `explain` makes an error of; may be called again."""

    def look(self) -> None:
        """It takes a while; from now on notice when its client hangs up. May be called again."""


class Watch:
    """The requests under way, in the order in which they began. For the event loop's thread only."""

    def __init__(self, timeout_s: float) -> None:
        """
        Args:
            timeout_s: how long a request may take.
        """
        self._timeout_s = timeout_s
        self._watched: dict[Watched, None] = {}
        self._ticking = False

    def add(self, watched: Watched) -> None:
        """Look after this one until `remove`."""
        self._watched[watched] = None
        if not self._ticking:
            self._ticking = True
            asyncio.get_running_loop().call_later(EVERY_S, self._tick)

    def remove(self, watched: Watched) -> None:
        """It is over."""
        del self._watched[watched]

    @contextmanager
    def over(self, body: Body) -> Iterator[None]:
        """
        Watch over the task that runs the block, a request with this body.

        Raises:
            ServiceError: timeout.
            ClientGoneError: where the client hung up before the block was left.
        """
        watched = _WatchedTask(body)
        self.add(watched)
        try:
            yield
        except asyncio.CancelledError:
            if watched.reason is None:  # it was somebody else's wish
                raise
            watched.task.uncancel()
            raise watched.reason from None
        finally:
            self.remove(watched)
            watched.end()

    def _tick(self) -> None:
        now = time.monotonic()
        for watched in list(self._watched):
            age = now - watched.began
            if age < EVERY_S:
                break  # the others are younger still
            if age >= self._timeout_s:
                watched.time_over(self._timeout)
            else:
                watched.look()
        self._ticking = bool(self._watched)
        if self._ticking:
            asyncio.get_running_loop().call_later(EVERY_S, self._tick)

    def _timeout(self, step: str) -> ServiceError:
        return ServiceError(
            "timeout",
            f"not {step} within {self._timeout_s:g} s (RIDE_TIMEOUT_S); send less at once, or retry later",
        )


class _WatchedTask:
    """A request that a task answers, and why the task was cancelled, where we did so."""

    def __init__(self, body: Body) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.task = task
        self.body = body
        self.began = time.monotonic()
        self.reason: ServiceError | ClientGoneError | None = None
        self._listener: asyncio.Task[None] | None = None

    def time_over(self, explain: Callable[[str], ServiceError]) -> None:
        """Cancel the task."""
        self._stop(explain("answered" if self.body.complete else "received"))

    def look(self) -> None:
        """From now on, notice when the client hangs up; while it is still sending, who reads its body does."""
        if self._listener is None and self.body.complete:
            self._listener = asyncio.ensure_future(self.body.client_gone())
            self._listener.add_done_callback(self._heard)

    def end(self) -> None:
        """Take no notice of anything any more, and let go of the reason, whose stack trace holds on to this and all."""
        self.reason = None
        if self._listener is not None:
            self._listener.remove_done_callback(self._heard)
            self._listener.cancel()

    def _heard(self, listener: asyncio.Task[None]) -> None:
        if not listener.cancelled():
            self._stop(ClientGoneError())

    def _stop(self, reason: ServiceError | ClientGoneError) -> None:
        if self.reason is None:
            self.reason = reason
            self.task.cancel()
