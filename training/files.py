"""Files that a kill at any moment leaves whole: on the disk before they get their name."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(file: Path, text: str) -> None:
    r"""The file has either its old content or all of `text`; what is not UTF-8 in a file's name becomes \udcXX."""
    partial = file.with_name(file.name + ".partial")
    with partial.open("w", encoding="utf-8", errors="backslashreplace") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(file)


def flush(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
