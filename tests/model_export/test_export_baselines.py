"""Whatever stands in for a classifier or an expert's layers, the bundle says the same as the checkpoint."""

import dataclasses

import numpy as np
import pytest
import torch

from model_export.__main__ import main
from model_export.bundle import read_bundle
from model_export.parity import run_variant
from training.checkpoint import save_checkpoint
from training.data.sets import load_data
from training.methods.method import FitStage
from training.recipes import RECIPES
from training.train import METHODS, trained_model

LINEAR = {"loss": "ce", "classifier": "linear"}
BASELINES = {
    "lws": {"method": "single", **LINEAR, "retrain": "lws", "retrain_epochs": 1},
    "tau-norm": {"method": "single", **LINEAR, "retrain": "tau_norm", "retrain_epochs": 1, "tau": 0.7},
    "ncm": {"method": "single", **LINEAR, "retrain": "ncm", "retrain_epochs": 1, "ncm_features": "cl2n"},
    "bbn": {"method": "bbn", **LINEAR},
    "oltr": {"method": "oltr", **LINEAR},
}


def make_run(folder, directory, name):
    """A run as a finished training leaves it: random weights, lively running statistics, closed forms fitted."""
    fields = {"n_experts": 1, "reduced": False, "diversity_weight": 0.0, "deferred_from": None, "epochs": 1}
    recipe = dataclasses.replace(
        RECIPES["ride-own"],
        name=name,
        data=str(folder),
        image_size=16,
        backbone="resnet20_cifar",
        holdout_share=0.3,
        test_share=0.2,
        **fields | BASELINES[name],
    )
    data = load_data(recipe)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    torch.manual_seed(3)
    model, stages = METHODS[recipe.method](recipe, data.counts, mean, std)
    info = {
        "recipe": recipe.to_dict(), "classes": data.classes, "class_counts": data.counts, "mean": mean, "std": std,
        "commit": "0" * 40, "metrics": {},
    }  # fmt: skip
    with torch.no_grad():
        for _ in range(30):
            model.train().net(data.train.pixels)
        for stage in stages:
            if stage.arrange is not None:
                stage.arrange()
            if isinstance(stage, FitStage):
                model.eval()
                stage.fit(data.train, data.heldout)
            elif stage.name in ("classifiers", "memory"):
                for parameter in stage.part.parameters():  # so that nothing is as it was initialised
                    parameter.mul_(1 + 0.1 * torch.randn_like(parameter)).add_(0.01 * torch.randn_like(parameter))
            save_checkpoint(directory, stage.name, stage.epochs, model, None, info)
    return directory


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_is_exported_with_parity(name, image_folder, tmp_path):
    """One trunk and one expert, which say what the checkpoint says."""
    run = make_run(image_folder, tmp_path / "run", name)
    assert main([str(run), "-o", str(tmp_path / "bundle"), "--variants", "fp32"]) == 0

    manifest = read_bundle(tmp_path / "bundle").manifest
    _, model = trained_model(run)
    images = torch.randint(0, 256, (5, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model.net(images).expert_logits.numpy()
    found = run_variant(tmp_path / "bundle", manifest.variants["fp32"], images.numpy(), 3).expert_logits
    assert found.shape == (1, 5, 3)
    np.testing.assert_allclose(found, logits, atol=1e-3)
    assert logits.std() > 1e-3
