"""What every contestant does with its JPEGs, in its own environment; how they get here and back is each one's own."""

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.runtimes import open_session
from model_export.bundle import InputSpec
from service.images import decode

MAX_PIXELS: Final = 10**7
TOP_K: Final = 5


def options() -> argparse.Namespace:
    """A contestant's command line. Settings that a server has no use for, it ignores."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--graph", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--wait-ms", type=float, default=0.0)
    return parser.parse_args()


class Model:
    """A merged graph and, in front of it, the decoder of our service, which decodes large images scaled."""

    def __init__(self, graph: Path, threads: int) -> None:
        self._session = open_session(graph, threads)
        metadata = self._session.get_modelmeta().custom_metadata_map
        self.classes: list[str] = json.loads(metadata["classes"])
        spec = InputSpec(**json.loads(metadata["input"]))
        self.decode = partial(decode, spec=spec, max_pixels=MAX_PIXELS, scaled=True)
        self._decoders = ThreadPoolExecutor(threads) if threads > 1 else None

    def classify(self, jpegs: list[bytes]) -> list[list[dict[str, Any]]]:
        """The most probable classes of each JPEG, as JSON would have them."""
        pixels = self._decoders.map(self.decode, jpegs) if self._decoders else map(self.decode, jpegs)
        (probabilities,) = self._session.run(None, {"images": np.stack(list(pixels))})
        best = np.argsort(-probabilities, axis=1)[:, :TOP_K]
        return [
            [{"label": self.classes[index], "probability": value} for index, value in zip(indices, values, strict=True)]
            for indices, values in zip(
                best.tolist(), np.take_along_axis(probabilities, best, axis=1).tolist(), strict=True
            )
        ]


def open_model(arguments: argparse.Namespace) -> Model:
    """The model that the command line asks for."""
    return Model(arguments.graph, arguments.threads)
