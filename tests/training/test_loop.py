"""A stage's steps against the same arithmetic, written out."""

import dataclasses
import errno
import os

import numpy as np
import pytest
import torch
from torch import nn

from training.data.sets import Images
from training.loop import Log, run_stage
from training.methods.method import Model, Stage
from training.models.multi_expert import Outputs
from training.recipe import Recipe

RATES = (0.1, 0.3, 0.02)  # of three epochs of two steps
MOMENTUM, DECAY, AVERAGE = 0.8, 0.1, 0.5
START, AIM = np.array([1.0, -2.0]), np.array([0.5, 3.0])
RECIPE = Recipe(
    name="t", method="single", deferred_from=0.0, batch_size=2, router_batch_size=2, precision="fp32", compile=False
)


def by_hand(nesterov):
    """The weights after the last step of SGD on |weights - AIM|^2 / 2, and their average."""
    weights, velocity, average = START, 0.0, START
    for step in range(2 * len(RATES)):
        gradient = weights - AIM + DECAY * weights
        velocity = MOMENTUM * velocity + gradient
        weights = weights - RATES[step // 2] * (gradient + MOMENTUM * velocity if nesterov else velocity)
        kept = min(AVERAGE, (1 + step) / (10 + step))
        average = kept * average + (1 - kept) * weights
    return weights, average


def test_a_full_disk_leaves_the_log_as_it_was(tmp_path, monkeypatch):
    """A resumed run drops lines of its log, and keeps all of them until the others are on the disk."""

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    file = tmp_path / "metrics.jsonl"
    file.write_text(lines := "".join(f'{{"stage": "t", "epoch": {epoch}}}\n' for epoch in (1, 2, 3)))
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            Log.open(tmp_path, {"t": 2})
    assert file.read_text() == lines
    Log.open(tmp_path, {"t": 2}).close()
    assert file.read_text().count("epoch") == 2


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("averaged", [False, True])
def test_rates_momentum_decay_and_average_are_the_stages(nesterov, averaged, tmp_path):
    """Also in the second and third epoch, each with a rate of its own; the model ends with what is asked for."""
    model = Model(nn.Linear(2, 1, bias=False), None)
    model.net.weight.data = torch.tensor(START, dtype=torch.float32).unsqueeze(0)

    def step(network, images, labels, *_):
        loss = 0.5 * (model.net.weight - torch.tensor(AIM, dtype=torch.float32)).square().sum()
        return Outputs(torch.zeros(1, len(labels), 1), torch.zeros(1, len(labels), 1)), {"loss": loss}

    stage = Stage(
        "t", len(RATES), 2, model.net, None, lambda labels, _: torch.arange(len(labels)), RATES.__getitem__, MOMENTUM,
        nesterov, DECAY, step=step,
    )  # fmt: skip
    images = Images(torch.zeros(4, 8, 8, 3, dtype=torch.uint8), torch.zeros(4, dtype=torch.long))
    log = Log.open(tmp_path, {})
    run_stage(
        model, stage, images, images, dataclasses.replace(RECIPE, ema_decay=AVERAGE if averaged else None),
        start=None, run=tmp_path, log=log, info={"recipe": RECIPE.to_dict()}, evaluate=lambda _: {},
    )  # fmt: skip
    log.close()

    assert model.net.weight.detach().numpy()[0] == pytest.approx(by_hand(nesterov)[averaged], rel=1e-5)
