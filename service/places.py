"""A bounded number of places for what is to be done, whoever does it: this process, or another one."""

import asyncio
import math
import time
from abc import ABC, abstractmethod
from typing import Final, Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_RETRY_S: Final = 30


class QueueFullError(Exception):
    """
    No places for so many items.

    Attributes:
        waiting: places taken.
        saved: places kept for an earlier, larger request.
        retry_after: seconds, whole, after which places should be free.
    """

    def __init__(self, waiting: int, saved: int, retry_after: int) -> None:
        super().__init__(f"{waiting} items are waiting, {saved} places are kept")
        self.waiting = waiting
        self.saved = saved
        self.retry_after = retry_after


class BatcherStoppedError(Exception):
    """The batcher ended before the item's turn came."""


class Places(ABC, Generic[Item, Result]):
    """
    Every item needs a place, which `reserve` takes, `submit` hands on, and the beginning of the item's work frees.

    Places are taken all at once or not at all. So that a refused request for many is not overtaken by small ones for
    ever, its places are saved up from then on, while anybody waits, until someone who asks for at least as many gets
    them or stays away. Half of all places at most: the others are never shut out.
    """

    def __init__(self, max_queue: int) -> None:
        """
        Args:
            max_queue: places.
        """
        self._max_queue = max_queue
        self._reserved = 0
        self._saved = 0  # places that are kept for the largest refused request
        self._saved_until = 0.0

    @property
    @abstractmethod
    def waiting(self) -> int:
        """Places that are taken."""

    @property
    @abstractmethod
    def wait_s(self) -> float:
        """About how long an item that comes now would wait, by the time that others took lately."""

    @abstractmethod
    def submit(self, item: Item) -> asyncio.Future[Result]:
        """Queue an item on a reserved place. Cancel the future, and the item is dropped if it has not begun."""

    @abstractmethod
    async def stop(self) -> None:
        """End. What is not finished gets BatcherStoppedError."""

    def check(self) -> None:
        """Raise QueueFullError if no place is free. Places that are saved count as free: they may be for the asker."""
        if self.waiting >= self._max_queue:
            raise QueueFullError(self.waiting, 0, self._retry_after())

    def reserve(self, count: int) -> None:
        """Take `count` places at once, or raise QueueFullError."""
        now = time.monotonic()
        saved = self._saved if count < self._saved and now < self._saved_until else 0
        if self.waiting + count + saved > self._max_queue:
            retry_after = self._retry_after()
            if not saved:
                self._saved, self._saved_until = min(count, self._max_queue // 2), now + retry_after + 1
            raise QueueFullError(self.waiting, saved, retry_after)
        if count >= self._saved:
            self._saved = 0
        self._reserved += count

    def release(self, count: int) -> None:
        """Give back places that were reserved and will not be used."""
        self._reserved -= count

    def _retry_after(self) -> int:
        return min(MAX_RETRY_S, max(1, math.ceil(self.wait_s)))
