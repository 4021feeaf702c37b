"""The precisions that a model is exported in: fp32, and smaller ones that are faster where the device has the units."""

from __future__ import annotations

import dataclasses
import importlib.util
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import onnx
import torch
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.quant_utils import add_pre_process_metadata
from torch import Tensor

from model_export.bundle import BundleError, Graphs, GraphSpec, Precision
from model_export.graphs import save_graph, write_graph
from model_export.openvino_core import openvino_core
from model_export.split import split
from training.data.sets import AnyImages
from training.methods.method import Model

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
QUANTISED = ("Conv", "Add", "Relu")
POOLING = ("ReduceMean", "GlobalAveragePool")
INT8_IMAGES = 500  # for the range of activations
BATCH = 64
EXAMPLES = 2  # images to trace with

Feed = dict[str, np.ndarray]


def parse_precisions(text: str) -> tuple[Precision, ...]:
    """
    A comma-separated list of precisions, in their usual order and with fp32, which every bundle has.

    Raises:
        BundleError: for a name that is none.
    """
    names = {name.strip() for name in text.split(",")} | {"fp32"}
    unknown = sorted(names - set(PRECISIONS))
    if unknown:
        raise BundleError(f"variants: {', '.join(map(repr, unknown))} is unknown; there are {', '.join(PRECISIONS)}")
    return tuple(precision for precision in PRECISIONS if precision in names)


def obstacle(precision: Precision) -> str | None:
    """Why a variant of this precision cannot be measured on this machine; None where it can."""
    if precision != "bf16":
        return None
    if importlib.util.find_spec("openvino") is None:
        return "the package openvino, which runs it, is not installed"
    if "BF16" not in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        return "this CPU has no bf16 units (AVX512_BF16 or AMX)"
    return None


def write_graphs(model: Model, images: AnyImages, precisions: Sequence[Precision], directory: Path) -> list[Graphs]:
    """
    The graphs of each precision, fp32 first, which the others take files from.

    Args:
        images: of the training set.
    """
    fp32 = _write_fp32(model, images.even_sample(EXAMPLES), directory)
    write: dict[Precision, Callable[[], Graphs]] = {
        "fp32": lambda: fp32,
        "bf16": lambda: dataclasses.replace(fp32, precision="bf16"),
        "fp16": lambda: _write_fp16(model, fp32, images.even_sample(EXAMPLES), directory),
        "int8": lambda: _write_int8(model, fp32, images.even_sample(INT8_IMAGES), directory),
    }
    return [write[precision]() for precision in precisions]


def _write_fp32(model: Model, images: Tensor, directory: Path) -> Graphs:
    """trunk.onnx, expert_0.onnx and so on, router_0.onnx and so on."""
    trunk, experts = _write_layers(model, images, torch.float32, ".onnx", directory)
    with torch.no_grad():
        outputs = model.net(images)
    asked = {"expert_feature": outputs.expert_features[0], "logits_sum": outputs.expert_logits[0]}
    _, _, routers = split(model, images.shape[2])
    return Graphs("fp32", trunk, experts, tuple(
        write_graph(router, asked, ["score"], directory / f"router_{index}.onnx")
        for index, router in enumerate(routers)
    ))  # fmt: skip


def _write_fp16(model: Model, fp32: Graphs, images: Tensor, directory: Path) -> Graphs:
    """trunk.fp16.onnx and so on, whose layers and features are in half precision; the routers stay fp32."""
    trunk, experts = _write_layers(model, images, torch.float16, ".fp16.onnx", directory)
    return Graphs("fp16", trunk, experts, fp32.routers)


def _write_layers(
    model: Model, images: Tensor, dtype: torch.dtype, suffix: str, directory: Path
) -> tuple[GraphSpec, tuple[GraphSpec, ...]]:
    """Trunk and experts, computing in `dtype`; `images` (N, H, W, 3) are examples to trace with."""
    trunk, experts, _ = split(model, images.shape[2], dtype)
    with torch.no_grad():
        given = {"features": trunk(images), "logits_sum": torch.zeros_like(model.net(images).expert_logits[0])}
    return write_graph(trunk, {"images": images}, ["features"], directory / f"trunk{suffix}"), tuple(
        write_graph(expert, given, ["new_logits_sum", "expert_feature"], directory / f"expert_{index}{suffix}")
        for index, expert in enumerate(experts)
    )


def _write_int8(model: Model, fp32: Graphs, images: Tensor, directory: Path) -> Graphs:
    """
    The fp32 graphs with the convolutions of trunk and experts in 8 bits, as trunk.int8.onnx and so on.

    Weights are signed, with a scale per output channel; activations are unsigned, with the range that they have on
    `images`. The first convolution, what follows the pooling, and the routers stay fp32, as do all inputs and outputs.

    Args:
        images: (N, H, W, 3), uint8, of the training set.
    """
    trunk, _, _ = split(model, images.shape[2])
    with torch.no_grad():
        logits_sum = torch.zeros_like(model.net(images[:BATCH]).expert_logits[0]).numpy()

    def before_experts() -> Iterator[Feed]:
        """The fp32 trunk's features: experts then read them with the scale that the int8 trunk wrote them with."""
        for batch in images.split(BATCH):
            with torch.no_grad():
                yield {"features": trunk(batch).numpy(), "logits_sum": logits_sum[: len(batch)]}

    return dataclasses.replace(
        fp32,
        precision="int8",
        trunk=_quantise(fp32.trunk, directory, ({"images": batch.numpy()} for batch in images.split(BATCH)), stem=True),
        experts=tuple(_quantise(expert, directory, before_experts()) for expert in fp32.experts),
    )


class _Feeds(CalibrationDataReader):
    def __init__(self, feeds: Iterator[Feed]) -> None:
        self._feeds = feeds

    def get_next(self) -> Feed | None:
        return next(self._feeds, None)


def _quantise(graph: GraphSpec, directory: Path, feeds: Iterator[Feed], *, stem: bool = False) -> GraphSpec:
    """`stem`: the graph begins with the images, and its first convolution is left as it is."""
    source = directory / graph.file
    model = onnx.load(source)
    excluded = _after_pooling(model)
    if stem:
        excluded.append(next(node.name for node in model.graph.node if node.op_type == "Conv"))
    add_pre_process_metadata(model)  # or we are advised to fold and to infer shapes, which is done
    with tempfile.TemporaryDirectory() as scratch:
        quantised = Path(scratch, graph.file)
        quantize_static(
            model, quantised, _Feeds(feeds), quant_format=QuantFormat.QDQ, calibrate_method=CalibrationMethod.MinMax,
            per_channel=True, weight_type=QuantType.QInt8, activation_type=QuantType.QUInt8,
            op_types_to_quantize=list(QUANTISED), nodes_to_exclude=excluded,
        )  # fmt: skip
        model = onnx.load(quantised)
    return save_graph(model, source.with_suffix(".int8.onnx"), inputs=graph.inputs, outputs=graph.outputs)


def _after_pooling(model: onnx.ModelProto) -> list[str]:
    """Names of the nodes that need the pooled features, the pooling included. Nodes are stored in running order."""
    reached: set[str] = set()
    names = []
    for node in model.graph.node:
        if node.op_type in POOLING or reached.intersection(node.input):
            reached.update(node.output)
            names.append(node.name)
    return names
