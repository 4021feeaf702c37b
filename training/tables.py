"""Tables, as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from training.files import write_atomically

MISSING = "–"
Cell = str | int | float | None


def number(value: float | None, digits: int = 2, spread: float | None = None) -> str:
    """A figure as the tables show it, with ± its spread where there is one; a dash where there is no figure."""
    if value is None:
        return MISSING
    return f"{value:.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table without a line feed after its last row."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def write_csv(file: Path, heads: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
    """The file has either its old content or all of the rows; None is an empty cell."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([heads, *rows])
    write_atomically(file, text.getvalue())
