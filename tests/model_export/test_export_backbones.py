"""Nets for large images are exported and served like the CIFAR ones, whatever the rank of their features."""

import asyncio

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from model_export.__main__ import main
from model_export.bundle import read_bundle
from model_export.parity import MAX_LOGIT_DIFFERENCE, run_variant
from tests.model_export.conftest import make_run
from tests.service.conftest import start
from training.data import views
from training.models import backbones
from training.models.backbones import BACKBONES
from training.models.swin import Swin
from training.train import trained_model

SIZE = 64


@pytest.fixture(scope="module")
def tiny_swin():
    """A Swin transformer of few numbers under the name of a large one."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(BACKBONES, "swin_t", backbones._swin(Swin((1, 2, 1, 1), width=12), "swin_t"))
        yield


@pytest.fixture(scope="module", params=["resnet10", "swin_t"])
def run_and_bundle(request, image_folder, tiny_swin, tmp_path_factory):
    """A finished run of two experts at 64 pixels, and what ride-export makes of it."""
    root = tmp_path_factory.mktemp(request.param)
    run = make_run(image_folder, root / "run", backbone=request.param, n_experts=2, image_size=SIZE,
                   crop="resized", test_fit="inner_crop")  # fmt: skip
    assert main([str(run), "-o", str(root / "bundle"), "--variants", "fp32"]) == 0
    return run, root / "bundle"


@pytest.mark.parametrize("batch", [1, 3])
def test_graphs_give_the_logits_of_the_checkpoint(run_and_bundle, batch):
    """Any batch size; the bundle was compared with the checkpoint before it was written."""
    run, bundle = run_and_bundle
    manifest = read_bundle(bundle).manifest
    _, model = trained_model(run)
    images = torch.randint(0, 256, (batch, SIZE, SIZE, 3), dtype=torch.uint8)
    with torch.no_grad():
        expected = model.net(images).expert_logits

    found = run_variant(bundle, manifest.variants["fp32"], images.numpy(), 3)

    np.testing.assert_allclose(found.expert_logits, expected.numpy(), atol=1e-3)
    assert manifest.variants["fp32"].parity.max_abs_logit_difference <= MAX_LOGIT_DIFFERENCE
    assert manifest.input.fit == "inner_crop"


def test_features_have_the_backbones_own_shape(run_and_bundle):
    """Channels first after a ResNet's stages, last after a transformer's; only the batch axis is free."""
    _, bundle = run_and_bundle
    manifest = read_bundle(bundle).manifest
    (features,) = manifest.variants["fp32"].trunk.outputs
    swin = manifest.provenance["recipe"]["backbone"] == "swin_t"

    assert features.shape == ((None, 4, 4, 36) if swin else (None, 128, 8, 8))
    graph = onnx.load(bundle / "trunk.onnx").graph
    assert [axis.dim_param or axis.dim_value for axis in graph.output[0].type.tensor_type.shape.dim[1:]] == [
        *features.shape[1:]
    ]


def test_the_service_answers_as_the_checkpoint_does(run_and_bundle):
    """Three images of another size and shape, through the whole service, experts' features held between its steps."""
    run, bundle = run_and_bundle
    generator = np.random.default_rng(5)
    images = [generator.integers(60 * index, 60 * index + 120, (80, 120, 3), dtype=np.uint8) for index in range(3)]

    async def ask():
        async with start(bundle) as running:
            return await running.answer(*images)

    answers = asyncio.run(ask())

    checkpoint, model = trained_model(run)
    seen = np.stack([views.evaluation_view(Image.fromarray(image), checkpoint.recipe) for image in images])
    with torch.no_grad():
        expert_logits = model.net(torch.from_numpy(seen)).expert_logits
    for index, answer in enumerate(answers):
        probabilities = torch.softmax(expert_logits[: answer["experts_used"], index].mean(dim=0), dim=0)
        best = answer["predictions"][0]
        assert best["index"] == int(probabilities.argmax())
        assert best["probability"] == pytest.approx(float(probabilities.max()), abs=1e-4)
