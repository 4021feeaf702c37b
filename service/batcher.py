"""Collects what comes while the engine is busy and hands it over when the engine is free; knows nothing of the work."""

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from service.places import BatcherStoppedError, Item, Places, Result


class Work(Protocol[Item, Result]):
    """What is done with the items, a step at a time."""

    @property
    def busy(self) -> bool:
        """Whether items that were begun are not finished yet."""

    def wants(self, waiting: int) -> int:
        """How many of the `waiting` items the next step begins with; 0: it goes on with those that were begun."""

    def step(self, items: Sequence[Item]) -> list[tuple[Item, Result | Exception]]:
        """Begin with these, or go on without any; return those that are finished now, begun in this step or before."""


class Batcher(Places[Item, Result]):
    """
    A bounded queue with the work behind it.

    There is no timer: a lone item is begun at once, and whatever comes during a step may begin with the next.

    Steps run in the event loop, which between two of them serves whoever else is ready; or in a thread of their own,
    where a step takes so long that the loop cannot wait for it. Everything else is for the event loop's thread only.
    """

    def __init__(self, *, max_queue: int) -> None:
        """
        Args:
            max_queue: places.
        """
        super().__init__(max_queue)
        self._queue: deque[Item] = deque()
        self._futures: dict[Item, asyncio.Future[Result]] = {}
        self._seconds_per_item = 0.0
        self._seconds = 0.0  # worked since an item was finished
        self._due = False  # whether a step is about to begin, or runs in the thread
        self._thread: ThreadPoolExecutor | None = None
        self._in_thread: asyncio.Future[None] | None = None  # the step that runs there
        self._stopping = False

    @property
    def waiting(self) -> int:
        """Places that are taken."""
        return len(self._queue) + self._reserved

    @property
    def wait_s(self) -> float:
        """About how long an item that comes now would wait, by the time that others took lately."""
        return self.waiting * self._seconds_per_item

    def start(self, work: Work[Item, Result], *, threaded: bool) -> None:
        """
        Begin to work for the event loop that is running now.

        Raises:
            RuntimeError: where the system grants no thread; if only the first step met with that, none would ever end.
        """
        self._work = work
        self._loop = asyncio.get_running_loop()
        if threaded:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="ride-engine")
            self._thread.submit(lambda: None)  # which starts it

    async def stop(self) -> None:
        """End after the step that is running. What is not finished gets BatcherStoppedError."""
        self._stopping = True
        if self._in_thread is not None:
            await self._in_thread
        if self._thread is not None:
            self._thread.shutdown(wait=False)
        for future in self._futures.values():
            if not future.done():
                future.set_exception(BatcherStoppedError())

    def submit(self, item: Item) -> asyncio.Future[Result]:
        """Queue an item on a reserved place. Cancel the future, and the item is dropped if it has not begun."""
        future: asyncio.Future[Result] = self._loop.create_future()
        self._reserved -= 1
        self._queue.append(item)
        self._futures[item] = future
        self._schedule()
        return future

    def _schedule(self) -> None:
        """Have a step soon: after all that the event loop already has to do, which may bring more items."""
        if not self._due:
            self._due = True
            self._loop.call_soon(self._begin_step)

    def _begin_step(self) -> None:
        items = self._take()
        if self._stopping or not (items or self._work.busy):
            self._due = False
        elif self._thread is None:
            self._end_step(*self._step(items))
        else:
            self._in_thread = asyncio.ensure_future(self._step_in_thread(self._thread, items))

    def _take(self) -> list[Item]:
        """What the next step begins with. An item whose future is cancelled is dropped."""
        items: list[Item] = []
        wanted = self._work.wants(len(self._queue)) if self._queue else 0
        while self._queue and len(items) < wanted:
            item = self._queue.popleft()
            if self._futures[item].cancelled():  # its client hung up, or its time is over
                del self._futures[item]
            else:
                items.append(item)
        return items

    async def _step_in_thread(self, thread: ThreadPoolExecutor, items: list[Item]) -> None:
        self._end_step(*await self._loop.run_in_executor(thread, self._step, items))

    def _step(self, items: list[Item]) -> tuple[list[tuple[Item, Result | Exception]], float]:
        started = time.perf_counter()
        finished: list[tuple[Item, Result | Exception]]
        try:
            finished = self._work.step(items)
        except Exception as error:  # the work's own mistake; whoever comes next shall still be served
            finished = [(item, error) for item in items]
        return finished, time.perf_counter() - started

    def _end_step(self, finished: list[tuple[Item, Result | Exception]], seconds: float) -> None:
        self._due = False
        self._seconds += seconds
        if finished:
            self._seconds_per_item += 0.2 * (self._seconds / len(finished) - self._seconds_per_item)
            self._seconds = 0.0
        for item, result in finished:
            future = self._futures.pop(item, None)
            if future is None or future.done():
                continue
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)
        if self._queue or self._work.busy:
            self._schedule()
