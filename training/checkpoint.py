"""
Checkpoints: a directory each, complete or not there at all.

    runs/NAME/checkpoints/experts-0120/model.safetensors   weights
                                       learning.safetensors    with ema_decay: the weights that learn, to resume
                                       optimiser.safetensors   its state (momentum, ...), to resume
                                       checkpoint.json     recipe, class counts, metrics, commit
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from training.errors import TrainingError
from training.files import flush
from training.recipe import Decoding, Recipe

FORMAT = 1
MOMENTUM = "momentum_buffer"  # the state of SGD, kept under the number of its parameter alone


class CheckpointError(TrainingError, ValueError):
    """A checkpoint that is missing, damaged, or of another model."""


@dataclass(frozen=True)
class Checkpoint:
    """
    What a checkpoint's directory says of it.

    Attributes:
        path: its directory.
        stage, epochs_done: how far the training was.
        recipe: that made it.
        classes, class_counts: names and training images per class, in the order of the logits.
        mean, std: the normalisation that the network has in it.
        metrics: what the log says of its last epoch.
        commit: of the code.
        decoding: "resident" or "streamed": which of the two draws the augmentation.
        state: single numbers that a stage goes on with.
        images_digest: of the training images; empty where an older version wrote the checkpoint.
        unseen_digest: of the held-out and test images, likewise.
    """

    path: Path
    stage: str
    epochs_done: int
    recipe: Recipe
    classes: tuple[str, ...]
    class_counts: tuple[int, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    metrics: dict[str, Any]
    commit: str
    decoding: Decoding = "resident"
    state: dict[str, float] = field(default_factory=dict)
    images_digest: str = ""
    unseen_digest: str = ""

    def saw(self, images_digest: str) -> bool:
        """Whether it was trained on the images of this digest; taken for granted where an older version wrote it."""
        return self.images_digest in ("", images_digest)

    def other_images(self, classes: Sequence[str], class_counts: Sequence[int], images_digest: str) -> str | None:
        """In what the images that it was trained on differ from those that are there now; None where in nothing."""
        if self.classes != tuple(classes):
            odd = sorted(set(self.classes) ^ set(classes))
            return f"other classes ({', '.join(odd[:5]) or 'in another order'})"
        for name, before, now in zip(classes, self.class_counts, class_counts, strict=True):
            if before != now:
                return f"{before} of class {name!r}, {now} now"
        return None if self.saw(images_digest) else "as many, but some have changed or go by other names"

    def load_into(self, model: nn.Module, optimiser: torch.optim.Optimizer | None = None, *, only: str = "") -> None:
        """
        Set the weights of `model`, and the momentum of `optimiser`, to the checkpoint's.

        Where weights were averaged these are the averages without `optimiser`, and those that learn with it.

        Args:
            only: beginning of the names of the tensors that are taken; the others stay as they are.

        Raises:
            CheckpointError: naming the first missing, unknown or differently shaped tensor, with both shapes.
        """
        learning = self.path / "learning.safetensors"
        stored = _load(learning if optimiser is not None and learning.is_file() else self.path / "model.safetensors")
        expected = model.state_dict()
        for name in sorted(name for name in expected.keys() | stored.keys() if name.startswith(only)):
            has, wants = (tuple(d[name].shape) if name in d else None for d in (stored, expected))
            if has != wants:
                raise CheckpointError(
                    f"{self.path}: tensor {name} is {'missing' if has is None else has}, "
                    f"the model wants {'none' if wants is None else wants}"
                )
        model.load_state_dict(expected | {name: stored[name] for name in expected if name.startswith(only)})
        if optimiser is not None:
            parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
            for key, tensor in _load(self.path / "optimiser.safetensors").items():
                index, _, name = key.partition(".")
                parameter = parameters[int(index)]
                place = "cpu" if name == "step" else parameter.device  # where torch itself counts the steps
                optimiser.state[parameter][name or MOMENTUM] = tensor.to(place)


def save_checkpoint(
    run: Path, stage: str, epochs_done: int, model: nn.Module, optimiser: torch.optim.Optimizer | None,
    info: dict[str, Any], averaged: nn.Module | None = None,
) -> None:  # fmt: skip
    """
    Write a checkpoint beside the others of `run`; earlier ones of the same stage are then removed.

    The directory gets its name only when it is complete and on the disk, so a kill at any moment leaves the last one.

    Args:
        model: that learns.
        optimiser: None for a stage without steps.
        info: at least `recipe` (as Recipe.to_dict), `classes`, `class_counts`, `mean`, `std`, `metrics` and `commit`;
            `decoding`, `state`, `images_digest` and `unseen_digest`, to resume; anything else is for people.
        averaged: its averaged weights, where there are any: those that are evaluated and exported.

    Raises:
        OSError: where a file cannot be written.
    """
    directory = run / "checkpoints" / f"{stage}-{epochs_done:04d}"
    partial = directory.with_name(directory.name + ".partial")
    for leftover in directory.parent.glob("*.partial"):
        shutil.rmtree(leftover)
    partial.mkdir(parents=True)
    state: dict[str, Tensor] = {}
    if optimiser is not None:  # there is none where a stage was fitted in closed form, or taken from another run
        parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
        state = {
            str(index) if name == MOMENTUM else f"{index}.{name}": tensor.contiguous()
            for index, parameter in enumerate(parameters)
            for name, tensor in optimiser.state[parameter].items()
            if isinstance(tensor, Tensor)
        }
    for file_name, weights in (("model", averaged or model), ("learning", model if averaged is not None else None)):
        if weights is not None:
            tensors = {  # copies: experts may have layers in common, and a file cannot say so
                name: tensor.clone(memory_format=torch.contiguous_format)
                for name, tensor in weights.state_dict().items()
            }
            _save(tensors, partial / f"{file_name}.safetensors")
    _save(state, partial / "optimiser.safetensors")
    text = json.dumps({"format": FORMAT, "stage": stage, "epochs_done": epochs_done, **info}, indent=1)
    (partial / "checkpoint.json").write_text(text + "\n", encoding="utf-8")
    for file in (*partial.iterdir(), partial):
        flush(file)
    partial.rename(directory)
    flush(directory.parent)
    for older in directory.parent.glob(f"{stage}-*"):
        if _epochs_of(older) < epochs_done:
            _remove(older)


def read_checkpoint(path: Path) -> Checkpoint:
    """
    What checkpoint.json says; the weights are read by `load_into`.

    Raises:
        CheckpointError: naming the file, for one that is missing, damaged or of another format.
    """
    file = path / "checkpoint.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise CheckpointError(f"{file}: format {content['format']}, this version reads {FORMAT}")
        return Checkpoint(
            path=path, stage=content["stage"], epochs_done=content["epochs_done"],
            recipe=Recipe.from_dict(content["recipe"]), classes=tuple(content["classes"]),
            class_counts=tuple(content["class_counts"]), mean=_three(content["mean"]), std=_three(content["std"]),
            metrics=content["metrics"], commit=content["commit"],
            decoding=content.get("decoding", "resident"), state=content.get("state", {}),
            images_digest=content.get("images_digest", ""), unseen_digest=content.get("unseen_digest", ""),
        )  # fmt: skip
    except CheckpointError:
        raise
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: not a checkpoint of this program ({type(error).__name__}: {error})") from None


def checkpoints_of(run: Path) -> dict[str, Checkpoint]:
    """The newest checkpoint of each stage of a run, by stage; empty for a run that has none."""
    directories = [path for path in (run / "checkpoints").glob("*-[0-9]*") if path.suffix != ".partial"]
    directories.sort(key=lambda path: (path.name.rpartition("-")[0], _epochs_of(path)))
    return {checkpoint.stage: checkpoint for checkpoint in map(read_checkpoint, directories)}


def current_commit() -> str:
    """The commit of the checkout that runs, with "+" where files differ from it; outside a checkout the version."""
    here, this_file = Path(__file__).parent, Path(__file__).name

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", here, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", this_file)  # installed, it may lie inside somebody else's checkout
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "version " + metadata.version("ride-serving")


def _epochs_of(directory: Path) -> int:
    """Of a checkpoint's directory by its name; 0 where it is none."""
    digits = directory.name.rpartition("-")[2]
    return int(digits) if digits.isdecimal() else 0


def _remove(directory: Path) -> None:
    """A kill in between leaves what nobody takes for a checkpoint."""
    doomed = directory.rename(directory.with_name(directory.name + ".old.partial"))
    shutil.rmtree(doomed)


def _three(values: list[float]) -> tuple[float, float, float]:
    red, green, blue = values
    return red, green, blue


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    try:
        save_file(tensors, file)
    except SafetensorError as error:
        raise OSError(f"{file}: cannot be written ({error})") from error


def _load(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except Exception as error:  # safetensors raises its own class and OSErrors
        raise CheckpointError(f"{file}: cannot be read ({error})") from error
