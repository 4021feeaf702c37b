"""Notices an engine that will not recover by itself: only another process gets another GPU context."""

import logging
import os
import time
from typing import Final

from service.cascade import Cascade
from service.logs import log

MOST_FAILURES: Final = 20  # steps in a row
LONGEST_STEP_S: Final = 60.0
PAUSE_S: Final = 2.0  # longer between two looks: this process was paused, and the step with it


class EngineWatch:
    """Looks at an engine from time to time, from another thread than the one that may hang in it."""

    def __init__(self, cascade: Cascade, longest_step_s: float = LONGEST_STEP_S) -> None:
        """
        Args:
            longest_step_s: seconds that a step may take.
        """
        self._cascade = cascade
        self._longest_step_s = longest_step_s
        self._step: float | None = None  # the one that ran at the last look
        self._seconds = 0.0  # for which it has been seen to run
        self._looked = time.monotonic()

    def trouble(self) -> str | None:
        """What is wrong for good; None where nothing is. To be asked every second or more often."""
        now, began = time.monotonic(), self._cascade.step_began
        passed = min(now - self._looked, PAUSE_S)
        self._looked = now
        self._seconds = self._seconds + passed if began is not None and began == self._step else 0.0
        self._step = began
        if self._cascade.failures >= MOST_FAILURES:
            return f"the engine failed {self._cascade.failures} times in a row"
        if self._seconds > self._longest_step_s:
            return f"a step of the engine has not ended for {self._seconds:.0f} s"
        return None


def end_if_broken(watch: EngineWatch | None) -> None:
    """End this process, whatever it is doing, where its engine is broken for good; whoever watches over it goes on."""
    reason = watch.trouble() if watch is not None else None
    if reason is not None:
        log(logging.CRITICAL, "engine_broken", reason=f"{reason}; only another process may do better, this one ends")
        logging.shutdown()
        os._exit(1)
