"""Images that do not fit in memory are decoded by workers, to the same pixels whatever the workers do."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from training.__main__ import main
from training.checkpoint import checkpoints_of, save_checkpoint
from training.data.limits import available_cores, free_memory
from training.data.sets import DataError, Images, channel_statistics, load_data
from training.data.streamed import StreamedImages, fits_in_memory
from training.recipe import Recipe
from training.train import trained_model

STREAMS_AND_WAITS = """
import sys
from training.data.sets import load_data
from training.recipe import Recipe

recipe = Recipe("t", "single", data=sys.argv[1], profile="natural", image_size=256, decoding="streamed", workers=2)
batches = load_data(recipe).train.in_order(2)
next(batches)
print("streams", flush=True)
sys.stdin.read()
"""


def recipe_for(folder: Path, **fields: object) -> Recipe:
    """A recipe that reads the tiny set as it is."""
    return Recipe(name="t", method="single", data=str(folder), profile="natural", image_size=8, **fields)


def epoch_of(images: StreamedImages, batch_size: int = 16, seed: int = 5) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The batches of an epoch that visits the images in reverse."""
    order = torch.arange(len(images)).flip(0)
    return list(images.training_batches(order, batch_size, torch.Generator().manual_seed(seed)))


def test_streamed_images_are_the_resident_ones(folder):
    """Same split, labels, counts, pixels for evaluation, statistics."""
    resident, streamed = (load_data(recipe_for(folder, decoding=d, workers=0)) for d in ("resident", "streamed"))

    assert isinstance(resident.train, Images)
    assert (streamed.counts, streamed.decoding) == (resident.counts, "streamed")
    for part in ("train", "heldout", "test"):
        ours, theirs = getattr(streamed, part), getattr(resident, part)
        assert ours.labels.equal(theirs.labels)
        assert torch.cat(list(ours.in_order(7))).equal(theirs.pixels)
        assert ours.pixels.equal(theirs.pixels)
        assert ours.even_sample(5).equal(theirs.even_sample(5))
    assert channel_statistics(streamed.train) == channel_statistics(resident.train)


def test_training_images_are_the_same_where_others_are_fitted_otherwise(folder):
    """Padded crops are taken of the whole image, resident or not; evaluation sees an inner part of it."""
    fields = {"test_fit": "inner_crop", "workers": 0}
    resident, streamed = (load_data(recipe_for(folder, decoding=d, **fields)) for d in ("resident", "streamed"))

    for part in ("train", "heldout", "test"):
        assert getattr(streamed, part).pixels.equal(getattr(resident, part).pixels)
    assert not resident.train.pixels.equal(load_data(recipe_for(folder, crop="resized", **fields)).train.pixels)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_the_process_that_cannot_read_an_image_any_more_says_so(folder, rank, tmp_path, monkeypatch, capsys):
    """Of several it may be any; the others have only lost it."""

    def lose(recipe, run):
        images = load_data(recipe_for(tmp_path / "set", decoding="streamed", workers=0)).train
        shutil.rmtree(tmp_path / "set")
        next(images.in_order(4))

    shutil.copytree(folder, tmp_path / "set")
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr("training.train.train", lose)
    assert main(["ride-own", "--data", str(folder), "--out", str(tmp_path / "run")]) == 2
    assert "ride-train: images cannot be read any more:\n  " in capsys.readouterr().err


def test_an_epoch_does_not_depend_on_workers_or_batch_size(folder):
    """What is drawn for an image depends on the epoch's seed and its place in the order alone."""
    alone, shared = (load_data(recipe_for(folder, decoding="streamed", workers=n, rotation=30.0)).train for n in (0, 2))
    pixels, labels = (torch.cat(parts) for parts in zip(*epoch_of(alone), strict=True))

    assert labels.equal(alone.labels.flip(0))
    assert [len(batch) for batch, _ in epoch_of(alone, 50)] == [50, len(alone) - 50]
    for other in (epoch_of(shared), epoch_of(shared, 50)):
        assert torch.cat([batch for batch, _ in other]).equal(pixels)
    assert not torch.cat([batch for batch, _ in epoch_of(alone, seed=6)]).equal(pixels)


def test_an_image_that_is_drawn_twice_is_augmented_twice(folder):
    """As a class-balanced epoch draws rare images."""
    images = load_data(recipe_for(folder, decoding="streamed", workers=0)).train
    order = torch.zeros(20, dtype=torch.long)
    pixels, _ = next(images.training_batches(order, 20, torch.Generator().manual_seed(0)))

    assert len(pixels.unique(dim=0)) > 10


def test_views_without_augmentation_are_those_of_evaluation(folder):
    """The two sides of training see the same crop."""
    plain = recipe_for(folder, decoding="streamed", workers=0, crop_padding=0, flip=False)
    images = load_data(plain).train
    assert torch.cat([batch for batch, _ in epoch_of(images)]).equal(images.pixels.flip(0))


