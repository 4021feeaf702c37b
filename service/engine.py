"""Runs a bundle's graphs with onnxruntime, and chooses provider and variant. The only file that touches onnxruntime."""

import contextlib
import hashlib
import io
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from model_export.bundle import Bundle, BundleError, GraphSpec, Manifest, Precision, TensorSpec
from service.cascade import Floats, Rows
from service.logs import log
from service.settings import GPU_PROVIDERS

RUNTIME_VERSION: Final = str(ort.__version__)
PROVIDERS: Final = {
    "tensorrt": "TensorrtExecutionProvider", "cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider",
}  # fmt: skip
# What each provider is fastest at, best first, among the variants that lose next to nothing.
PREFERRED: Final[Mapping[str, tuple[Precision, ...]]] = {
    "cpu": ("int8", "fp32"), "openvino": ("int8", "bf16", "fp32"), "cuda": ("fp16", "fp32"),
    "tensorrt": ("fp16", "fp32"),
}  # fmt: skip
INT8_FLAGS: Final = {"avx512_vnni", "avx_vnni", "asimddp"}  # x86 and ARM; without, int8 gains less than a fifth
BF16_FLAGS: Final = {"amx_bf16", "avx512_bf16", "bf16"}
TENSORRT_CACHE: Final = Path("~/.cache/ride-serving/tensorrt")
CUDA_OPTIONS: Final = {
    "cudnn_conv_algo_search": "HEURISTIC",  # the default searches longer, and again for every batch size
    "arena_extend_strategy": "kSameAsRequested",
    "use_tf32": "0",  # fp32 is to be what it says
}
ELEMENT_TYPES: Final = {"float32": 1, "float16": 10}  # as ONNX numbers them
# Gather along the batch axis, opset 17, for features of any rank: `data`, `rows` -> `taken`. A test holds that these
# are the bytes that onnx.helper makes; the service itself has no need of the onnx package.
GATHER_GRAPHS: Final = {
    dtype: b'\x08\x08:b\n(\n\x04data\n\x04rows\x12\x05taken"\x06Gather*\x0b\n\x04axis\x18\x00\xa0\x01\x02'
    b"\x12\x04takeZ\x0c\n\x04data\x12\x04\n\x02\x08%cZ\x13\n\x04rows\x12\x0b\n\t\x08\x07\x12\x05\n\x03\x12\x01N"
    b"b\r\n\x05taken\x12\x04\n\x02\x08%cB\x04\n\x00\x10\x11" % (code, code)
    for dtype, code in ELEMENT_TYPES.items()
}
# Two tensors along the batch axis: `first`, `second` -> `joined`.
CONCAT_GRAPHS: Final = {
    dtype: b'\x08\x08:c\n,\n\x05first\n\x06second\x12\x06joined"\x06Concat*\x0b\n\x04axis\x18\x00\xa0\x01\x02'
    b"\x12\x04joinZ\r\n\x05first\x12\x04\n\x02\x08%cZ\x0e\n\x06second\x12\x04\n\x02\x08%c"
    b"b\x0e\n\x06joined\x12\x04\n\x02\x08%cB\x04\n\x00\x10\x11" % (code, code, code)
    for dtype, code in ELEMENT_TYPES.items()
}


class EngineError(RuntimeError):
    """The graphs cannot be run as asked for; says what is missing."""


