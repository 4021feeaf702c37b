"""
Looks after requests that take long: ends those whose time is over, and sees whether the clients of others hung up.

One timer for all of them. A timer for each would cost more than everything else that a request needs besides its
graphs, and most are answered before anybody needs to look.
"""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from service.errors import ClientGoneError, ServiceError
from service.uploads import Body

EVERY_S: Final = 0.05


class Watch:
    """The requests under way, in the order in which they began. For the event loop's thread only."""

    def __init__(self, timeout_s: float) -> None:
        """
        Args:
            timeout_s: how long a request may take.
        """
        self._timeout_s = timeout_s
        self._watched: dict[_Watched, None] = {}
        self._ticking = False

    @contextmanager
    def over(self, body: Body) -> Iterator[None]:
        """
        Watch over the task that runs the block, a request with this body.

        Raises:
            ServiceError: timeout.
            ClientGoneError: where the client hung up before the block was left.
        """
        watched = _Watched(body)
        self._watched[watched] = None
        if not self._ticking:
            self._ticking = True
            asyncio.get_running_loop().call_later(EVERY_S, self._tick)
        try:
            yield
        except asyncio.CancelledError:
            if watched.reason is None:  # it was somebody else's wish
                raise
            watched.task.uncancel()
            raise watched.reason from None
        finally:
            del self._watched[watched]
            watched.end()

    def _tick(self) -> None:
        now = time.monotonic()
        for watched in self._watched:
            age = now - watched.began
            if age < EVERY_S:
                break  # the others are younger still
            if age >= self._timeout_s:
                watched.stop(self._timed_out(watched.body))
            else:
                watched.look()
        self._ticking = bool(self._watched)
        if self._ticking:
            asyncio.get_running_loop().call_later(EVERY_S, self._tick)

    def _timed_out(self, body: Body) -> ServiceError:
        step = "answered" if body.complete else "received"
        return ServiceError(
            "timeout",
            f"not {step} within {self._timeout_s:g} s (RIDE_TIMEOUT_S); send less at once, or retry later",
        )


class _Watched:
    """A request under way, and why its task was cancelled, where we did so."""

    def __init__(self, body: Body) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.task = task
        self.body = body
        self.began = time.monotonic()
        self.reason: ServiceError | ClientGoneError | None = None
        self._listener: asyncio.Task[None] | None = None

    def stop(self, reason: ServiceError | ClientGoneError) -> None:
        """Cancel the task, once."""
        if self.reason is None:
            self.reason = reason
            self.task.cancel()

    def look(self) -> None:
        """From now on, notice when the client hangs up; while it is still sending, who reads its body does."""
        if self._listener is None and self.body.complete:
            self._listener = asyncio.ensure_future(self.body.client_gone())
            self._listener.add_done_callback(self._heard)

    def end(self) -> None:
        """Take no notice of anything any more."""
        if self._listener is not None:
            self._listener.remove_done_callback(self._heard)
            self._listener.cancel()

    def _heard(self, listener: "asyncio.Task[None]") -> None:
        if not listener.cancelled():
            self.stop(ClientGoneError())
