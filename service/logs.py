"""Logging: one JSON object per line, on stderr."""

import datetime
import json
import logging
import select
import sys
import warnings
from typing import Any, Final, TextIO

import orjson

LOGGER = logging.getLogger("ride")
COMMON: dict[str, Any] = {}  # fields of every line that this process writes
PATIENCE_MS: Final = 10  # for whoever reads the log
PAGE: Final = 4096  # bytes: what a pipe takes whole, if at all


class JsonFormatter(logging.Formatter):
    """Formats a record as one line of JSON; the fields given to `log` stand beside time, level and event."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line = {
            "time": time.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **COMMON,
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        try:
            return orjson.dumps(line, default=str).decode()
        except TypeError:  # half a surrogate pair, or an integer beyond 64 bits
            return json.dumps(line, default=str)


class LossyHandler(logging.StreamHandler[TextIO]):
    """
    Writes lines, and loses those that find no room: whoever waited for that would serve nobody, and hear no signal.

    The next line that is written says how many were lost before it. A long one, such as a stack trace, may be cut.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._lost = 0
        self._cut = False  # whether the last line lacks its end
        self._room: select.poll | None = select.poll()
        try:
            self._room.register(stream, select.POLLOUT)
        except (OSError, TypeError):  # a test's, or none at all: stderr was closed
            self._room = None

    def emit(self, record: logging.LogRecord) -> None:
        """Write the line, or count it."""
        if not self._has_room():
            self._lost += 1
            return
        lost, self._lost = self._lost, 0
        if lost:
            record.fields = {**getattr(record, "fields", {}), "lines_lost_before": lost}
        try:
            line = self.format(record) + self.terminator
            if self._cut:
                line, self._cut = self.terminator + line, False
            piece = PAGE if line.isascii() else PAGE // 4  # characters, of four bytes at most
            for start in range(0, len(line), piece):
                if start and not self._has_room():
                    self._lost, self._cut = lost + 1, True  # what this line was to say has to be said again
                    return
                self.stream.write(line[start : start + piece])
                self.flush()
        except Exception:  # as StreamHandler: whoever logs shall not fail because a disk is full
            self.handleError(record)

    def _has_room(self) -> bool:
        """For one piece, at least: a pipe says that it has room while a page is free."""
        return self._room is None or bool(self._room.poll(0 if self._lost else PATIENCE_MS))


def set_up(level: str) -> None:
    """Send every logger's lines to stderr as JSON; uvicorn's only from warnings on."""
    handler = LossyHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
    warnings.filterwarnings("ignore", module=r"PIL\.")  # of what is odd in an image: thousands of lines, if it wishes
    logging.getLogger("uvicorn").setLevel(max(logging.WARNING, LOGGER.getEffectiveLevel()))
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # warns of what we refuse, without a request id


def set_worker(name: int | str) -> None:
    """Say in every line from now on which worker wrote it."""
    COMMON["worker"] = name


def log(level: int, event: str, *, error: BaseException | None = None, **fields: Any) -> None:
    """Log an event; `error` adds its stack trace, which stays on this side."""
    LOGGER.log(level, event, extra={"fields": fields}, exc_info=error)
