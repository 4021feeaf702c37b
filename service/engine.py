"""Runs a bundle's graphs. The only file that touches onnxruntime."""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from model_export.bundle import Bundle, BundleError, GraphSpec, TensorSpec, Variant
from service.cascade import Floats, Rows

RUNTIME_VERSION: Final = str(ort.__version__)
PROVIDERS: Final = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}
CUDA_OPTIONS: Final = {
    "cudnn_conv_algo_search": "HEURISTIC",  # the default measures anew for every batch size, tens of milliseconds each
    "arena_extend_strategy": "kSameAsRequested",
}
# Gather along the batch axis, opset 17, for features of any rank: `data`, `rows` -> `taken`. A test holds that these
# are the bytes that onnx.helper makes; the service itself has no need of the onnx package.
GATHER_GRAPHS: Final = {
    dtype: b'\x08\x08:b\n(\n\x04data\n\x04rows\x12\x05taken"\x06Gather*\x0b\n\x04axis\x18\x00\xa0\x01\x02\x12\x04take'
    b"Z\x0c\n\x04data\x12\x04\n\x02\x08" + code + b"Z\x13\n\x04rows\x12\x0b\n\t\x08\x07\x12\x05\n\x03\x12\x01N"
    b"b\r\n\x05taken\x12\x04\n\x02\x08" + code + b"B\x04\n\x00\x10\x11"
    for dtype, code in {"float32": b"\x01", "float16": b"\x0a"}.items()
}


class EngineError(RuntimeError):
    """The graphs cannot be run as asked for; says what is missing."""


class OnnxEngine:
    """
    One ONNX session per graph, all on one device.

    Features stay there between the graphs: they are bound as they are (I/O binding), on the CPU without a copy. Logits
    and router scores come to the host, because the cascade decides on them.

    Attributes:
        provider: "cpu" or "cuda", what really runs the graphs.
    """

    def __init__(self, bundle: Bundle, variant: Variant, *, provider: str, threads: int) -> None:
        """
        Raises:
            BundleError: where a graph's tensors are not those of the manifest.
            EngineError: where the provider does not work on this machine.
        """
        self.provider = provider
        self._threads = threads
        self._trunk = self._open(bundle, variant.trunk)
        self._experts = [self._open(bundle, graph) for graph in variant.experts]
        self._routers = [self._open(bundle, graph) for graph in variant.routers]
        self._take = self._session(GATHER_GRAPHS[variant.trunk.outputs[0].dtype])

    def trunk(self, images: NDArray[np.uint8]) -> ort.OrtValue:
        """(B, H, W, 3) to features, on the device."""
        (features,) = self._run(self._trunk, {"images": images}, {"features": self.provider})
        return features

    def expert(self, index: int, features: ort.OrtValue, logits_sum: Floats) -> tuple[Floats, ort.OrtValue]:
        """Features and (B, C) to the new (B, C), and the expert's feature, on the device."""
        new_logits_sum, expert_feature = self._run(
            self._experts[index],
            {"features": features, "logits_sum": logits_sum},
            {"new_logits_sum": "cpu", "expert_feature": self.provider},
        )
        return new_logits_sum.numpy(), expert_feature

    def router(self, index: int, expert_feature: ort.OrtValue, logits_sum: Floats) -> Floats:
        """The expert's feature and (B, C) to (B,)."""
        (score,) = self._run(
            self._routers[index], {"expert_feature": expert_feature, "logits_sum": logits_sum}, {"score": "cpu"}
        )
        scores: Floats = score.numpy()
        return scores

    def take(self, features: ort.OrtValue, rows: Rows) -> ort.OrtValue:
        """The features of these rows, on the device."""
        (taken,) = self._run(self._take, {"data": features, "rows": rows}, {"taken": self.provider})
        return taken

    @staticmethod
    def _run(
        session: ort.InferenceSession, inputs: Mapping[str, Any], outputs: Mapping[str, str]
    ) -> list[ort.OrtValue]:
        """Run a session; `outputs` says where each output is wanted, and gives their order."""
        binding = session.io_binding()
        for name, value in inputs.items():
            if isinstance(value, ort.OrtValue):
                binding.bind_ortvalue_input(name, value)
            else:
                binding.bind_cpu_input(name, value)
        for name, device in outputs.items():
            binding.bind_output(name, device)
        session.run_with_iobinding(binding)
        return list(binding.get_outputs())

    def _open(self, bundle: Bundle, graph: GraphSpec) -> ort.InferenceSession:
        """A session for a graph whose tensors are those that the manifest lists."""
        try:
            session = self._session(bundle.graph_path(graph).read_bytes())  # bytes: no graph may refer to other files
        except EngineError as error:
            raise EngineError(f"{graph.file}: {error}") from error
        for kind, found, listed in (
            ("input", session.get_inputs(), graph.inputs),
            ("output", session.get_outputs(), graph.outputs),
        ):
            _compare_tensors(graph.file, kind, found, listed)
        return session

    def _session(self, graph: bytes) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3  # errors
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # leaves the core to HTTP and decoding
        wanted: list[Any] = [(PROVIDERS["cuda"], CUDA_OPTIONS)] if self.provider == "cuda" else []
        try:
            session = ort.InferenceSession(graph, options, providers=[*wanted, PROVIDERS["cpu"]])
        except Exception as error:  # onnxruntime's exceptions share no class of their own
            raise EngineError(f"onnxruntime {RUNTIME_VERSION} cannot open it: {error}") from error
        if PROVIDERS[self.provider] not in session.get_providers():  # onnxruntime goes on without
            raise EngineError(
                f"onnxruntime {RUNTIME_VERSION} could not start {PROVIDERS[self.provider]}; are the NVIDIA driver, "
                "CUDA and cuDNN that it needs installed? RIDE_PROVIDER=cpu does without"
            )
        return session


