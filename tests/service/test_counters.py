"""Cells that several processes share: nothing is lost between them, not even with one of them."""

import os
import signal

import pytest

from service.counters import OWN_CELLS, PID, Counters

CELL = OWN_CELLS + 3


def in_child(action):
    """Fork, do it, and return the status that the child ended with."""
    child = os.fork()
    if not child:
        action()
        os._exit(0)
    return os.waitpid(child, 0)[1]


def test_what_a_process_counts_all_others_see():
    """Each in its own row; a sum over them, and what each row says of its process."""
    counters = Counters(2, CELL + 1)
    pids = []
    for row in range(3):
        read, write = os.pipe()

        def count(row=row, write=write):
            counters.take(row)
            for _ in range(1000):
                counters.own[CELL] += row + 0.5
            os.write(write, b"%d" % os.getpid())

        assert in_child(count) == 0
        pids.append(int(os.read(read, 20)))
        os.close(read)
        os.close(write)

    assert counters.column(CELL) == [500, 1500, 2500]
    assert counters.sums()[CELL] == 4500
    assert counters.column(PID) == pids
    assert counters.workers == 2


def test_a_successor_goes_on_where_the_dead_process_stopped():
    """What was counted until kill -9 is not lost."""
    counters = Counters(1, CELL + 1)

    def count_and_die():
        counters.take(0)
        counters.own[CELL] += 7
        os.kill(os.getpid(), signal.SIGKILL)

    assert [in_child(count_and_die) for _ in range(3)] == [signal.SIGKILL] * 3
    assert counters.sums()[CELL] == 21


@pytest.mark.parametrize("cells", [1, 16, 17, 100])
def test_rows_do_not_touch(cells):
    """Filling one to its end leaves the others at 0, and they begin in cache lines of their own."""
    counters = Counters(3, cells)
    for cell in range(len(counters.row(1))):
        counters.row(1)[cell] = 1

    assert len(counters.row(1)) >= cells
    assert sum(counters.row(0)) == sum(counters.row(2)) == 0
    assert len(counters.row(0)) * 8 % 128 == 0
