"""The engine: what it opens, what it refuses, and that it runs what the bundle says."""

import copy
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from model_export.bundle import BundleError, TensorSpec, read_bundle, sha256_of, write_manifest
from service import engine as engine_module
from service.engine import (
    CONCAT_GRAPHS,
    GATHER_GRAPHS,
    DeviceEngine,
    EngineError,
    batch_size_for,
    choose_variant,
    open_engine,
)
from tests.tiny import TinyModel, noise, write_bundle

ELEMENT_TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}


@pytest.fixture
def bundle(tiny_bundle):
    return read_bundle(tiny_bundle)


def opened(bundle, **changes):
    """The engine of a bundle whose fp32 variant says something else than its files."""
    variant = dataclasses.replace(bundle.manifest.variants["fp32"], **changes)
    manifest = copy.copy(bundle.manifest)  # not checked again
    object.__setattr__(manifest, "variants", {"fp32": variant})
    return open_engine(dataclasses.replace(bundle, manifest=manifest), "fp32", provider="cpu", threads=1)


@pytest.mark.parametrize("dtype", GATHER_GRAPHS)
def test_the_gather_graphs_are_what_onnx_helper_makes(dtype):
    """Byte for byte: the service keeps them as bytes so as not to need the onnx package."""
    kind = ELEMENT_TYPES[dtype]
    graph = helper.make_graph(
        [helper.make_node("Gather", ["data", "rows"], ["taken"], axis=0)],
        "take",
        [
            helper.make_tensor_value_info("data", kind, None),
            helper.make_tensor_value_info("rows", TensorProto.INT64, ["N"]),
        ],
        [helper.make_tensor_value_info("taken", kind, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)

    assert model.SerializeToString(deterministic=True) == GATHER_GRAPHS[dtype]


@pytest.mark.parametrize("dtype", CONCAT_GRAPHS)
def test_the_concat_graphs_are_what_onnx_helper_makes(dtype):
    """Byte for byte, as the gather graphs."""
    kind = ELEMENT_TYPES[dtype]
    graph = helper.make_graph(
        [helper.make_node("Concat", ["first", "second"], ["joined"], axis=0)],
        "join",
        [helper.make_tensor_value_info(name, kind, None) for name in ("first", "second")],
        [helper.make_tensor_value_info("joined", kind, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)

    assert model.SerializeToString(deterministic=True) == CONCAT_GRAPHS[dtype]


@pytest.mark.parametrize("dtype", GATHER_GRAPHS)
@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 2, 3), (4, 2, 3, 5)])
def test_the_gather_graphs_take_rows_of_features_of_any_rank(dtype, shape):
    """In the order asked for."""
    data = np.random.default_rng(0).normal(size=shape).astype(dtype)
    session = onnxruntime.InferenceSession(GATHER_GRAPHS[dtype], providers=["CPUExecutionProvider"])
    (taken,) = session.run(None, {"data": data, "rows": np.array([3, 0, 2])})

    assert (taken == data[[3, 0, 2]]).all()
    assert taken.dtype == data.dtype


def cpu_engine(bundle):
    return open_engine(bundle, "fp32", provider="cpu", threads=1)


def device_engine(bundle):
    """What runs on a GPU, with its I/O binding, on the CPU."""
    return DeviceEngine(bundle, "fp32", provider="cpu", threads=1)


def openvino_engine(bundle):
    pytest.importorskip("openvino")
    return open_engine(bundle, "fp32", provider="openvino", threads=1)


@pytest.mark.parametrize("open_one", [cpu_engine, device_engine, openvino_engine])
def test_the_graphs_give_the_numbers_of_the_reference(bundle, open_one):
    """Trunk, experts and routers of a batch, with rows taken and joined in between, against plain numpy, one by one."""
    engine, model, images = open_one(bundle), TinyModel(), noise(6)
    first, second = engine.trunk(images[:2]), engine.trunk(images[2:])
    features = engine.join([engine.take(second, np.array([3])), engine.take(first, np.array([1])), second])
    features = engine.take(features, np.array([0, 1, 2]))
    logits_sum = np.zeros((3, 7), np.float32)
    scores = []
    for expert in range(3):
        logits_sum, expert_feature = engine.expert(expert, features, logits_sum)
        if expert < 2:
            scores.append(engine.router(expert, expert_feature, logits_sum))
    exponentials = np.exp(logits_sum / 3)

    for row, image in enumerate(images[[5, 1, 2]]):
        expected = model.answer(image, (0.0, 0.0))
        np.testing.assert_allclose(exponentials[row] / exponentials[row].sum(), expected.probabilities, atol=1e-5)
        np.testing.assert_allclose([score[row] for score in scores], expected.router_scores, atol=1e-5)


def test_batches_on_a_gpu_have_few_sizes():
    """At most a third of one is filling."""
    sizes = [batch_size_for(rows) for rows in range(1, 65)]
    assert sorted(set(sizes)) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]
    assert all(rows <= size <= 1.5 * rows for rows, size in enumerate(sizes, start=1))


