"""Trainings larger than one process, one batch in memory, or one set of weights."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.training.small_training import CASES, NORM_IN_PARTS, weights_after
from training.__main__ import main
from training.average import WeightAverage
from training.checkpoint import checkpoints_of, save_checkpoint
from training.device import autocast_dtype, refuse_without_compiler
from training.in_parts import InParts
from training.loop import forward_of
from training.methods.method import Model
from training.models.multi_expert import Outputs
from training.recipe import Recipe, RecipeError
from training.recipes import RECIPES
from training.train import METHODS, trained_model

TWO_EXPERTS = {
    "n_experts": 2, "epochs": 2, "router_epochs": 1, "image_size": 8, "batch_size": 27, "warmup_epochs": 0,
    "compile": "false", "evaluate_every": 1, "holdout_share": 0.2, "test_share": 0.2, "deferred_from": 0.5,
    "precision": "fp32",
}  # fmt: skip

SHARED = {"lr": 1e-5, "ema_decay": 0.5, "decoding": "streamed", "workers": 1}


def arguments(folder: Path, **fields: object) -> list[str]:
    """`ride-train ride-own` on the tiny set: two experts, two epochs of two steps, one of the router."""
    overrides = [part for key, value in (TWO_EXPERTS | fields).items() for part in ("--set", f"{key}={value}")]
    return ["ride-own", "--data", str(folder), *overrides]


def two_processes(call: list[str]) -> list[subprocess.Popen[str]]:
    """`ride-train` in two processes as torchrun would start them, a thread each, but without its watch over them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "training", *call], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            env=os.environ | meeting | {"RANK": rank, "LOCAL_RANK": rank},
        )
        for rank in ("0", "1")
    ]  # fmt: skip


