"""Where a run says how it goes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from training.distributed import rank
from training.files import write_atomically


@dataclass
class Log:
    """
    A line for each epoch in metrics.jsonl, and its numbers in TensorBoard.

    Epochs that the newest checkpoint does not hold are dropped at the start, from both: a resumed run makes them again.

    Attributes:
        board: None in other processes than the first, which alone writes.
    """

    file: Path
    board: SummaryWriter | None

    @classmethod
    def open(cls, run: Path, done: dict[str, int]) -> Log:
        """`done`: epochs that the checkpoints hold, by stage."""
        file = run / "metrics.jsonl"
        if rank():
            return cls(file, None)
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        kept = [line for line in lines if _is_done(line, done)]
        write_atomically(file, "".join(line + "\n" for line in kept))
        shutil.rmtree(run / "tensorboard", ignore_errors=True)
        log = cls(file, SummaryWriter(run / "tensorboard"))
        for line in kept:
            log._show(json.loads(line))
        return log

    def write(self, values: dict[str, Any]) -> None:
        """One epoch: {"stage", "epoch" (from 1), numbers, nested numbers}."""
        if self.board is None:
            return
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
        self._show(values)

    def _show(self, values: dict[str, Any]) -> None:
        assert self.board is not None
        for name, number in _numbers(values):
            self.board.add_scalar(f"{values['stage']}/{name}", number, values["epoch"])
        self.board.flush()

    def close(self) -> None:
        """Nothing is written any more."""
        if self.board is not None:
            self.board.close()


def _is_done(line: str, done: dict[str, int]) -> bool:
    try:
        values = json.loads(line)
    except json.JSONDecodeError:  # the line that a kill cut short
        return False
    return values["epoch"] <= done.get(values["stage"], 0)


def _numbers(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "epoch":
            yield prefix + name, value
