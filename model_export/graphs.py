"""Modules to ONNX files that are the same bytes for the same weights, and say nothing of the machine that made them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from model_export.bundle import GraphSpec, TensorSpec, sha256_of

OPSET = 18
BATCH_AXIS = "N"
_DTYPES = {torch.uint8: "uint8", torch.float16: "float16", torch.float32: "float32"}


def write_graph(module: nn.Module, inputs: Mapping[str, Tensor], outputs: Sequence[str], file: Path) -> GraphSpec:
    """
    Trace `module` and write it with a free batch axis.

    Args:
        inputs: name to an example (N, ...) with N ≥ 2, in the order of the module's arguments.
        outputs: names, in the order of its results.
        file: where to; its name is what the manifest will say.

    Returns:
        What the manifest says about the graph.
    """
    for name in ("onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with torch.no_grad():
        results = module(*inputs.values())
        program = torch.onnx.export(
            module, tuple(inputs.values()), input_names=list(inputs), output_names=list(outputs), opset_version=OPSET,
            dynamic_shapes=tuple({0: torch.export.Dim.DYNAMIC} for _ in inputs), dynamo=True, verbose=False,
        )  # fmt: skip
    assert program is not None  # it is None only where the exporter writes the file itself
    results = results if isinstance(results, tuple) else (results,)
    return save_graph(
        program.model_proto, file,
        inputs=tuple(_spec(name, tensor) for name, tensor in inputs.items()),
        outputs=tuple(_spec(name, tensor) for name, tensor in zip(outputs, results, strict=True)),
    )  # fmt: skip


def save_graph(
    model: onnx.ModelProto, file: Path, *, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]
) -> GraphSpec:
    """Write a checked graph without its origin, its batch axis named; returns what the manifest says about it."""
    _forget_origin(model)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = BATCH_AXIS
    onnx.checker.check_model(model, full_check=True)
    file.write_bytes(model.SerializeToString(deterministic=True))
    return GraphSpec(file=file.name, sha256=sha256_of(file), inputs=inputs, outputs=outputs)


def _spec(name: str, tensor: Tensor) -> TensorSpec:
    return TensorSpec(name, _DTYPES[tensor.dtype], (None, *tensor.shape[1:]))


def _forget_origin(model: onnx.ModelProto) -> None:
    """Remove what the tracer notes about source files: it differs between machines and tells paths."""
    model.doc_string = ""
    del model.metadata_props[:]
    graph = model.graph
    graph.doc_string = ""
    del graph.value_info[:]  # shapes inside, which every runtime infers anew
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        part.doc_string = ""
        del part.metadata_props[:]
