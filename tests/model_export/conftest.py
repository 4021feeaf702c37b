"""A model of the right shape with random weights, wrapped as a finished run."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from model_export.__main__ import main
from model_export.bundle import Graphs, read_bundle
from training.checkpoint import save_checkpoint
from training.data.sets import load_data
from training.evaluate import Predictions
from training.methods.method import build_model
from training.recipes import RECIPES


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """Three classes of noise, 30, 12 and 8 images."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for label, count in enumerate((30, 12, 8)):
        (root / f"class {label}").mkdir()
        for index in range(count):
            pixels = generator.integers(60 * label, 60 * label + 120, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"class {label}" / f"{index}.png")
    return root


def make_run(folder, directory, **fields):
    """A run directory as a finished training leaves it, with random weights and lively running statistics."""
    recipe = dataclasses.replace(
        RECIPES["ride-own"], data=str(folder), holdout_share=0.3, test_share=0.2, epochs=1, router_epochs=1,
        **{"image_size": 16, "backbone": "resnet20_cifar"} | fields,
    )  # fmt: skip
    data = load_data(recipe)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    torch.manual_seed(3)
    model = build_model(recipe, 3, mean, std)
    model.train()
    with torch.no_grad():
        for _ in range(3):
            outputs = model.net(data.train.pixels)
        if model.routers is not None:  # so that images differ in how many experts they use
            asked = model.eval().routers(outputs)
            model.routers.output.weight.mul_(1 / asked.std())
            model.routers.output.bias.sub_((asked / asked.std()).mean() - model.routers.output.bias)
    info = {
        "recipe": recipe.to_dict(), "classes": data.classes, "class_counts": data.counts, "mean": mean, "std": std,
        "commit": "0" * 40, "metrics": {}, "images_digest": data.digest,
    }  # fmt: skip
    for stage, part in (("experts", model.net), ("routers", model.routers)):
        if part is not None:
            optimiser = torch.optim.SGD(part.parameters(), 0.1, momentum=0.9)
            for parameter in part.parameters():
                optimiser.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            save_checkpoint(directory, stage, 1, model, optimiser, info)
    return directory


@pytest.fixture(scope="session")
def run(image_folder, tmp_path_factory):
    """A finished run of three experts."""
    return make_run(image_folder, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="session")
def exported(run, tmp_path_factory):
    """The run's bundle with all variants, as the command writes it."""
    target = tmp_path_factory.mktemp("bundles") / "bundle"
    assert main([str(run), "-o", str(target), "--name", "noise", "--version", "7"]) == 0
    return target


@pytest.fixture
def traced(exported, monkeypatch):
    """An export of `run` takes the graphs of `exported`: traced anew, which takes long, they are the same bytes."""
    variants = read_bundle(exported).manifest.variants

    def write_graphs(model, images, precisions, directory):
        chosen = [variants[precision] for precision in precisions]
        for variant in chosen:
            for graph in (variant.trunk, *variant.experts, *variant.routers):
                (directory / graph.file).write_bytes((exported / graph.file).read_bytes())
        return [Graphs(one.precision, one.trunk, one.experts, one.routers) for one in chosen]

    monkeypatch.setattr("model_export.export.write_graphs", write_graphs)


@pytest.fixture
def predictions():
    """Make predictions of three experts of which later ones know more, and of routers that know nothing."""

    def make(seed=0, n_images=400, n_experts=3):
        generator = np.random.default_rng(seed)
        labels = generator.integers(0, 4, n_images)
        logits = generator.normal(0, 1, (n_experts, n_images, 4)).astype(np.float32)
        logits[:, np.arange(n_images), labels] += np.linspace(0.5, 1.5, n_experts, dtype=np.float32)[:, None]
        return Predictions(logits, generator.uniform(0, 1, (n_experts - 1, n_images)).astype(np.float32), labels)

    return make
