"""A stage's steps against the same arithmetic, written out."""

import dataclasses
import json
import resource

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torchvision.ops import StochasticDepth

from training.data.sets import Images
from training.log import Log
from training.loop import DivergedError, run_stage
from training.methods.method import Model, Stage
from training.models.multi_expert import Outputs
from training.recipe import Recipe
from training.train import METHODS

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


def test_frozen_parts_are_in_evaluation_mode_but_for_batch_norms_that_follow(tmp_path):
    """A path that is dropped at random would be noise in features that nothing adapts to it."""
    frozen = nn.ModuleDict({"norm": nn.BatchNorm2d(2), "path": StochasticDepth(0.5, "row")})
    model = Model(nn.ModuleDict({"frozen": frozen, "head": nn.Linear(2, 1)}), None)
    modes = []

    def step(network, images, labels, *_):
        modes.append((frozen["norm"].training, frozen["path"].training, model.net["head"].training))
        zeros = torch.zeros(1, len(labels), 1)
        return Outputs(zeros, zeros), {"loss": model.net["head"].weight.square().sum()}

    images = Images(torch.zeros(4, 8, 8, 3, dtype=torch.uint8), torch.zeros(4, dtype=torch.long))
    log = Log.open(tmp_path, {})
    for follow in (False, True):
        stage = Stage(
            "t", 1, 4, model.net["head"], None, lambda labels, _: torch.arange(len(labels)), RATES.__getitem__,
            MOMENTUM, False, DECAY, step=step, norms_follow=follow,
        )  # fmt: skip
        run_stage(
            model, stage, images, images, RECIPE, start=None, run=tmp_path / str(follow), log=log,
            info={"recipe": RECIPE.to_dict()}, evaluate=lambda _: {},
        )  # fmt: skip
    log.close()

    assert modes == [(False, False, True), (True, False, True)]


def test_the_log_has_means_over_images(tmp_path):
    """Of five, in batches of two and three, a batch counts by its images; the experts are judged together."""
    model = Model(nn.Linear(2, 1, bias=False), None)

    def step(network, images, labels, *_):
        said = nn.functional.one_hot(labels * (labels < 3), 5).float()  # right for 0, 1 and 2
        logits = torch.stack([2 * said, nn.functional.one_hot(torch.zeros_like(labels), 5).float()])
        return Outputs(logits, logits), {"loss": labels.float().mean() + 0 * model.net.weight.sum()}

    stage = Stage(
        "t", 1, 2, model.net, None, lambda labels, _: torch.arange(len(labels)), lambda epoch: 0.1, 0.0, False, 0.0,
        step=step,
    )  # fmt: skip
    images = Images(torch.zeros(5, 8, 8, 3, dtype=torch.uint8), torch.arange(5))
    log = Log.open(tmp_path, {})
    run_stage(
        model, stage, images, images, RECIPE, start=None, run=tmp_path, log=log, info={"recipe": RECIPE.to_dict()},
        evaluate=lambda _: {},
    )  # fmt: skip
    log.close()

    (line,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert (line["stage"], line["epoch"], line["lr"]) == ("t", 1, 0.1)
    assert (line["loss"], line["accuracy"]) == pytest.approx((2, 60))


def test_a_full_disk_costs_no_line_of_the_log(tmp_path):
    """A resumed run drops lines of epochs that no checkpoint has; it keeps all where it cannot write the others."""
    file = tmp_path / "metrics.jsonl"
    lines = "".join(json.dumps({"stage": "experts", "epoch": epoch}) + "\n" for epoch in (1, 2, 3))
    file.write_text(lines, encoding="utf-8")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            Log.open(tmp_path, {"experts": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_text(encoding="utf-8") == lines

    Log.open(tmp_path, {"experts": 2}).close()
    assert file.read_text(encoding="utf-8").splitlines() == lines.splitlines()[:2]


def test_tensorboard_shows_an_epoch_that_is_trained_again_once(tmp_path):
    """As metrics.jsonl does: what no checkpoint has is dropped from both when the run goes on."""
    for done, epochs in ((0, (1, 2)), (1, (2, 3))):
        log = Log.open(tmp_path, {"experts": done})
        for epoch in epochs:
            log.write({"stage": "experts", "epoch": epoch, "loss": 10 * done + epoch})
        log.close()

    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(point.step, point.value) for point in board.Scalars("experts/loss")] == [(1, 1), (2, 12), (3, 13)]


@pytest.mark.parametrize("name", ["crt", "lfme", "oltr", "ride"])
def test_a_loss_that_is_no_number_names_the_rate_of_its_stage(name, tmp_path):
    """The experts' lr has no say in a stage with a rate of its own."""
    rates = {"crt": "retrain_lr", "lfme": "lfme_lr", "oltr": "oltr_lr", "ride": "router_lr"}
    n_experts = 2 if name == "ride" else 1
    recipe = dataclasses.replace(
        RECIPE, method="single" if name == "crt" else name, classifier="linear", n_experts=n_experts, image_size=8,
        backbone="resnet20_cifar", retrain_epochs=name == "crt", deferred_from=None, **{rates[name]: 0.25},
    )  # fmt: skip
    model, stages = METHODS[recipe.method](recipe, [200, 50, 10], (0.5,) * 3, (0.2,) * 3)
    own = stages[0 if name == "lfme" else -1]

    def step(network, images, labels, *_):
        loss = next(own.part.parameters()).sum() * float("nan")
        return Outputs(torch.zeros(1, len(labels), 3), torch.zeros(1, len(labels), 1)), {"loss": loss}

    images = Images(torch.zeros(4, 8, 8, 3, dtype=torch.uint8), torch.zeros(4, dtype=torch.long))
    own = dataclasses.replace(own, step=step, sampler=lambda labels, _: torch.arange(len(labels)))
    message = rf"{own.name}, epoch 1: the loss is nan; lower {rates[name]} \(0.25\) or lr \(0.1\)"
    with pytest.raises(DivergedError, match=message):
        run_stage(
            model, own, images, images, recipe, start=None, run=tmp_path, log=Log(tmp_path / "metrics.jsonl", None),
            info={}, evaluate=lambda _: {},
        )  # fmt: skip
