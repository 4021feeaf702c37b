"""
One ONNX graph of a bundle's trunk and all its experts: what somebody without routing would serve.

    python -m benchmarks.contestants.merge --variant fp32 -o all_experts.onnx

uint8 images [N, H, W, 3] -> probabilities [N, C]. The graph's metadata hold the classes and how an image is resized.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from model_export.bundle import Bundle, read_bundle
from service.settings import DEFAULT_BUNDLE


def merge(bundle: Bundle, variant: str) -> onnx.ModelProto:
    """The graphs of a variant behind one another, every expert always; then the mean of their logits, and softmax."""
    manifest, graphs = bundle.manifest, bundle.manifest.variants[variant]
    n_classes, spec = len(manifest.classes), manifest.input
    trunk = _load(bundle, graphs.trunk.file, "trunk_")
    experts = [_load(bundle, graph.file, f"expert_{index}_") for index, graph in enumerate(graphs.experts)]
    constants = {
        "batch_axis": np.array([0]),
        "n_classes": np.array([n_classes]),
        "n_experts": np.array(manifest.n_experts, np.float32),
    }
    node = helper.make_node
    nodes: list[NodeProto] = [
        node("Identity", ["images"], ["trunk_images"]),
        *trunk.graph.node,
        node("Shape", ["images"], ["image_shape"]),
        node("Gather", ["image_shape", "batch_axis"], ["batch"]),
        node("Concat", ["batch", "n_classes"], ["logits_shape"], axis=0),
        node("ConstantOfShape", ["logits_shape"], ["no_logits"]),
    ]
    logits_sum = "no_logits"
    for index, expert in enumerate(experts):
        nodes += [
            node("Identity", ["trunk_features"], [f"expert_{index}_features"]),
            node("Identity", [logits_sum], [f"expert_{index}_logits_sum"]),
            *expert.graph.node,
        ]
        logits_sum = f"expert_{index}_new_logits_sum"
    nodes += [
        node("Div", [logits_sum, "n_experts"], ["logits"]),
        node("Softmax", ["logits"], ["probabilities"], axis=-1),
    ]
    weights = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    for part in (trunk, *experts):
        weights += part.graph.initializer
    graph = helper.make_graph(
        nodes,
        f"{manifest.name}_{variant}_all_experts",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", spec.height, spec.width, 3])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["N", n_classes])],
        weights,
    )
    model = helper.make_model(
        graph, opset_imports=_opsets([trunk, *experts]), ir_version=max(part.ir_version for part in (trunk, *experts))
    )
    helper.set_model_props(model, {"classes": json.dumps(manifest.classes), "input": json.dumps(asdict(spec))})
    onnx.checker.check_model(model, full_check=True)
    return model


def _load(bundle: Bundle, file: str, prefix: str) -> onnx.ModelProto:
    model = onnx.load(bundle.path / file)
    _rename(model.graph, prefix)
    return model


def _rename(graph: onnx.GraphProto, prefix: str) -> None:
    """
    Put the prefix before the name of every tensor and node, inside loops and branches, too.

    onnx.compose.add_prefix leaves out what a loop's body uses of the graph around it.
    """
    for value in (*graph.input, *graph.output, *graph.initializer):
        value.name = prefix + value.name
    for node in graph.node:
        node.name = node.name and prefix + node.name
        node.input[:] = [name and prefix + name for name in node.input]  # "" is an input that is left out
        node.output[:] = [name and prefix + name for name in node.output]
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                _rename(attribute.g, prefix)


def _opsets(models: Sequence[onnx.ModelProto]) -> list[onnx.OperatorSetIdProto]:
    versions: dict[str, int] = {}
    for model in models:
        for opset in model.opset_import:
            if versions.setdefault(opset.domain, opset.version) != opset.version:
                raise ValueError(f"graphs use versions {versions[opset.domain]} and {opset.version} of the operators")
    return [helper.make_opsetid(domain, version) for domain, version in versions.items()]


def main() -> None:
    """Write the merged graph of a bundle's variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=DEFAULT_BUNDLE, metavar="DIR", help="[default: the one we ship]")
    parser.add_argument("--variant", default="fp32", metavar="NAME", help="[default: %(default)s]")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")
    options = parser.parse_args()
    onnx.save(merge(read_bundle(options.bundle), options.variant), options.output)


if __name__ == "__main__":
    main()
