"""Figures in memory that the processes of one service share: a row for each of them, added to without a lock."""

import mmap
import os
from typing import Final, TypeAlias

import numpy as np

# The first cells of a row tell of its process; what the others mean is the business of metrics.py.
PID: Final = 0  # 0 while the process is not there
READY: Final = 1  # 1 while it takes work
WAS_READY: Final = 2  # 1 from the first time on, whatever became of that process
WAITING: Final = 3  # images that wait
RESTARTS: Final = 4
DEAD_CPU_S: Final = 5  # processor seconds of those that had this row before
BEAT: Final = 6  # time.monotonic() when its event loop last turned
OWN_CELLS: Final = 7

CELL_BYTES: Final = 8
ALIGNED_CELLS: Final = 16  # two cache lines: no two processes write into the same one, or into neighbours
Row: TypeAlias = "memoryview[float]"


class Counters:
    """
    Float64 cells in anonymous shared memory, which a fork hands on.

    Make them before the fork; then each process calls `take` and adds to its `own` row. Nothing is locked: one process
    writes into a row, and one thread of it into a cell, since `row[cell] += 1` is a read and a write, between which
    another thread's addition would be lost. Who takes a dead process's row goes on where that one stopped, so a sum
    over all rows never falls.

    Attributes:
        workers: how many of the rows, the first ones, belong to workers.
        engine: the row of the process that they share for the graphs; None where each runs its own.
        supervisor: the last row.
        own: this process's row, a view of float64.
    """

    def __init__(self, workers: int, cells: int, *, shared_engine: bool = False) -> None:
        """
        Args:
            cells: of a row, OWN_CELLS included.
        """
        self.workers = workers
        self.engine = workers if shared_engine else None
        self.supervisor = workers + shared_engine
        rows = self.supervisor + 1
        self._stride = -(-cells // ALIGNED_CELLS) * ALIGNED_CELLS
        memory = mmap.mmap(-1, rows * self._stride * CELL_BYTES)
        self._cells: Row = memoryview(memory).cast("d")
        self._table = np.frombuffer(memory, np.float64).reshape(rows, self._stride)
        self.own = self.row(0)

    def take(self, row: int) -> None:
        """Let this process write into `row` from now on."""
        self.own = self.row(row)
        self.own[PID] = os.getpid()

    def row(self, row: int) -> Row:
        """A row, to write into."""
        return self._cells[row * self._stride : (row + 1) * self._stride]

    def column(self, cell: int) -> list[float]:
        """What a cell holds in each row."""
        return list(self._table[:, cell].tolist())

    def sums(self) -> list[float]:
        """Each cell, summed over the rows."""
        return list(self._table.sum(axis=0).tolist())