class GraphEngine(ABC):
    """
    Runs a bundle's graphs, by whichever runtime a subclass opens and runs them with; features are numpy arrays here.

    Attributes:
        provider: what really runs the graphs.
        variant: the name of the variant that is run.
    """

    def __init__(self, bundle: Bundle, variant: str, provider: str) -> None:
        graphs = bundle.manifest.variants[variant]
        self.provider = provider
        self.variant = variant
        self._trunk = self._open(bundle, graphs.trunk)
        self._experts = [self._open(bundle, graph) for graph in graphs.experts]
        self._routers = [self._open(bundle, graph) for graph in graphs.routers]

    def trunk(self, images: NDArray[np.uint8]) -> Any:
        """(B, H, W, 3) to features."""
        return self._run(self._trunk, {"images": images}, ["features"])[0]

    def expert(self, index: int, features: Any, logits_sum: Floats) -> tuple[Floats, Any]:
        """Features and (B, C) to the new (B, C), and the expert's feature."""
        given = {"features": features, "logits_sum": logits_sum}
        new_logits_sum, expert_feature = self._run(self._experts[index], given, ["new_logits_sum", "expert_feature"])
        return new_logits_sum, expert_feature

    def router(self, index: int, expert_feature: Any, logits_sum: Floats) -> Floats:
        """The expert's feature and (B, C) to (B,)."""
        given = {"expert_feature": expert_feature, "logits_sum": logits_sum}
        scores: Floats = self._run(self._routers[index], given, ["score"])[0]
        return scores

    def take(self, features: Any, rows: Rows) -> Any:
        """The features of these rows."""
        return features.take(rows, axis=0)

    def join(self, features: Sequence[Any]) -> Any:
        """The features of several batches, one after the other."""
        return np.concatenate(features)

    @abstractmethod
    def _open(self, bundle: Bundle, graph: GraphSpec) -> Any:
        """A graph that `_run` takes."""

    @abstractmethod
    def _run(self, graph: Any, inputs: dict[str, NDArray[Any]], outputs: list[str]) -> list[Any]:
        """The outputs that are named, in memory that no later run writes into."""


class OnnxEngine(GraphEngine):
    """One onnxruntime session per graph; between graphs, features are numpy arrays on the host."""

    def __init__(self, bundle: Bundle, variant: str, *, provider: str, threads: int) -> None:
        """
        Raises:
            BundleError: where a graph's tensors are not those of the manifest.
            EngineError: where the provider does not work on this machine.
        """
        if bundle.manifest.variants[variant].precision == "bf16":
            raise EngineError(
                f"variant {variant!r}: {PROVIDERS[provider]} would compute it in fp32; set RIDE_PROVIDER=openvino, or "
                "choose another"
            )
        self._threads = threads
        super().__init__(bundle, variant, provider)

    def _run(self, graph: ort.InferenceSession, inputs: dict[str, NDArray[Any]], outputs: list[str]) -> list[Any]:
        found: list[Any] = graph.run(outputs, inputs)
        return found

    def _open(self, bundle: Bundle, graph: GraphSpec) -> ort.InferenceSession:
        """A session for a graph whose tensors are those that the manifest lists."""
        try:
            session = self._session(bundle.read_graph(graph), self.provider)  # bytes: it may refer to no other files
        except EngineError as error:
            raise EngineError(f"{graph.file}: {error}") from error
        for kind, found, listed in (
            ("input", session.get_inputs(), graph.inputs),
            ("output", session.get_outputs(), graph.outputs),
        ):
            _compare_tensors(graph.file, kind, found, listed)
        return session

    def _session(self, graph: bytes, provider: str) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # nothing but what ends the process: errors are raised, and are in our own log
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # leaves the core to HTTP and decoding
        try:
            # left to itself it would go on with the CPU, and its reason would be lost
            session = ort.InferenceSession(graph, options, providers=_providers(provider, graph), enable_fallback=0)
        except Exception as error:  # onnxruntime's exceptions share no class of their own
            raise EngineError(f"onnxruntime {RUNTIME_VERSION} cannot open it: {error}") from error
        if PROVIDERS[provider] not in session.get_providers():  # where a library is missing it still goes on without
            libraries = "TensorRT 10, CUDA" if provider == "tensorrt" else "CUDA"
            raise EngineError(
                f"onnxruntime {RUNTIME_VERSION} could not start {PROVIDERS[provider]}; are the NVIDIA driver, "
                f"{libraries} and cuDNN that it needs installed? RIDE_PROVIDER=cpu does without"
            )
        return session


