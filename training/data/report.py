"""What is wrong with an image set: everything that was found, in one message."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from training.errors import TrainingError

MOST_SHOWN = 20

ERRORS = {
    "missing": "images are not there; restore them, or take them off the list",
    "unreadable": "images cannot be read; repair or remove them",
    "malformed": "entries are not an image and a label",
    "label out of range": "labels are outside the classes",
    "empty class": "classes have no images; add some, or renumber the labels without gaps",
    "file in two classes": "files are listed under two classes; keep one line of each",
    "nothing held out": "no images are left for the held-out set, with which thresholds are chosen",
    "file in two parts": "files are listed for training and for another part as well; figures on them would flatter",
}
WARNINGS = {
    "class with one image": "classes have one training image; nothing of them can be held out or tested",
    "image in two classes": "images are there under two classes, equal to the byte; one of the labels is wrong",
    "image in two parts": "images are there in two parts, equal to the byte; figures on them flatter",
    "image twice": "images are there twice in a class, equal to the byte; a share taken from it may hold the copy",
    "sorted": "sets lie sorted by class, their first images may be all of a kind; subset_order=shuffled draws from all",
    "class without such images": "classes have none in a part; the figures on that part leave them out",
    "not taken": "directories or lists are left out: they are for no part, hold no labelled image, or another is taken",
    "not taken for an image": "files are left out for what their names end in; rename them, if they are images",
}


class DataError(TrainingError, ValueError):
    """Images that cannot be found, read or split as asked."""


class UnreadableError(DataError):
    """Images that could be read before the training began; of several processes only the one that reads them knows."""


@dataclass
class Report:
    """
    Findings by kind. A training does not begin where there is one of `ERRORS`; `WARNINGS` are told and recorded.

    Files count as wrong where the lists contradict themselves. Equal bytes under two names only warn: published sets
    hold some, CIFAR-100 too.
    """

    findings: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, what: str) -> None:
        """One finding: which image or class, and what it is like."""
        if kind not in ERRORS | WARNINGS:
            raise KeyError(kind)
        self.findings.setdefault(kind, []).append(what)

    def add_all(self, kind: str, what: Iterable[str]) -> None:
        """Several of a kind."""
        for each in what:
            self.add(kind, each)

    def counts(self) -> dict[str, int]:
        """How often each kind was found, errors first."""
        return {kind: len(self.findings[kind]) for kind in (*ERRORS, *WARNINGS) if kind in self.findings}

    @property
    def has_errors(self) -> bool:
        """Whether a training could not begin."""
        return any(kind in self.findings for kind in ERRORS)

    def raise_errors(self, name: str) -> None:
        """
        Refuse a set with errors.

        Raises:
            DataError: with everything, warnings too, where there is an error.
        """
        if self.has_errors:
            raise DataError(f"{name}: not fit for training\n{self}")

    def __str__(self) -> str:
        """Errors, then warnings: how many of each kind, and the first twenty."""
        return "\n".join([*self._told("error", ERRORS), *self._told("warning", WARNINGS)]) or "nothing wrong was found"

    def _told(self, level: str, kinds: dict[str, str]) -> Iterator[str]:
        for kind, meaning in kinds.items():
            found = self.findings.get(kind, [])
            if found:
                yield f"{level}: {kind} ({len(found)}): {meaning}"
                yield from (f"  {what}" for what in found[:MOST_SHOWN])
                if len(found) > MOST_SHOWN:
                    yield f"  and {len(found) - MOST_SHOWN} more"
