"""BentoML, with its adaptive batching; multipart, which is its way for files."""

import json
import os
from pathlib import Path
from typing import Any

import bentoml

from benchmarks.contestants.model import Model

SETTINGS = json.loads(os.environ["BENCHMARK_SETTINGS"])  # the `bentoml serve` that imports this has its own arguments


@bentoml.service(workers=SETTINGS["workers"], traffic={"timeout": 60, "max_concurrency": 1024})
class Classify:
    """JPEGs in, their top 5 out."""

    def __init__(self) -> None:
        self.model = Model(Path(SETTINGS["graph"]), SETTINGS["threads"])

    @bentoml.api(batchable=True, max_batch_size=SETTINGS["batch"], max_latency_ms=SETTINGS["wait_ms"])
    def classify(self, images: list[Path]) -> list[list[dict[str, Any]]]:
        """One list of predictions per image."""
        return self.model.classify([image.read_bytes() for image in images])