def open_engine(bundle: Bundle, variant: Variant, *, provider: str, threads: int) -> OnnxEngine:
    """
    Open a variant's graphs with a provider; "auto" is CUDA where it works, else the CPU.

    Raises:
        BundleError, EngineError: as OnnxEngine.
    """
    if PROVIDERS["cuda"] not in ort.get_available_providers():
        if provider == "cuda":
            raise EngineError(
                f"RIDE_PROVIDER is cuda, this onnxruntime {RUNTIME_VERSION} was built without; install onnxruntime-gpu "
                "in place of onnxruntime, or set RIDE_PROVIDER=cpu"
            )
        return OnnxEngine(bundle, variant, provider="cpu", threads=threads)
    ort.preload_dlls()  # of the nvidia-* wheels, where they are installed
    try:
        return OnnxEngine(bundle, variant, provider="cpu" if provider == "cpu" else "cuda", threads=threads)
    except EngineError:
        if provider != "auto":
            raise
        return OnnxEngine(bundle, variant, provider="cpu", threads=threads)


def _compare_tensors(file: str, kind: str, found: list[Any], listed: tuple[TensorSpec, ...]) -> None:
    """Names, types and shapes of a session's tensors against the manifest's; an axis with a name there is free here."""
    types = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(uint8)": "uint8"}
    tensors = {
        tensor.name: (
            types.get(tensor.type, tensor.type),
            tuple(axis if isinstance(axis, int) else None for axis in tensor.shape),
        )
        for tensor in found
    }
    expected = {tensor.name: (tensor.dtype, tensor.shape) for tensor in listed}
    if tensors.keys() != expected.keys():
        raise BundleError(f"{file}: has {kind}s {sorted(tensors)}, manifest.json lists {sorted(expected)}")
    for name, (dtype, shape) in tensors.items():
        if (dtype, shape) != expected[name]:
            raise BundleError(
                f"{file}: {kind} {name!r} is {dtype} {_shape(shape)}, "
                f"manifest.json lists {expected[name][0]} {_shape(expected[name][1])}"
            )


def _shape(shape: tuple[int | None, ...]) -> str:
    return "[" + ", ".join("N" if axis is None else str(axis) for axis in shape) + "]"
