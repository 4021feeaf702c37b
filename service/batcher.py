"""Collects work while the engine is busy, hands over all that waits when it falls idle, knows nothing of the work."""

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_RETRY_S = 30


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


class Batcher(Generic[Item, Result]):
    """
    A bounded queue with one thread behind it.

    There is no timer: a lone item is run at once, and whatever comes while it runs makes up the next batch. Every item
    needs a place, which `reserve` takes, `submit` hands on to the queue, and closing the item's batch frees.

    Places are taken all at once or not at all. So that a refused request for many is not overtaken by small ones for
    ever, its places are saved up from then on, until someone who asks for at least as many gets them or stays away.
    """

    def __init__(
        self, run: Callable[[Sequence[Item]], Sequence[Result | Exception]], *, max_batch: int, max_queue: int
    ) -> None:
        """
        Args:
            run: answers a batch, in order, with a result or an exception for each item; what it raises, all items get.
            max_batch: items in a batch.
            max_queue: places.
        """
        self._run = run
        self._max_batch = max_batch
        self._max_queue = max_queue
        self._queue: deque[tuple[Item, asyncio.Future[Result]]] = deque()
        self._changed = threading.Condition()
        self._reserved = 0
        self._saved = 0
        self._saved_until = 0.0
        self._seconds_per_item = 0.0
        self._stopping = False
        self._thread: threading.Thread | None = None

    @property
    def waiting(self) -> int:
        """Places taken: items in the queue, and those on their way to it."""
        return self._reserved + len(self._queue)

    def start(self) -> None:
        """Start the thread; answers go to the event loop that is running now."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._work, name="ride-engine", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        """End after the batch that is running. What still waits gets BatcherStoppedError."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
        while self._queue:
            _, future = self._queue.popleft()
            if not future.done():
                future.set_exception(BatcherStoppedError())

    def check(self) -> None:
        """Raise QueueFullError if no place is free. Places that are saved count as free: they may be for the asker."""
        with self._changed:
            if self.waiting >= self._max_queue:
                raise QueueFullError(self.waiting, 0, self._retry_after())

    def reserve(self, count: int) -> None:
        """Take `count` places at once, or raise QueueFullError."""
        with self._changed:
            now = time.monotonic()
            saved = self._saved if count < self._saved and now < self._saved_until else 0
            if self.waiting + count + saved > self._max_queue:
                retry_after = self._retry_after()
                if not saved:
                    self._saved, self._saved_until = count, now + retry_after + 1
                raise QueueFullError(self.waiting, saved, retry_after)
            if count >= self._saved:
                self._saved = 0
            self._reserved += count

    def release(self, count: int) -> None:
        """Give back places that were reserved and will not be used."""
        with self._changed:
            self._reserved -= count

    def submit(self, item: Item) -> "asyncio.Future[Result]":
        """Queue an item on a reserved place. Cancel the future, and the item is dropped if its batch has not begun."""
        future: asyncio.Future[Result] = self._loop.create_future()
        with self._changed:
            self._reserved -= 1
            self._queue.append((item, future))
            self._changed.notify()
        return future

    def _retry_after(self) -> int:
        return min(MAX_RETRY_S, max(1, math.ceil(self.waiting * self._seconds_per_item)))

    def _work(self) -> None:
        """In the thread, until stopped: take what waits, answer it."""
        while batch := self._take():
            started = time.perf_counter()
            results: Sequence[Result | Exception]
            try:
                results = self._run([item for item, _ in batch])
            except Exception as error:
                results = [error] * len(batch)
            seconds = (time.perf_counter() - started) / len(batch)
            self._seconds_per_item += 0.2 * (seconds - self._seconds_per_item)
            self._loop.call_soon_threadsafe(_deliver, [future for _, future in batch], results)

    def _take(self) -> list[tuple[Item, "asyncio.Future[Result]"]]:
        """The next batch, at least one item; empty when stopped."""
        with self._changed:
            while not self._stopping:
                batch: list[tuple[Item, asyncio.Future[Result]]] = []
                while self._queue and len(batch) < self._max_batch:
                    item, future = self._queue.popleft()
                    if not future.cancelled():  # its client hung up, or its time is over
                        batch.append((item, future))
                if batch:
                    return batch
                self._changed.wait()
        return []


def _deliver(futures: "Sequence[asyncio.Future[Result]]", results: Sequence[Result | Exception]) -> None:
    for future, result in zip(futures, results, strict=True):
        if future.done():
            continue
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)
