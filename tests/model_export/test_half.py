"""What fp16 does to numbers, on a CPU that computes in fp32."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from model_export.half import rounding

NUMBERS = (1.0, 300.0)  # times 200, and that divided by 256: within the range of fp16, and beyond it


def graph_of(dtype):
    """x -> 200 x -> relu -> times 1/256, in fp16 between two casts."""
    constants = [
        numpy_helper.from_array(np.full((1, 1, 1, 1), value, dtype), name)
        for name, value in (("large", 200), ("small", 1 / 256))
    ]
    nodes = [
        helper.make_node("Cast", ["x"], ["half"], to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype))),
        helper.make_node("Conv", ["half", "large"], ["product"]),
        helper.make_node("Relu", ["product"], ["positive"]),
        helper.make_node("Conv", ["positive", "small"], ["quotient"]),
        helper.make_node("Cast", ["quotient"], ["y"], to=TensorProto.FLOAT),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 1, 1, 1]) for name in "xy"]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def run(model, numbers):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": np.array(numbers, np.float32).reshape(-1, 1, 1, 1)})
    return found.ravel()


def test_every_number_is_rounded_where_it_arises():
    """As numpy, which has fp16, rounds; what fp16 cannot hold is infinite, not what fp32 makes of it."""
    numbers = np.linspace(*NUMBERS, 200)
    with np.errstate(over="ignore"):
        product = np.float16(numbers.astype(np.float16).astype(np.float32) * 200)
    expected = np.float16(product.astype(np.float32) / 256)

    model = rounding(graph_of(np.float16))
    onnx.checker.check_model(model, full_check=True)
    assert run(model, numbers).tolist() == expected.astype(np.float32).tolist()
    assert run(model, [400.0]).tolist() == [np.inf]


@pytest.mark.parametrize("numbers", [NUMBERS, (400.0,)])
def test_a_graph_in_fp32_stays_as_it_is(numbers):
    """Nothing is fp16 there, so nothing is rounded."""
    model = graph_of(np.float32)
    assert run(rounding(model), numbers).tolist() == run(model, numbers).tolist()