class DeviceFeatures(NamedTuple):
    """On the device: the features of `rows` images, then those of others that fill up the batch."""

    value: ort.OrtValue
    rows: int


class DeviceEngine(OnnxEngine):
    """
    The same on a GPU ("cpu" is for tests): features stay there between the graphs (I/O binding).

    Logits and router scores come to the host, because the cascade decides on them. Batches are filled up to one of a
    few sizes, as onnxruntime plans a convolution anew whenever the size is another than the last time.
    """

    def __init__(self, bundle: Bundle, variant: str, *, provider: str, threads: int) -> None:
        super().__init__(bundle, variant, provider=provider, threads=threads)
        self._device = "cpu" if provider == "cpu" else "cuda"
        dtype = bundle.manifest.variants[variant].trunk.outputs[0].dtype
        plain = "cuda" if provider == "tensorrt" else provider  # TensorRT takes no tensors of any rank
        self._take = self._session(GATHER_GRAPHS[dtype], plain)
        self._join = self._session(CONCAT_GRAPHS[dtype], plain)
        if provider != "tensorrt":  # for whose sake `warm_up_sizes` begins with the largest batch
            self._try(bundle)

    def _try(self, bundle: Bundle) -> None:
        """One image through the trunk."""
        image = bundle.manifest.input
        try:
            self.trunk(np.zeros((1, image.height, image.width, 3), np.uint8))
        except Exception as error:  # such as that the GPU is too old, or too new, for this build
            raise EngineError(f"{PROVIDERS[self.provider]} opens the graphs but does not run them: {error}") from error

    def trunk(self, images: NDArray[np.uint8]) -> DeviceFeatures:
        """(B, H, W, 3) to features, on the device."""
        given = {"images": _filled(images, batch_size_for(len(images)))}
        (features,) = _run_bound(self._trunk, given, {"features": self._device})
        return DeviceFeatures(features, len(images))

    def expert(self, index: int, features: DeviceFeatures, logits_sum: Floats) -> tuple[Floats, DeviceFeatures]:
        """Features and (B, C) to the new (B, C), and the expert's feature, on the device."""
        new_logits_sum, expert_feature = _run_bound(
            self._experts[index],
            {"features": features.value, "logits_sum": _filled(logits_sum, features.value.shape()[0])},
            {"new_logits_sum": "cpu", "expert_feature": self._device},
        )
        return new_logits_sum.numpy()[: features.rows], DeviceFeatures(expert_feature, features.rows)

    def router(self, index: int, expert_feature: DeviceFeatures, logits_sum: Floats) -> Floats:
        """The expert's feature and (B, C) to (B,)."""
        value, rows = expert_feature
        given = {"expert_feature": value, "logits_sum": _filled(logits_sum, value.shape()[0])}
        scores: Floats = _run_bound(self._routers[index], given, {"score": "cpu"})[0].numpy()
        return scores[:rows]

    def take(self, features: DeviceFeatures, rows: Rows) -> DeviceFeatures:
        """The features of these rows, on the device."""
        given = {"data": features.value, "rows": _filled(rows, batch_size_for(len(rows)))}
        (taken,) = _run_bound(self._take, given, {"taken": self._device})
        return DeviceFeatures(taken, len(rows))

    def join(self, features: Sequence[DeviceFeatures]) -> DeviceFeatures:
        """The features of several batches, one after the other, on the device."""
        joined, rows, size = features[0].value, [np.arange(features[0].rows)], features[0].value.shape()[0]
        for more in features[1:]:
            (joined,) = _run_bound(self._join, {"first": joined, "second": more.value}, {"joined": self._device})
            rows.append(size + np.arange(more.rows))
            size += more.value.shape()[0]
        return self.take(DeviceFeatures(joined, size), np.concatenate(rows))


def batch_size_for(rows: int) -> int:
    """The least of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that is enough: a power of two or three quarters of one."""
    power = 1 << (rows - 1).bit_length()
    return 3 * power // 4 if power >= 4 and rows <= 3 * power // 4 else power