@pytest.mark.parametrize("n_images", [1, 2, 5, 7, 9])
def test_what_fills_a_batch_up_never_shows(bundle, n_images):
    """Answers for the images alone, of whichever rows and joined batches, as those of the engine that fills nothing."""
    images, answers = noise(n_images), []
    for engine in (cpu_engine(bundle), device_engine(bundle)):
        features = engine.join([engine.trunk(images), engine.take(engine.trunk(images), np.arange(0, n_images, 2))])
        logits_sum, expert_feature = engine.expert(0, features, np.zeros((n_images + -(-n_images // 2), 7), np.float32))
        answers.append((logits_sum, engine.router(0, expert_feature, logits_sum)))
    for expected, found in zip(*answers, strict=True):
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_tensorrt_keeps_the_engines_of_graphs_apart(tmp_path, monkeypatch):
    """By their bytes: its own file names do not tell two experts apart."""
    monkeypatch.setattr(engine_module, "TENSORRT_CACHE", tmp_path / "new" / "cache")
    paths = [engine_module._tensorrt_options(graph)["trt_engine_cache_path"] for graph in (b"one", b"two", b"one")]
    assert paths[0] == paths[2] != paths[1]
    assert all(Path(path).is_dir() for path in paths)


@pytest.mark.parametrize(
    ("graph", "kind", "change", "message"),
    [
        ("trunk", "outputs", {"shape": (None, 5, 4, 4)},
         "trunk.onnx: output 'features' is float32 [N, 4, 4, 4], manifest.json lists float32 [N, 5, 4, 4]"),
        ("trunk", "outputs", {"dtype": "float16"}, "is float32 [N, 4, 4, 4], manifest.json lists float16 [N, 4, 4, 4]"),
        ("trunk", "inputs", {"shape": (None, 16, 16, 3)}, "input 'images' is uint8 [N, 8, 8, 3], manifest"),
        ("trunk", "outputs", {"name": "feature"}, "has outputs ['features'], manifest.json lists ['feature']"),
    ],
)  # fmt: skip
def test_a_graph_that_is_not_what_the_manifest_says_is_refused(bundle, graph, kind, change, message):
    """With the file, what it has and what is listed."""
    spec = getattr(bundle.manifest.variants["fp32"], graph)
    tensors = tuple(dataclasses.replace(tensor, **change) for tensor in getattr(spec, kind))
    with pytest.raises(BundleError) as refusal:
        opened(bundle, **{graph: dataclasses.replace(spec, **{kind: tensors})})

    assert message in str(refusal.value)


def test_a_missing_input_is_refused(bundle):
    """An expert that the manifest gives only one input."""
    spec = bundle.manifest.variants["fp32"].experts[0]
    listed = dataclasses.replace(spec, inputs=(TensorSpec("features", "float32", (None, 4, 4, 4)),))
    with pytest.raises(
        BundleError, match=r"expert_0.onnx: has inputs \['features', 'logits_sum'\], manifest.json lists"
    ):
        opened(bundle, experts=(listed, *bundle.manifest.variants["fp32"].experts[1:]))


def test_a_file_that_is_no_graph_is_refused(make_bundle):
    """With its name; its checksum may well be right."""
    path = make_bundle()
    (path / "router_1.onnx").write_bytes(b"not a graph")
    manifest = (path / "manifest.json").read_text()
    old = listed_checksum(manifest, "router_1.onnx")
    (path / "manifest.json").write_text(manifest.replace(old, sha256_of(path / "router_1.onnx")))
    bundle = read_bundle(path)

    with pytest.raises(EngineError, match=r"router_1.onnx: onnxruntime .* cannot open it"):
        open_engine(bundle, "fp32", provider="cpu", threads=1)


def listed_checksum(manifest, file):
    """The checksum that a manifest's text gives for a file."""
    variant = json.loads(manifest)["variants"]["fp32"]
    graphs = [variant["trunk"], *variant["experts"], *variant["routers"]]
    return next(graph["sha256"] for graph in graphs if graph["file"] == file)


@pytest.mark.parametrize("open_one", [cpu_engine, openvino_engine])
def test_a_graph_that_was_replaced_meanwhile_is_refused(make_bundle, open_one):
    """A worker that is restarted must not answer with other weights than the manifest was read with."""
    path = make_bundle()
    bundle = read_bundle(path)
    graph = onnx.load(path / "expert_1.onnx")
    graph.producer_name = "another"
    onnx.save(graph, path / "expert_1.onnx")

    with pytest.raises(BundleError, match=r"expert_1.onnx: is another file than manifest.json was read with"):
        open_one(bundle)
    (path / "expert_1.onnx").unlink()
    with pytest.raises(BundleError, match=r"expert_1.onnx: cannot be read any more \(No such file"):
        open_one(bundle)


def test_a_graph_may_not_reach_for_other_files(make_bundle):
    """Weights outside the graph's own file would be outside its checksum."""
    path = make_bundle()
    graph = onnx.load(path / "expert_0.onnx")
    onnx.save_model(graph, path / "expert_0.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert (path / "weights.bin").is_file()
    manifest = (path / "manifest.json").read_text()
    old = listed_checksum(manifest, "expert_0.onnx")
    (path / "manifest.json").write_text(manifest.replace(old, sha256_of(path / "expert_0.onnx")))
    bundle = read_bundle(path)

    with pytest.raises(EngineError, match=r"expert_0.onnx: onnxruntime .* cannot open it"):
        open_engine(bundle, "fp32", provider="cpu", threads=1)


@pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="this onnxruntime was built with CUDA"
)
def test_without_cuda_auto_takes_the_cpu_and_cuda_is_refused(bundle):
    """With what to install or set."""
    assert open_engine(bundle, None, provider="auto", threads=1).provider == "cpu"
    with pytest.raises(EngineError, match="install the extra serve-gpu in place of serve"):
        open_engine(bundle, None, provider="cuda", threads=1)


@pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="this onnxruntime was built with CUDA"
)
def test_a_gpu_that_does_not_work_is_told_of(bundle, monkeypatch, caplog):
    """auto takes the CPU and says why; cuda is refused."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    assert open_engine(bundle, None, provider="auto", threads=1).provider == "cpu"
    (record,) = caplog.records
    assert record.getMessage() == "gpu_not_used"
    assert "trunk.onnx: onnxruntime" in record.fields["reason"]
    with pytest.raises(EngineError, match=r"trunk.onnx: onnxruntime .* cannot open it: .*CUDAExecutionProvider"):
        open_engine(bundle, None, provider="cuda", threads=1)


def test_half_precision_features_are_served_too(tmp_path):
    """The trunk of an fp16 variant hands on float16: it is compacted and gives the same classes."""
    bundle = half_precision_bundle(tmp_path)
    engine = open_engine(bundle, "fp16", provider="cpu", threads=1)
    features = engine.take(engine.trunk(noise(4)), np.array([2]))
    logits_sum, _ = engine.expert(0, features, np.zeros((1, 7), np.float32))

    assert features.dtype == np.float16
    assert logits_sum.argmax() == TinyModel(1).answer(noise(4)[2], ()).probabilities.argmax()


def half_precision_bundle(directory):
    """One expert whose features are cast to float16 on their way out of the trunk."""
    path = write_bundle(directory / "bundle", TinyModel(1))
    trunk, expert = onnx.load(path / "trunk.onnx"), onnx.load(path / "expert_0.onnx")
    trunk.graph.node[-1].output[0] = "wide"
    trunk.graph.node.append(helper.make_node("Cast", ["wide"], ["features"], to=TensorProto.FLOAT16))
    trunk.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    expert.graph.node[0].input[0] = "wide"
    expert.graph.node.insert(0, helper.make_node("Cast", ["features"], ["wide"], to=TensorProto.FLOAT))
    expert.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    manifest = read_bundle(path).manifest
    variant = manifest.variants["fp32"]
    specs = []
    for name, graph, spec in (
        ("trunk_half.onnx", trunk, variant.trunk),
        ("expert_half.onnx", expert, variant.experts[0]),
    ):
        onnx.save(graph, path / name)
        half = TensorSpec("features", "float16", (None, 4, 4, 4))
        specs.append(
            dataclasses.replace(
                spec, file=name, sha256=sha256_of(path / name),
                inputs=tuple(half if tensor.name == "features" else tensor for tensor in spec.inputs),
                outputs=tuple(half if tensor.name == "features" else tensor for tensor in spec.outputs),
            )
        )  # fmt: skip
    fp16 = dataclasses.replace(variant, trunk=specs[0], experts=(specs[1],))
    write_manifest(path, dataclasses.replace(manifest, variants={"fp32": variant, "fp16": fp16}))
    return read_bundle(path)


@pytest.mark.parametrize(
    ("losses", "provider", "flags", "chosen"),
    [
        ({"fp32": 0, "int8": 0.3}, "cpu", {"avx512_vnni"}, "int8"),
        ({"fp32": 0, "int8": 0.31}, "cpu", {"avx512_vnni"}, "fp32"),  # it loses too much
        ({"fp32": 0, "int8": 0}, "cpu", {"avx2"}, "fp32"),  # the processor is not good at it
        ({"fp32": 0, "int8": 0}, "cpu", {"asimddp"}, "int8"),
        ({"fp32": 0, "bf16": 0, "fp16": 0}, "cpu", {"avx512_vnni", "amx_bf16"}, "fp32"),
        ({"fp32": 0, "bf16": 0}, "openvino", {"amx_bf16"}, "bf16"),
        ({"fp32": 0, "bf16": 0}, "openvino", {"avx2"}, "fp32"),
        ({"fp32": 0, "fp16": 0, "int8": 0}, "cuda", {"avx512_vnni"}, "fp16"),
        ({"fp32": 0, "int8": 0}, "tensorrt", {"avx512_vnni"}, "fp32"),
    ],
)
def test_the_variant_is_the_fastest_that_parity_allows(make_bundle, losses, provider, flags, chosen):
    """Losses are points on the split that loses most."""
    manifest = read_bundle(make_bundle(losses=losses)).manifest

    assert choose_variant(manifest, provider, flags) == chosen


def test_what_is_asked_for_is_run_whatever_it_loses(make_bundle):
    """An operator may know better."""
    bundle = read_bundle(make_bundle(losses={"fp32": 0, "int8": 5}))

    assert open_engine(bundle, "int8", provider="cpu", threads=1).variant == "int8"
    assert open_engine(bundle, None, provider="cpu", threads=1).variant == "fp32"


@pytest.mark.parametrize("provider", ["cpu", "auto"])
def test_what_only_openvino_computes_is_not_computed_otherwise(make_bundle, provider):
    """The graphs of bf16 are those of fp32: they would run, and be called what they are not."""
    bundle = read_bundle(make_bundle(losses={"fp32": 0, "bf16": 0}))

    with pytest.raises(
        EngineError, match="variant 'bf16': CPUExecutionProvider would compute it in fp32; set RIDE_PROV"
    ):
        open_engine(bundle, "bf16", provider=provider, threads=1)


def test_the_process_survives_its_next_signal_after_openvino_engines_came_and_went(tmp_path):
    """Each core of OpenVINO gives the thread another stack for signal handlers, and takes it away when it goes."""
    pytest.importorskip("openvino")
    write_bundle(tmp_path, TinyModel())
    script = f"""
import os, signal
from pathlib import Path
from model_export.bundle import read_bundle
from service.engine import open_engine

signal.signal(signal.SIGTERM, lambda *_: print("handled"))
engines = [open_engine(read_bundle(Path({str(tmp_path)!r})), "fp32", provider="openvino", threads=1) for _ in range(4)]
while engines:
    del engines[0]
os.kill(os.getpid(), signal.SIGTERM)
"""
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)

    assert (done.returncode, done.stdout) == (0, "handled\n")
