"""One process at a time in a directory."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from training.errors import TrainingError


class ClaimedError(TrainingError):
    """Another process is at work in a directory."""


@contextlib.contextmanager
def claimed(directory: Path) -> Iterator[None]:
    """
    The directory is this process's. The kernel lets go of it when the process ends, however it ends; workers of one
    that was killed do not keep it.

    Raises:
        ClaimedError: where another process has it.
    """
    with (directory / "lock").open("w") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # which of them, is the system's choice
            raise ClaimedError(
                f"{directory}: another process is at work there; wait for it or take another --out"
            ) from None
        yield
