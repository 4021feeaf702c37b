"""What each mode gives, asked of a running service."""

import numpy as np
import pytest

from benchmarks.modes import measure, table
from service.operating_point import MODES
from tests.service.conftest import encode
from tests.tiny import CLASSES, TinyModel, noise


def test_the_answers_to_labelled_images_are_judged(tiny_bundle):
    """By the first class of each image, as a mean over classes, however many images each has."""
    images, model = noise(60, seed=3), TinyModel()
    best = np.array([model.answer(image, (0.0, 0.0)).probabilities.argmax() for image in images])
    labels = np.where(np.arange(len(best)) % 3, best, (best + 1) % len(CLASSES))  # a third is wrong
    right = {label: (best == labels)[labels == label].mean() for label in set(labels.tolist())}
    result = measure(tiny_bundle, [encode(image) for image in images], labels, rounds=1, seconds=0.1, seed=0)

    full, fast = result["answers"]["full"], result["answers"]["fast"]
    many = [right[label] for label in (0, 1, 2) if label in right]
    assert full["accuracy"]["all"] == pytest.approx(100 * np.mean(list(right.values())), abs=0.01)
    assert full["accuracy"]["many"] == pytest.approx(100 * np.mean(many), abs=0.01)
    assert full["mean_experts"] == 3 > fast["mean_experts"]
    assert full["mean_macs"] > fast["mean_macs"]
    assert all(load["rate"] > 0 and set(load["outcomes"]) == {"200"} for (load,) in result["loads"].values())
    assert [line.split("|")[1].strip() for line in table(result).splitlines()[2:]] == list(MODES)
