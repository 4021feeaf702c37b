"""This service under test: started as ride-serve would be, found by its log."""

import json
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.messages import Target
from benchmarks.processes import Server


@dataclass(frozen=True)
class Running:
    """
    A ride-serve that is ready.

    Attributes:
        start_s: from the start of the process to the first 200 of /readyz.
        variant, provider: what it says that it runs.
    """

    server: Server
    url: str
    start_s: float
    variant: str
    provider: str

    def target(self, query: str = "") -> Target:
        """Where it classifies."""
        return Target.parse(f"{self.url}/classify{query}")


@contextmanager
def ride_serve(bundle: Path, options: Sequence[str] = ()) -> Iterator[Running]:
    """ride-serve, at a free port; stopped when the block is left."""
    command = [sys.executable, "-m", "service", "--bundle", str(bundle), "--port", "0", *options]
    with Server(command, {}) as server:
        listening, _ = server.wait_until(lambda: _logged(server, "listening"))
        _, start_s = server.wait_until(lambda: _answers(f"{listening['url']}/readyz"))
        with urllib.request.urlopen(f"{listening['url']}/model", timeout=5) as answer:
            model = json.load(answer)
        yield Running(server, listening["url"], start_s, model["variant"], model["provider"])


def our_labels(body: bytes) -> list[str]:
    """Those of the only image in an answer, best first."""
    (result,) = json.loads(body)["results"]
    return [prediction["label"] for prediction in result["predictions"]]


def _logged(server: Server, event: str) -> dict[str, Any] | None:
    """The first log line of this event; half a line is not read yet."""
    for line in server.log().splitlines(keepends=True):
        if f'"event":"{event}"' in line and line.endswith("\n"):
            found: dict[str, Any] = json.loads(line)
            return found
    return None


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
