"""Runs a bundle's graphs with OpenVINO. The only file that touches it; it is installed where the operator wants it."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model_export.bundle import Bundle, GraphSpec
from service.cascade import Floats, Rows
from service.engine import EngineError

try:
    import openvino
except ImportError as error:
    raise EngineError(
        "RIDE_PROVIDER is openvino, which is not installed; pip install 'ride-serving[openvino]', or set "
        "RIDE_PROVIDER=cpu"
    ) from error


class OpenVinoEngine:
    """
    One compiled model per graph, on the CPU.

    The graphs of the variant bf16 are those of fp32: OpenVINO computes in bf16 where it is told to. Everything else is
    computed in the precision of the graph.

    Attributes:
        provider: "openvino".
        variant: the name of the variant that is run.
    """

    def __init__(self, bundle: Bundle, variant: str, *, threads: int) -> None:
        """
        Raises:
            EngineError: where a graph cannot be compiled, or the processor lacks what the variant needs.
        """
        graphs = bundle.manifest.variants[variant]
        core = _core()
        if graphs.precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise EngineError(
                f"variant {variant!r} needs a processor with bf16 units (AMX or AVX512_BF16); choose another"
            )
        self.provider = "openvino"
        self.variant = variant
        self._options = {
            "INFERENCE_PRECISION_HINT": "bf16" if graphs.precision == "bf16" else "f32",
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,  # each worker would pin itself to the same core
        }
        self._trunk = self._open(core, bundle, graphs.trunk)
        self._experts = [self._open(core, bundle, graph) for graph in graphs.experts]
        self._routers = [self._open(core, bundle, graph) for graph in graphs.routers]

    def trunk(self, images: NDArray[np.uint8]) -> Any:
        """(B, H, W, 3) to features."""
        return _run(self._trunk, {"images": images}, ["features"])[0]

    def expert(self, index: int, features: Any, logits_sum: Floats) -> tuple[Floats, Any]:
        """Features and (B, C) to the new (B, C), and the expert's feature."""
        given = {"features": features, "logits_sum": logits_sum}
        new_logits_sum, expert_feature = _run(self._experts[index], given, ["new_logits_sum", "expert_feature"])
        return new_logits_sum, expert_feature

    def router(self, index: int, expert_feature: Any, logits_sum: Floats) -> Floats:
        """The expert's feature and (B, C) to (B,)."""
        given = {"expert_feature": expert_feature, "logits_sum": logits_sum}
        scores: Floats = _run(self._routers[index], given, ["score"])[0]
        return scores

    def take(self, features: Any, rows: Rows) -> Any:
        """The features of these rows."""
        return features[rows]

    def join(self, features: Sequence[Any]) -> Any:
        """The features of several batches, one after the other."""
        return np.concatenate(features)

    def _open(self, core: Any, bundle: Bundle, graph: GraphSpec) -> Any:
        content = bundle.read_graph(graph)  # bytes: no graph may refer to other files
        try:
            model = core.read_model(content)
            return core.compile_model(model, "CPU", self._options).create_infer_request()
        except Exception as error:  # OpenVINO's exceptions are plain RuntimeErrors
            raise EngineError(f"{graph.file}: OpenVINO {openvino.__version__} cannot compile it: {error}") from error


@functools.cache
def _core() -> Any:
    """
    The one core of this process, never let go.

    Each core gives the thread another stack for signal handlers, unmaps it when it goes, and puts back the one before
    it. Let go in the order in which they came, two cores leave an unmapped stack behind, and the next signal that
    Python handles (SIGTERM) ends the process by SIGSEGV.
    """
    return openvino.Core()


def _run(request: Any, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> list[Any]:
    """Outputs are copies: the request's own memory is overwritten by its next run."""
    shared = {name: np.ascontiguousarray(value) for name, value in inputs.items()}  # kept until they were read
    for name, value in shared.items():
        request.set_tensor(name, openvino.Tensor(value, shared_memory=True))
    request.infer()
    return [np.array(request.get_tensor(name).data) for name in outputs]
