"""The log: what becomes of lines that nobody reads."""

import json
import logging
import os
import threading

from service.logs import JsonFormatter, LossyHandler
from tests.service.conftest import PATIENCE_S

LONG = "€" * 5500  # five pages: in the end, the sixteen of a pipe have room for one more


def test_long_lines_that_nobody_reads_are_cut_or_lost_instead_of_waited_for():
    """A pipe that has room for a page gets no more than that; once it is read, whole lines come again."""
    read, write = os.pipe()
    os.set_blocking(read, False)
    logger = logging.Logger("test")
    with open(write, "w") as writer, open(read) as reader:
        handler = LossyHandler(writer)
        handler.setFormatter(JsonFormatter())
        logger.addHandler(handler)

        def log_much() -> None:
            for _ in range(20):  # five times what a pipe holds
                logger.warning(LONG)

        logging_thread = threading.Thread(target=log_much, daemon=True)
        logging_thread.start()
        logging_thread.join(PATIENCE_S)
        assert not logging_thread.is_alive()

        *whole, cut = reader.read().split("\n")
        logger.warning(LONG)
        end_of_cut, last, end = reader.read().split("\n")

    assert 0 < len(whole) < 20
    assert {json.loads(line)["event"] for line in (*whole, last)} == {LONG}
    assert json.loads(last)["lines_lost_before"] == 20 - len(whole)
    assert (cut[:9], end_of_cut, end) == (whole[0][:9], "", "")