def test_sets_larger_than_a_quarter_of_the_memory_are_streamed(folder, monkeypatch):
    """The recipe may say otherwise; the processes of one machine share its memory."""
    recipe = recipe_for(folder, workers=0)
    bytes_of_all = 82 * 8 * 8 * 3
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for free, decoding in ((4 * bytes_of_all, "resident"), (4 * bytes_of_all - 1, "streamed")):
        monkeypatch.setattr("training.data.streamed.free_memory", lambda free=free: free)
        assert load_data(recipe).decoding == decoding
    assert load_data(dataclasses.replace(recipe, decoding="resident")).decoding == "resident"

    monkeypatch.setattr("training.data.streamed.free_memory", lambda: 4 * bytes_of_all)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert not fits_in_memory(82, recipe)
    monkeypatch.undo()
    assert 2**20 < free_memory() < 2**50


@pytest.mark.parametrize(
    ("quota", "expected"),
    [(None, 8), ("max 100000", 8), ("250000 100000", 2), ("10000 100000", 1), ("1600000 100000", 8)],
)
def test_a_container_that_may_use_few_processors_gets_few_workers(tmp_path, monkeypatch, quota, expected):
    """By the quota of its control group; it sees all processors of the machine."""
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(8)))
    if quota is not None:
        group = tmp_path / "sys" / "fs" / "cgroup"
        group.mkdir(parents=True)
        (group / "cpu.max").write_text(quota + "\n")
    assert available_cores(tmp_path) == expected


@pytest.mark.parametrize(("limit", "expected"), [(None, 9 << 30), ("max", 9 << 30), (str(8 << 30), 6 << 30)])
def test_pages_of_files_that_were_read_do_not_count_as_taken_memory(tmp_path, limit, expected):
    """A group that has 7 of its 8 GiB, 5 of them pages of files that were read once, can give 6."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text(f"MemTotal: {16 << 20} kB\nMemAvailable: {9 << 20} kB\n")
    if limit is not None:
        group = tmp_path / "sys" / "fs" / "cgroup"
        group.mkdir(parents=True)
        (group / "memory.max").write_text(limit + "\n")
        (group / "memory.current").write_text(f"{7 << 30}\n")
        (group / "memory.stat").write_text(f"anon {2 << 30}\ninactive_file {5 << 30}\n")

    assert free_memory(tmp_path) == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_is_damaged_while_training_is_named(folder, tmp_path, workers):
    """It was whole when the training began."""
    import shutil

    shutil.copytree(folder, tmp_path / "set")
    images = load_data(recipe_for(tmp_path / "set", decoding="streamed", workers=workers)).train
    victim = Path(images.source.images.name(int(images.positions[3])))
    victim.write_bytes(victim.read_bytes()[:50])

    with pytest.raises(DataError, match=rf"cannot be read any more:\n  .*{victim.name}: not a readable image"):
        epoch_of(images)


def test_a_streamed_training_resumes_as_it_began(folder, tmp_path, monkeypatch, capsys):
    """The same bits, with another number of workers, and also where the memory would now suffice."""
    settings = {
        "n_experts": 2, "epochs": 2, "router_epochs": 1, "image_size": 8, "batch_size": 27, "compile": "false",
        "holdout_share": 0.2, "test_share": 0.2, "warmup_epochs": 0,
    }  # fmt: skip
    call = ["ride-own", "--data", str(folder)]
    call += [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    monkeypatch.setattr("training.data.streamed.free_memory", lambda: 0)
    assert main([*call, "--set", "workers=0", "--out", str(tmp_path / "whole")]) == 0

    def save_and_end(*given: object) -> None:
        save_checkpoint(*given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("training.loop.save_checkpoint", save_and_end)
        assert main([*call, "--out", str(tmp_path / "killed")]) == 130
    monkeypatch.setattr("training.data.streamed.free_memory", lambda: 2**40)
    again = [*call, "--set", "workers=2", "--out", str(tmp_path / "killed"), "--resume"]
    assert main([*again, "--set", "decoding=resident"]) == 2
    assert "made with decoding=streamed (now resident)" in capsys.readouterr().err
    assert main(again) == 0

    ours, theirs = (
        load_file(tmp_path / run / "checkpoints" / "routers-0001" / "model.safetensors") for run in ("killed", "whole")
    )
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    assert checkpoints_of(tmp_path / "killed")["routers"].decoding == "streamed"
    results = [json.loads((tmp_path / run / "results.json").read_text()) for run in ("killed", "whole")]
    assert results[0]["experts"] == results[1]["experts"]
    assert trained_model(tmp_path / "killed")[0].stage == "routers"


def test_workers_of_a_killed_training_end(folder):
    """They are about to hand over what they decoded, which nobody takes any more, and have its standard output."""
    command = [sys.executable, "-c", STREAMS_AND_WAITS, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "streams\n"
        process.kill()
        process.communicate(timeout=60)
