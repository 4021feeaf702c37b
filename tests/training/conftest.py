"""A small image set on which a training takes seconds."""

import numpy as np
import pytest
from PIL import Image

from training.__main__ import main


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Class folders of 16x16 PNGs with 40, 24, 12 and 6 images; each class has a colour and noise."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for label, count in enumerate((40, 24, 12, 6)):
        directory = root / f"class {label}"
        directory.mkdir()
        for index in range(count):
            pixels = generator.integers(0, 160, (16, 16, 3)) + np.array([90 * (label == c) for c in range(3)])
            Image.fromarray(pixels.astype(np.uint8)).save(directory / f"{index}.png")
    return root


@pytest.fixture(scope="session")
def tiny_arguments(folder):
    """`ride-train` on that set: three epochs, 16x16 input, no compilation."""
    settings = {
        "epochs": 3,
        "router_epochs": 2,
        "image_size": 16,
        "backbone": "resnet20_cifar",
        "batch_size": 16,
        "warmup_epochs": 1,
        "compile": "false",
    }
    settings |= {"evaluate_every": 1, "holdout_share": 0.2, "test_share": 0.2}
    overrides = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return ["ride-own", "--data", str(folder), *overrides]


@pytest.fixture(scope="session")
def sweep_arguments(folder):
    """`ride-train sweep` of a routed recipe and one with a single expert, two seeds: four runs of an epoch."""
    settings = {
        "epochs": 1,
        "router_epochs": 1,
        "image_size": 16,
        "backbone": "resnet20_cifar",
        "batch_size": 32,
        "warmup_epochs": 1,
        "compile": "false",
        "profile": "natural",
        "holdout_share": 0.2,
        "test_share": 0.2,
    }
    overrides = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return ["sweep", "ride-own", "ce-cifar100", "--seeds", "0,1", "--data", str(folder), *overrides]


@pytest.fixture(scope="session")
def swept(sweep_arguments, tmp_path_factory):
    """The directory of that sweep, finished; not to be changed."""
    out = tmp_path_factory.mktemp("sweeps") / "sweep"
    assert main([*sweep_arguments, "--out", str(out)]) == 0
    return out
