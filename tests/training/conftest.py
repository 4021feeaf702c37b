"""A small image set on which a training takes seconds."""

import numpy as np
import pytest
from PIL import Image


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
        "batch_size": 16,
        "warmup_epochs": 1,
        "compile": "false",
    }
    settings |= {"evaluate_every": 1, "holdout_share": 0.2, "test_share": 0.2}
    overrides = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return ["ride-own", "--data", str(folder), *overrides]
