"""
What a GPU computes in fp16, on a CPU.

onnxruntime's CPU provider has next to no fp16 arithmetic: it computes convolutions and what follows them in fp32 and
rounds at a graph's borders. Such a run says too little of rounding inside, and nothing of numbers that leave the range
of fp16 there.
"""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper, numpy_helper


def rounding(model: onnx.ModelProto) -> onnx.ModelProto:
    """
    The graph in fp32, with every number that `model` has in fp16 rounded to fp16 where it arises.

    Beyond 65,504 that is infinity. Sums inside an operation stay fp32, as on tensor cores. Inputs and outputs that were
    fp16 are fp32.
    """
    model = onnx.shape_inference.infer_shapes(model)
    graph = model.graph
    values = (*graph.value_info, *graph.input, *graph.output)
    halves = {value.name for value in values if value.type.tensor_type.elem_type == TensorProto.FLOAT16}
    for value in values:
        if value.name in halves:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for constant in graph.initializer:
        if constant.data_type == TensorProto.FLOAT16:
            constant.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(constant).astype("float32"), constant.name))
    nodes = list(graph.node)
    del graph.node[:]
    for node in nodes:
        rounded = [name for name in node.output if name in halves]
        node.output[:] = [f"{name}.exact" if name in halves else name for name in node.output]
        graph.node.append(node)
        for name in rounded:
            graph.node.append(helper.make_node("Cast", [f"{name}.exact"], [f"{name}.half"], to=TensorProto.FLOAT16))
            graph.node.append(helper.make_node("Cast", [f"{name}.half"], [name], to=TensorProto.FLOAT))
    del graph.value_info[:]
    return model