def losses_of(run: Path) -> list[float]:
    """The loss of every epoch."""
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def same_tensors(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    """To the bit."""
    return ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def shared_run(folder, tmp_path_factory):
    """Two processes under torchrun: the run of an undisturbed training, the steps of a small net, what was printed."""
    root = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "tests.training.small_training", str(root / "steps.pt")]
    command += [*arguments(folder, **SHARED), "--out", str(root / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return root / "run", torch.load(root / "steps.pt"), done.stdout


def test_two_processes_make_the_steps_of_one(shared_run):
    """
    In double precision losses and weights agree to rounding: with batch norm, which sees all rows; under a loss that is
    normalised by the batch's class weights, with a teacher; for a parameter that the loss uses beside the network; in
    parts, too.
    """
    for norm, parts in CASES:
        losses, weights = weights_after(8, norm)
        for of_one in shared_run[1]:
            assert of_one[norm, parts][0] == pytest.approx(losses, abs=1e-12)
            torch.testing.assert_close(of_one[norm, parts][1], weights, rtol=0, atol=1e-12)
        assert len({round(loss, 6) for loss in losses}) == 8


def test_processes_with_unequal_rows_take_equally_many_parts(shared_run):
    """Their batch norms meet in each part, and one part more would be waited for for ever."""
    one, other = (steps[NORM_IN_PARTS] for steps in shared_run[1])

    assert one[0] == other[0]
    torch.testing.assert_close(one[1], other[1], rtol=0, atol=0)


def test_processes_agree_on_gradients_and_refusals(shared_run):
    """The mean of what each has found; what the first raises, whose work the others wait for, is raised in all."""
    assert [(of_one["gradient"], of_one["refused"]) for of_one in shared_run[1]] == [(1.5, "process 0 refuses")] * 2


def test_a_training_by_two_processes_has_the_losses_of_one(folder, shared_run, tmp_path):
    """Every stage of RIDE, in fp32, each decoding its own images; the first process alone prints, logs and writes."""
    run, _, output = shared_run
    assert main([*arguments(folder, **SHARED), "--out", str(tmp_path / "one")]) == 0

    assert losses_of(run) == pytest.approx(losses_of(tmp_path / "one"), rel=1e-4)
    assert output.count("| experts | all") == 1
    assert json.loads((run / "results.json").read_text())["processes"] == 2


def test_a_killed_process_ends_the_others_and_the_run_resumes_to_the_same_bits(folder, shared_run, tmp_path):
    """kill -9 of one of two: the other says what happened and what to do, and that is enough."""
    run = tmp_path / "killed"
    call = [*arguments(folder, **SHARED), "--out", str(run)]
    first, second = two_processes(call)
    while not list(run.glob("checkpoints/experts-000?")):
        assert first.poll() is None, "it ended before its first checkpoint"
        time.sleep(0.01)
    second.kill()
    errors = first.communicate(timeout=600)[1]
    second.communicate()
    assert first.returncode == 2
    assert "ride-train: process 0 of 2 lost the others" in errors
    assert "with --resume" in errors
    assert not (run / "results.json").exists(), "killed too late to show anything"

    for process in two_processes([*call, "--resume"]):
        process.communicate(timeout=600)
        assert process.returncode == 0
    last = Path("checkpoints", "routers-0001", "model.safetensors")
    assert same_tensors(load_file(run / last), load_file(shared_run[0] / last))
    assert losses_of(run) == losses_of(shared_run[0])


def test_a_batch_in_parts_makes_the_step_of_the_whole():
    """Without batch norm: the loss, normalised by the weights of the whole batch, and all weights agree to rounding."""
    losses, weights = weights_after(8, norm=False)
    in_parts, weights_in_parts = weights_after(8, norm=False, accumulate=4)

    assert in_parts == pytest.approx(losses, abs=1e-12)
    torch.testing.assert_close(weights_in_parts, weights, rtol=0, atol=1e-12)


def test_parts_have_two_rows_at_least_and_their_activations_are_forgotten():
    """Each is computed once more for its gradient; without one it is not."""

    class Counted(nn.Linear):
        def forward(self, rows):
            seen.append(len(rows))
            return Outputs(super().forward(rows).unsqueeze(0), rows.unsqueeze(0))

    seen = []
    network = InParts(Counted(3, 2), 4)
    with torch.no_grad():
        network(torch.rand(9, 3), 9)
        network(torch.rand(5, 3), 5)
        network(torch.rand(1, 3), 1)
        network(torch.rand(4, 3), 3)  # another process has three rows, too few for two parts
    assert seen == [3, 2, 2, 2, 3, 2, 1, 4]

    seen.clear()
    network(torch.rand(4, 3), 4).expert_logits.sum().backward()
    assert seen == [2] * 4


def test_batch_norms_see_a_batch_in_parts_once():
    """They differ from the whole batch's, as documented; what is computed again for the gradient is not counted."""
    losses, _ = weights_after(8, norm=True)
    in_parts, weights = weights_after(8, norm=True, accumulate=4)

    assert in_parts != pytest.approx(losses, abs=1e-3)
    assert weights["net.norm.num_batches_tracked"] == 4 * 8


def test_the_average_of_weights_follows_its_formula():
    """Against the recursion written out, batch-norm statistics included; counters are those of the newest weights."""
    model, _ = METHODS["single"](Recipe(name="t", method="single"), (3, 2), (0.5,) * 3, (0.2,) * 3)
    average = WeightAverage(model, decay=0.3)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for step in range(5):
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.add_(1 + step)
        average.update(model)
        decay = min(0.3, (1 + step) / (10 + step))
        for name, tensor in model.state_dict().items():
            whole = not tensor.is_floating_point()
            expected[name] = tensor.clone() if whole else decay * expected[name] + (1 - decay) * tensor

    torch.testing.assert_close(average.model.state_dict(), expected)
    assert any("running_var" in name for name in expected)


def test_layers_that_experts_have_in_common_are_averaged_once():
    """They stand under two names in what is saved."""
    model, _ = METHODS["ride"](Recipe(name="t", method="ride", n_experts=2), (3, 2), (0.5,) * 3, (0.2,) * 3)
    model.net.experts[1].layers[0] = model.net.experts[0].layers[0]
    average = WeightAverage(model, decay=0.5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    average.update(model)

    for name, _ in model.named_parameters(remove_duplicate=False):
        torch.testing.assert_close(average.model.state_dict()[name], before[name] + 0.9)


@pytest.fixture(scope="module")
def averaged_run(folder, tmp_path_factory):
    """A training with averaged weights and batches in parts that nobody disturbed."""
    run = tmp_path_factory.mktemp("runs") / "averaged"
    assert main([*arguments(folder, ema_decay=0.9, accumulate=2), "--out", str(run)]) == 0
    return run


def test_the_averaged_weights_are_evaluated_and_exported(averaged_run):
    """model.safetensors is the average, learning.safetensors is not; the routers learn on top of the average."""
    experts = averaged_run / "checkpoints" / "experts-0002"
    averaged, learning = (load_file(experts / f"{name}.safetensors") for name in ("model", "learning"))
    moved = {name for name in averaged if not averaged[name].equal(learning[name])}
    assert "net.trunk.layers.0.weight" in moved
    assert "net.trunk.layers.1.running_mean" in moved

    checkpoint, model = trained_model(averaged_run)
    final = model.state_dict()
    assert all(final[name].equal(averaged[name]) for name in averaged if name.startswith("net."))
    assert not final["routers.output.weight"].equal(averaged["routers.output.weight"])
    assert checkpoint.state["updates"] > 0


def test_averages_and_parts_resume_to_the_same_bits(folder, averaged_run, tmp_path, monkeypatch):
    """What is on the disk when a training ends within its second epoch is enough to go on."""
    run = tmp_path / "killed"
    call = [*arguments(folder, ema_decay=0.9, accumulate=2), "--out", str(run)]

    def save_and_end(*given: object) -> None:
        save_checkpoint(*given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("training.loop.save_checkpoint", save_and_end)
        assert main(call) == 130
    assert checkpoints_of(run).keys() == {"experts"}
    assert main([*call, "--resume"]) == 0

    for stage, epochs in (("experts", 2), ("routers", 1)):
        for name in ("model", "learning", "optimiser"):
            file = Path("checkpoints", f"{stage}-{epochs:04d}", f"{name}.safetensors")
            assert same_tensors(load_file(run / file), load_file(averaged_run / file))
    assert checkpoints_of(run)["routers"].state == checkpoints_of(averaged_run)["routers"].state


def test_fp16_is_refused_on_a_cpu(folder, tmp_path, capsys, monkeypatch):
    """Before anything is read, with what is possible."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([*arguments(folder, precision="fp16"), "--out", str(tmp_path / "run")]) == 2
    assert "precision='fp16': needs a CUDA device, and there is none here; take bf16" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_compiling_on_a_cpu_needs_a_compiler(folder, tmp_path, capsys, monkeypatch):
    """Told before anything is read, with the way out."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main([*arguments(folder, compile="true"), "--out", str(tmp_path / "run")]) == 2
    message = "ride-train: compile=True: needs a C++ compiler (g++); install one, or --set compile=false\n"
    assert capsys.readouterr().err == message
    assert not (tmp_path / "run").exists()
    with pytest.raises(RecipeError, match=r"install one$"):  # a run that goes on keeps its recipe
        refuse_without_compiler(RECIPES["ride-cifar100"], torch.device("cpu"), resumed=True)


def test_the_compiler_is_the_one_that_the_environment_names(monkeypatch):
    """With a launcher before it, too, which is the program that runs; a GPU needs none of them."""
    recipe = RECIPES["ride-cifar100"]
    monkeypatch.setenv("CXX", f"{sys.executable} g++")
    refuse_without_compiler(recipe, torch.device("cpu"), resumed=False)

    monkeypatch.setenv("CXX", "nowhere-g++ -O2")
    refuse_without_compiler(recipe, torch.device("cuda"), resumed=False)
    with pytest.raises(RecipeError, match=r"needs a C\+\+ compiler \(nowhere-g\+\+\); install one"):
        refuse_without_compiler(recipe, torch.device("cpu"), resumed=False)


@pytest.mark.parametrize(
    ("capability", "avx", "on_gpu", "on_cpu"),
    [((7, 5), False, None, None), ((8, 0), True, torch.bfloat16, torch.bfloat16)],
)
def test_a_device_with_units_for_bf16_computes_in_it_unless_told_otherwise(
    monkeypatch, capability, avx, on_gpu, on_cpu
):
    """From Ampere on, or with AVX-512 bf16; fp32 and bf16 are what they say on either."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
    devices = torch.device("cuda"), torch.device("cpu")
    of = {
        precision: [
            autocast_dtype(Recipe(name="t", method="single", precision=precision), device) for device in devices
        ]
        for precision in ("auto", "bf16", "fp32")
    }

    assert of == {"auto": [on_gpu, on_cpu], "bf16": [torch.bfloat16] * 2, "fp32": [None] * 2}


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_the_network_computes_in_the_precision_of_the_recipe(precision, dtype):
    """Its convolutions do; logits are fp32 in either case."""
    recipe = dataclasses.replace(
        RECIPES["ride-cifar100"], precision=precision, compile=False, n_experts=1, diversity_weight=0.0
    )
    model, stages = METHODS["ride"](recipe, (3, 2), recipe.mean, recipe.std)
    seen = []
    model.net.trunk.layers[0].register_forward_hook(lambda *call: seen.append(call[2].dtype))

    outputs = forward_of(model, stages[0], recipe)(torch.zeros(2, 8, 8, 3, dtype=torch.uint8))

    assert seen == [dtype]
    assert outputs.expert_logits.dtype == torch.float32


def test_a_scaled_loss_makes_the_same_step():
    """The scale, a power of two here, is taken out of the gradients again before the step."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    losses, weights = weights_after(8, norm=True)
    scaled, weights_scaled = weights_after(8, norm=True, scaler=scaler)

    assert scaled == pytest.approx(losses, abs=1e-12)
    torch.testing.assert_close(weights_scaled, weights, rtol=0, atol=1e-12)
    assert scaler.state_dict()["_growth_tracker"] == 8


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_any_optimiser_goes_on_from_its_checkpoint(tmp_path, kind):
    """Two steps, a checkpoint, two more: to the bit what four steps are."""
    recipe = Recipe(name="t", method="single")

    def fresh() -> tuple[Model, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = METHODS["single"](recipe, (3, 2), (0.5,) * 3, (0.2,) * 3)[0]
        return model, kind(model.parameters(), 0.1, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))

    def step(model: Model, optimiser: torch.optim.Optimizer, times: int) -> None:
        for _ in range(times):
            optimiser.zero_grad()
            sum((parameter**3).sum() for parameter in model.parameters()).backward()
            optimiser.step()

    whole, optimiser = fresh()
    step(whole, optimiser, 2)
    info = {"recipe": recipe.to_dict(), "classes": ["a", "b"], "class_counts": [3, 2], "metrics": {}, "commit": ""}
    save_checkpoint(tmp_path, "experts", 1, whole, optimiser, info | {"mean": (0.5,) * 3, "std": (0.2,) * 3})
    step(whole, optimiser, 2)

    resumed, optimiser = fresh()
    checkpoints_of(tmp_path)["experts"].load_into(resumed, optimiser)
    step(resumed, optimiser, 2)
    assert same_tensors(resumed.state_dict(), whole.state_dict())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="loss scaling needs a CUDA device")
def test_fp16_learns_with_a_scaled_loss(folder, tmp_path):
    """The scale is in the checkpoint; the loss is that of fp32 to the digits that fp16 has."""
    for precision in ("fp16", "fp32"):
        call = arguments(folder, precision=precision, lr=1e-5)
        assert main([*call, "--out", str(tmp_path / precision)]) == 0
    assert losses_of(tmp_path / "fp16")[0] == pytest.approx(losses_of(tmp_path / "fp32")[0], rel=2e-2)
    assert checkpoints_of(tmp_path / "fp16")["experts"].state["scale"] > 1


def test_more_parts_than_images_are_refused():
    """The message names the fields. Routers learn on frozen features, which are never taken in parts."""
    with pytest.raises(RecipeError, match="accumulate=200: must be at most batch_size=128"):
        dataclasses.replace(RECIPES["ride-cifar100"], accumulate=200)
    dataclasses.replace(RECIPES["ride-cifar100"], router_batch_size=64, accumulate=100)