def _filled(values: NDArray[Any], size: int) -> NDArray[Any]:
    """(B, ...) to (size, ...), with zeros behind."""
    if len(values) == size:
        return values
    return np.concatenate([values, np.zeros((size - len(values), *values.shape[1:]), values.dtype)])


def _run_bound(
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


def _providers(provider: str, graph: bytes) -> list[Any]:
    """What onnxruntime shall use for the graph, the CPU for what the device cannot."""
    options: dict[str, dict[str, Any]] = {}
    if provider == "tensorrt":
        options[PROVIDERS["tensorrt"]] = _tensorrt_options(graph)
    if provider in GPU_PROVIDERS:
        options[PROVIDERS["cuda"]] = CUDA_OPTIONS
    return [*options.items(), PROVIDERS["cpu"]]


def _tensorrt_options(graph: bytes) -> dict[str, Any]:
    """Engines are kept on disk, each graph's in a directory of its own: their names do not tell weights apart."""
    directory = TENSORRT_CACHE.expanduser() / hashlib.sha256(graph).hexdigest()
    directory.mkdir(parents=True, exist_ok=True)
    return {
        "trt_engine_cache_enable": True, "trt_engine_cache_path": str(directory), "trt_timing_cache_enable": True
    }  # fmt: skip


def open_engine(bundle: Bundle, variant: str | None, *, provider: str, threads: int) -> GraphEngine:
    """
    Open a bundle's graphs with a provider; "auto" is CUDA where it works, else the CPU.

    Args:
        variant: name of the variant; None takes what the provider is fastest at and parity allows.

    Raises:
        BundleError, EngineError: as OnnxEngine.
    """
    if provider == "openvino":
        from service.openvino_engine import OpenVinoEngine  # it is not installed everywhere

        return OpenVinoEngine(bundle, variant or choose_variant(bundle.manifest, provider), threads=threads)
    available = set(ort.get_available_providers())
    if provider in GPU_PROVIDERS and PROVIDERS[provider] not in available:
        raise EngineError(
            f"RIDE_PROVIDER is {provider}, this onnxruntime {RUNTIME_VERSION} was built without; pip uninstall it and "
            "install the extra serve-gpu in place of serve, or set RIDE_PROVIDER=cpu"
        )
    if PROVIDERS["cuda"] in available and provider != "cpu":
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find, which may not be needed
            ort.preload_dlls()  # of the nvidia-* wheels, where they are installed
        wanted = "cuda" if provider == "auto" else provider
        try:
            chosen = variant or choose_variant(bundle.manifest, wanted)
            return DeviceEngine(bundle, chosen, provider=wanted, threads=threads)
        except EngineError as error:
            if provider != "auto":
                raise
            advice = "RIDE_PROVIDER=cpu does without, with a worker for each core"
            log(logging.WARNING, "gpu_not_used", reason=str(error), advice=advice)
    return OnnxEngine(bundle, variant or choose_variant(bundle.manifest, "cpu"), provider="cpu", threads=threads)


def choose_variant(manifest: Manifest, provider: str, flags: Set[str] | None = None) -> str:
    """
    The variant that the provider is fastest at, of those that lose next to nothing; else the bundle's default.

    Args:
        flags: what the processor can do; None: this processor.
    """
    flags = processor_flags() if flags is None else flags
    for precision in PREFERRED[provider]:
        if (precision == "int8" and not INT8_FLAGS & flags) or (precision == "bf16" and not BF16_FLAGS & flags):
            continue
        for name, variant in sorted(manifest.variants.items()):
            if variant.precision == precision and manifest.may_serve(name):
                return name
    return manifest.default_variant


def processor_flags() -> Set[str]:
    """The instruction sets that Linux lists for the first processor; none where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next(
        (set(line.partition(":")[2].split()) for line in lines if line.startswith(("flags", "Features"))), set()
    )


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
