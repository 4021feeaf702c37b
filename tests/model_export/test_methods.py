"""Every multi-expert method is trained, exported and served with routers, and its bundle answers as its checkpoint."""

import dataclasses

import numpy as np
import pytest

from model_export.__main__ import main
from model_export.bundle import read_bundle
from model_export.parity import MAX_LOGIT_DIFFERENCE, run_variant
from training.data.sets import load_data
from training.evaluate import predict
from training.recipes import RECIPES
from training.train import train, trained_model

FIELDS = {
    "shike": {"retrain_epochs": 1, "warmup_epochs": 0, "n_experts": 2},
    "sade": {"backbone": "resnet20_cifar"},
    "ace": {"backbone": "resnet20_cifar", "group_shares": (0.67, 0.33), "router_shared": False},
}


@pytest.mark.parametrize("method", FIELDS)
def test_a_trained_model_is_exported_and_its_bundle_answers_as_its_checkpoint(method, image_folder, tmp_path):
    """All stages run; trunk, experts and routers are there; calibrated; logits and scores agree on unseen images."""
    recipe = dataclasses.replace(
        RECIPES[f"{method}-cifar100"], data=str(image_folder), profile="natural", image_size=16, holdout_share=0.3,
        test_share=0.2, epochs=1, router_epochs=1, batch_size=8, lr=0.01, compile=False, precision="fp32",
        **FIELDS[method],
    )  # fmt: skip
    results = train(recipe, tmp_path / "run")
    assert main([str(tmp_path / "run"), "-o", str(tmp_path / "bundle"), "--variants", "fp32"]) == 0

    manifest = read_bundle(tmp_path / "bundle").manifest
    variant = manifest.variants["fp32"]
    assert results["routed"].keys() >= {"mean_experts", "experts_share"}
    experts = recipe.n_experts
    assert (len(variant.experts), len(variant.routers), len(manifest.thresholds)) == (experts, experts - 1, experts - 1)
    assert variant.parity.max_abs_logit_difference <= MAX_LOGIT_DIFFERENCE
    assert variant.parity.experts_used_agreement == 1
    assert {point.mean_experts for point in manifest.calibration.points} >= {1.0, float(experts)}
    assert manifest.provenance["recipe"]["method"] == method

    _, model = trained_model(tmp_path / "run")
    model.routers.temperature = manifest.provenance["router_temperature"]
    test = load_data(recipe).test
    expected = predict(model, test)
    found = run_variant(tmp_path / "bundle", variant, test.pixels.numpy(), 3)
    np.testing.assert_allclose(found.expert_logits, expected.expert_logits, atol=1e-3)
    np.testing.assert_allclose(found.router_scores, expected.router_scores, atol=1e-4)
