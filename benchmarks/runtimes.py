"""One graph, opened as the service opens it, as a plain function of arrays."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from model_export.openvino_core import openvino_core

Graph: TypeAlias = Callable[[Mapping[str, NDArray[Any]]], list[NDArray[Any]]]
PROVIDERS: Final = ("cpu", "openvino", "cuda")


def open_graph(path: Path, provider: str, precision: str, threads: int) -> Graph:
    """
    Inputs by name to outputs in the graph's order, with so many threads that do not spin.

    Args:
        provider: one of PROVIDERS.
        precision: of the variant; bf16 has the files of fp32, and OpenVINO rounds.
    """
    if provider == "openvino":
        return _openvino(path, precision, threads)
    session = open_session(path, threads, provider)
    return lambda inputs: session.run(None, inputs)


def open_session(path: Path, threads: int, provider: str = "cpu") -> ort.InferenceSession:
    """
    A session of onnxruntime, with so many threads that do not spin.

    Args:
        provider: "cpu" or "cuda"; with the latter, too, inputs and outputs lie on the host.

    Raises:
        RuntimeError: where CUDA does not work.
    """
    wanted = ["CPUExecutionProvider"]
    if provider == "cuda":
        ort.preload_dlls()
        wanted = ["CUDAExecutionProvider", *wanted]
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(path, options, providers=wanted)
    if session.get_providers()[0] != wanted[0]:
        raise RuntimeError(f"onnxruntime could not start {wanted[0]}; ride-profile --provider {provider} says why")
    return session


def _openvino(path: Path, precision: str, threads: int) -> Graph:
    options = {
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,  # each process would pin itself to the same core
    }
    model = openvino_core().compile_model(path, "CPU", options)
    request = model.create_infer_request()

    def run(inputs: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        results = request.infer(dict(inputs))
        return [np.array(results[output]) for output in model.outputs]

    return run
