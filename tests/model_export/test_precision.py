"""Variants beside fp32: what is in their graphs, how close they come, and when they are left out."""

import importlib.machinery
import sys
import types

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from model_export import precision
from model_export.__main__ import main, table
from model_export.bundle import read_bundle
from model_export.openvino_core import openvino_core
from model_export.parity import run_variant
from model_export.precision import obstacle, parse_precisions
from model_export.split import split
from tests.tiny import TinyModel, write_bundle
from training.train import trained_model


@pytest.fixture
def manifest(exported):
    """Of the bundle with all variants."""
    return read_bundle(exported).manifest


def test_a_variant_has_its_own_layers_and_shares_the_routers(manifest):
    """bf16 is fp32's files. Features are halved in fp16; everything else that crosses a border is fp32."""
    fp32, fp16, int8 = (manifest.variants[name] for name in ("fp32", "fp16", "int8"))

    assert {name: variant.precision for name, variant in manifest.variants.items()}.items() >= {
        "fp32": "fp32", "fp16": "fp16", "int8": "int8"
    }.items()  # fmt: skip
    assert fp16.routers == int8.routers == fp32.routers
    assert (fp16.trunk.file, int8.experts[2].file) == ("trunk.fp16.onnx", "expert_2.int8.onnx")
    assert (int8.trunk.inputs, int8.trunk.outputs) == (fp32.trunk.inputs, fp32.trunk.outputs)
    assert [spec.outputs for spec in int8.experts] == [spec.outputs for spec in fp32.experts]
    assert fp16.trunk.outputs[0].dtype == fp16.experts[0].inputs[0].dtype == "float16"
    assert {tensor.dtype for tensor in (*fp16.experts[0].inputs[1:], *fp16.experts[0].outputs)} == {"float32"}


def test_every_variant_is_measured_on_all_held_out_images(manifest):
    """Against one and the same checkpoint."""
    parities = [variant.parity for variant in manifest.variants.values()]

    assert {parity.images for parity in parities} == {manifest.calibration.images}
    assert len({(parity.checkpoint_accuracy, parity.checkpoint_mean_experts) for parity in parities}) == 1
    default = next(
        point for point in manifest.calibration.points
        if (point.rule, point.thresholds) == (manifest.rule, manifest.thresholds)
    )  # fmt: skip
    assert parities[0].checkpoint_accuracy == default.accuracy
    assert parities[0].checkpoint_mean_experts == default.mean_experts


@pytest.mark.parametrize(("name", "closest", "farthest"), [("fp16", 0.0, 0.05), ("int8", 1e-3, 1.5)])
def test_smaller_variants_say_nearly_the_same(name, closest, farthest, exported, manifest):
    """In units of the logits, of which the checkpoint's reach 30; and not exactly the same, or they would be fp32."""
    images = np.random.default_rng(5).integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
    expected, found = (run_variant(exported, manifest.variants[key], images, 3) for key in ("fp32", name))

    difference = np.abs(found.expert_logits - expected.expert_logits)
    assert closest < difference.max() < farthest
    assert found.expert_logits.dtype == np.float32
    assert np.abs(found.router_scores - expected.router_scores).max() < farthest / 3


def test_convolutions_are_in_8_bits_and_what_follows_the_pooling_is_not(exported):
    """Inputs and weights of all but the first, weights with a scale per output channel; classifier and sum in float."""
    for file, convolutions in (("trunk.int8.onnx", 7), ("expert_1.int8.onnx", 14)):  # the latter with two shortcuts
        graph = onnx.load(exported / file).graph
        made_by = {name: node for node in graph.node for name in node.output}
        constants = {constant.name: numpy_helper.to_array(constant) for constant in graph.initializer}
        nodes = [node for node in graph.node if node.op_type == "Conv"]
        assert len(nodes) == convolutions
        if file.startswith("trunk"):
            first = nodes.pop(0)
            assert all(made_by[name].op_type != "DequantizeLinear" for name in first.input if name in made_by)
        for node in nodes:
            values, weights = (made_by[name] for name in node.input[:2])
            assert (values.op_type, weights.op_type) == ("DequantizeLinear", "DequantizeLinear")
            assert constants[weights.input[0]].dtype == np.int8
            assert len(constants[weights.input[1]]) == len(constants[weights.input[0]]) > 1
            assert constants[values.input[2]].dtype == np.uint8
        assert not {"Slice", "Pad"}.intersection(node.op_type for node in graph.node)  # what shortcuts would be
        for node in graph.node:
            if node.op_type in ("Sub", "Div", "Gemm", "ReduceMean") or "new_logits_sum" in node.output:
                before = [made_by[name].op_type for name in node.input if name in made_by]
                after = [user.op_type for user in graph.node if set(user.input) & set(node.output)]
                if node.op_type != "ReduceMean":  # which reads the last feature map, and that is quantised
                    assert "DequantizeLinear" not in before
                assert node.op_type == "Div" or "QuantizeLinear" not in after


