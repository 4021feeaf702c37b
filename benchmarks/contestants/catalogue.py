"""The contestants: how each is started, asked and understood, and the settings that are worth trying."""

import base64
import json
import os
import struct
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from benchmarks.messages import Target, multipart_requests, post, raw_requests
from service.cores import available_cores

FOLDER: Final = Path(__file__).parent
VENVS: Final = FOLDER.parent / ".venvs"
CORES: Final = available_cores()


@dataclass(frozen=True)
class Setting:
    """
    How a contestant is run.

    Attributes:
        workers: processes (PyTriton: threads) that run the graph.
        threads: of the graph, and of decoding, in each.
        batch, wait_ms: images in a batch at most, and how long it may wait to fill.
    """

    workers: int
    threads: int
    batch: int = 1
    wait_ms: float = 0.0

    def __str__(self) -> str:
        batching = f", batches of {self.batch} within {self.wait_ms:g} ms" if self.batch > 1 else ""
        return f"{self.workers} x {self.threads} threads{batching}"


@dataclass(frozen=True)
class Contestant:
    """
    A server that is not ours.

    Attributes:
        path, requests, labels: where it is asked, how JPEGs become requests, and the labels in a body, best first.
        settings: that are tried; the one with the highest throughput stays. The first was the best on two cores.
    """

    name: str
    title: str
    path: str
    requests: Callable[[Target, Sequence[bytes]], list[bytes]]
    labels: Callable[[bytes], list[str]]
    settings: tuple[Setting, ...]

    @property
    def folder(self) -> Path:
        """Its server and its requirements."""
        return FOLDER / self.name

    @property
    def python(self) -> Path:
        """The interpreter of its own environment."""
        return VENVS / self.name / "bin" / "python"

    def command(self, setting: Setting, graph: Path, port: int) -> list[str]:
        """What starts it."""
        if self.name == "bentoml":
            service = "benchmarks.contestants.bentoml.server:Classify"
            return [str(self.python), "-m", "bentoml", "serve", service, "--host", "127.0.0.1", "--port", str(port)]
        return [
            str(self.python), "-m", f"benchmarks.contestants.{self.name}.server", "--graph", str(graph),
            "--port", str(port),
            "--workers", str(setting.workers), "--threads", str(setting.threads), "--batch", str(setting.batch),
            "--wait-ms", str(setting.wait_ms),
        ]  # fmt: skip

    def environment(self, setting: Setting, graph: Path) -> dict[str, str]:
        """Its environment variables: no thread pools besides the graph's, no telemetry, and where libpython is."""
        settings = asdict(setting) | {"graph": str(graph)}
        return {
            "BENCHMARK_SETTINGS": json.dumps(settings),
            "OMP_NUM_THREADS": "1",
            "BENTOML_DO_NOT_TRACK": "True",
            "PATH": f"{self.python.parent}:{os.environ['PATH']}",
            "LD_LIBRARY_PATH": sysconfig.get_config_var("LIBDIR"),  # Triton would take another Python's library
        }


def _base64_tensor(target: Target, images: Sequence[bytes]) -> list[bytes]:
    """MLServer's way: the V2 protocol in JSON."""
    return [
        post(
            target,
            json.dumps({"inputs": [{
                "name": "image", "datatype": "BYTES", "shape": [1], "parameters": {"content_type": "base64"},
                "data": [base64.b64encode(image).decode()],
            }]}).encode(),
            {"Content-Type": "application/json"},
        )
        for image in images
    ]  # fmt: skip


def _binary_tensor(target: Target, images: Sequence[bytes]) -> list[bytes]:
    """Triton's way: the V2 protocol with the bytes behind the JSON, and an answer in JSON."""
    requests = []
    for image in images:
        content = struct.pack("<I", len(image)) + image
        head = json.dumps({
            "inputs": [{
                "name": "image", "datatype": "BYTES", "shape": [1, 1],
                "parameters": {"binary_data_size": len(content)},
            }],
        }).encode()  # fmt: skip
        headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(head))}
        requests.append(post(target, head + content, headers))
    return requests


def _named(predictions: Sequence[dict[str, Any]]) -> list[str]:
    return [prediction["label"] for prediction in predictions]


def _triton_labels(body: bytes) -> list[str]:
    labels: list[str] = next(output["data"] for output in json.loads(body)["outputs"] if output["name"] == "label")
    return labels


CONTESTANTS: Final = (
    Contestant(
        "fastapi_plain", "FastAPI and a thread pool", "/classify", raw_requests,
        lambda body: _named(json.loads(body)["predictions"]),
        (Setting(CORES, 1), Setting(1, CORES), Setting(1, 1)),
    ),
    Contestant(
        "pytriton", "PyTriton (Triton's core)", "/v2/models/classify/infer", _binary_tensor, _triton_labels,
        (Setting(CORES, 1, 32, 2), Setting(CORES, 1, 16), Setting(CORES, 1, 8), Setting(1, CORES, 32),
         Setting(1, CORES, 32, 2)),
    ),
    Contestant(
        "mlserver", "MLServer", "/v2/models/classify/infer", _base64_tensor,
        lambda body: _named(json.loads(json.loads(body)["outputs"][0]["data"][0])),
        (Setting(1, CORES, 64, 5), Setting(1, CORES, 32, 2), Setting(1, CORES), Setting(CORES, 1, 32, 2),
         Setting(1, 1, 32, 2)),
    ),
    Contestant(
        "litserve", "LitServe", "/classify", raw_requests,
        lambda body: _named(json.loads(body)["predictions"]),
        (Setting(CORES, 1, 16, 1), Setting(CORES, 1, 32, 2), Setting(CORES, 1), Setting(1, CORES, 32, 2),
         Setting(1, 1, 32, 2)),
    ),
    Contestant(
        "bentoml", "BentoML", "/classify", partial(multipart_requests, field="images"),  # its method's argument
        lambda body: _named(json.loads(body)[0]),
        (Setting(CORES, 1, 32, 1000), Setting(CORES, 1, 32, 100), Setting(1, CORES, 32, 1000),
         Setting(1, 1, 32, 1000)),
    ),
)  # fmt: skip
