"""Runs a bundle's graphs with OpenVINO. The only file that touches it; it is installed where the operator wants it."""

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model_export.bundle import Bundle, GraphSpec
from service.engine import EngineError, GraphEngine

try:
    import openvino
except ImportError as error:
    raise EngineError(
        "RIDE_PROVIDER is openvino, which is not installed; install the extra openvino, as README.md says, or set "
        "RIDE_PROVIDER=cpu"
    ) from error


class OpenVinoEngine(GraphEngine):
    """
    One compiled model per graph, on the CPU.

    The graphs of the variant bf16 are those of fp32: OpenVINO computes in bf16 where it is told to. Everything else is
    computed in the precision of the graph.
    """

    def __init__(self, bundle: Bundle, variant: str, *, threads: int) -> None:
        """
        Raises:
            EngineError: where a graph cannot be compiled, or the processor lacks what the variant needs.
        """
        bf16 = bundle.manifest.variants[variant].precision == "bf16"
        if bf16 and "BF16" not in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise EngineError(
                f"variant {variant!r} needs a processor with bf16 units (AMX or AVX512_BF16); choose another"
            )
        self._options = {
            "INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32",
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,  # each worker would pin itself to the same core
        }
        super().__init__(bundle, variant, "openvino")

    def _open(self, bundle: Bundle, graph: GraphSpec) -> Any:
        content = bundle.read_graph(graph)  # bytes: no graph may refer to other files
        try:
            model = _core().read_model(content)
            return _core().compile_model(model, "CPU", self._options).create_infer_request()
        except Exception as error:  # OpenVINO's exceptions are plain RuntimeErrors
            raise EngineError(f"{graph.file}: OpenVINO {openvino.__version__} cannot compile it: {error}") from error

    def _run(self, graph: Any, inputs: dict[str, NDArray[Any]], outputs: list[str]) -> list[Any]:
        shared = {name: np.ascontiguousarray(value) for name, value in inputs.items()}  # kept until they were read
        for name, value in shared.items():
            graph.set_tensor(name, openvino.Tensor(value, shared_memory=True))
        graph.infer()
        return [np.array(graph.get_tensor(name).data) for name in outputs]  # copies: its next run writes there


@functools.cache
def _core() -> Any:
    """
    The one core of this process, never let go.

    Each core gives the thread another stack for signal handlers, unmaps it when it goes, and puts back the one before
    it. Let go in the order in which they came, two cores leave an unmapped stack behind, and the next signal that
    Python handles (SIGTERM) ends the process by SIGSEGV.
    """
    return openvino.Core()