def test_bf16_runs_the_files_of_fp32_and_is_measured_by_really_running_them(manifest):
    """Its logits are rounded, so that they differ from the checkpoint's more than those of fp32."""
    if obstacle("bf16") is not None:
        pytest.skip(obstacle("bf16"))
    fp32, bf16 = manifest.variants["fp32"], manifest.variants["bf16"]

    assert (bf16.precision, bf16.graphs) == ("bf16", fp32.graphs)
    assert 1e-3 < bf16.parity.max_abs_logit_difference < 2
    assert bf16.parity.top1_agreement > 0.7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_splitting_leaves_the_model_as_it_is(run, dtype):
    """In fp32, whatever it is split into; the trunk's normalisation too is fp32, the checkpoint's to the last bit."""
    _, model = trained_model(run)
    images = torch.randint(0, 256, (3, 16, 16, 3), dtype=torch.uint8)
    model.net.trunk.mean += 0.01  # which half precision cannot hold
    with torch.no_grad():
        before, trunk_features = model.net(images).expert_logits, model.net.trunk(images)
        trunk, experts, _ = split(model, 16, dtype)
        features = trunk(images)
        normalised = (images.permute(0, 3, 1, 2) - model.net.trunk.mean) / model.net.trunk.std
        expected = trunk.layers(normalised.to(dtype))
        after = model.net(images).expert_logits

    assert torch.equal(before, after)
    assert torch.equal(features, expected)
    assert features.dtype == dtype
    assert torch.equal(features, trunk_features) == (dtype == torch.float32)
    torch.testing.assert_close(features.float(), trunk_features, rtol=0.01, atol=0.05)
    assert {parameter.dtype for parameter in experts[0].expert.classifier.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("text", "precisions"), [("int8", ("fp32", "int8")), ("int8, bf16,fp32", ("fp32", "bf16", "int8"))]
)
def test_fp32_is_always_written_and_first(text, precisions):
    """The others take files from it; in whatever order they are named."""
    assert parse_precisions(text) == precisions


def test_unknown_variants_are_refused_with_the_list(tmp_path, capsys):
    """Before anything is read or written."""
    assert main([str(tmp_path), "-o", str(tmp_path / "bundle"), "--variants", "fp32,int4,fp8"]) == 2
    assert capsys.readouterr().err == (
        "ride-export: variants: 'fp8', 'int4' is unknown; there are fp32, bf16, fp16, int8\n"
    )  # fmt: skip


def fake_openvino(capabilities):
    """A package whose CPU can do so much."""
    module = types.ModuleType("openvino")
    module.__spec__ = importlib.machinery.ModuleSpec("openvino", None)
    module.Core = lambda: types.SimpleNamespace(get_property=lambda device, name: capabilities)
    return module


@pytest.mark.parametrize(
    ("package", "reason"),
    [
        (None, "the package openvino, which runs it, is not installed"),
        (fake_openvino(["FP32", "INT8"]), "this CPU has no bf16 units (AVX512_BF16 or AMX)"),
    ],
)
def test_bf16_is_left_out_in_one_line_where_it_cannot_be_measured(package, reason, tmp_path, monkeypatch, capsys):
    """The others are written all the same."""
    monkeypatch.setitem(sys.modules, "openvino", package)
    monkeypatch.setattr(precision, "openvino_core", openvino_core.__wrapped__)
    assert main([str(tmp_path), "-o", str(tmp_path / "bundle"), "--variants", "bf16,int8"]) == 2
    assert capsys.readouterr().out == f"variant bf16 is left out: {reason}\n"


def test_a_variant_that_loses_too_much_is_listed_with_what_it_loses(tmp_path):
    """Where it loses most, and that nobody uses it by default."""
    bundle = write_bundle(tmp_path / "bundle", TinyModel(), losses={"fp32": 0.0, "fp16": 0.3, "int8": 0.41})
    lines = {line.split()[0]: line for line in table(read_bundle(bundle).manifest).splitlines()}

    assert "loses" not in lines["fp16"]
    assert lines["int8"].endswith("loses 0.41 points on few: not used unless asked for")
