"""The log: what becomes of lines that nobody reads."""

import json
import logging
import os
import threading
from types import SimpleNamespace

from service.logs import JsonFormatter, LossyHandler
from tests.service.conftest import PATIENCE_S

LONG = "€" * 5500  # five pages: in the end, the sixteen of a pipe have room for one more


def test_long_lines_that_nobody_reads_are_cut_or_lost_instead_of_waited_for():
    """A pipe that has room for a page gets no more than that; whole lines, once they come again, tell of all others."""
    read, write = os.pipe()
    os.set_blocking(read, False)
    logger = logging.Logger("test")
    with open(write, "w") as writer, open(read, "rb", buffering=0) as reader:
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

        received = reader.read(8000)  # two pages are free then, so that the next line is cut
        logger.warning(LONG)
        received += reader.readall()
        logger.warning(LONG)
        received += reader.readall()
        logger.warning("whole")
        after = json.loads(reader.readall())

    *lines, last, end = received.decode().split("\n")
    whole = [line for line in lines if line.endswith("}")]
    assert len(lines) == len(whole) + 2
    assert {json.loads(line)["event"] for line in (*whole, last)} == {LONG}
    assert json.loads(last)["lines_lost_before"] == 21 - len(whole)
    assert end == ""
    assert "lines_lost_before" not in after


def test_a_line_of_a_page_is_written_at_once():
    """Or lines of two workers would mix in the pipe that they share."""
    written = []
    handler = LossyHandler(SimpleNamespace(write=written.append, flush=lambda: None))
    handler.setFormatter(JsonFormatter())
    logger = logging.Logger("test")
    logger.addHandler(handler)
    for event in ("x" * 3900, "€" * 900):
        logger.warning(event)

    assert [json.loads(line)["event"] for line in written] == ["x" * 3900, "€" * 900]
