"""The weights of an earlier training, ours or of others on more images, as the beginning of a training."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn

from training.checkpoint import CheckpointError
from training.data.sources import unnamed_classes
from training.models.backbones import BACKBONES
from training.models.multi_expert import MultiExpertNet
from training.recipe import Recipe

HEADS = ("fc.", "head.")  # classifiers, of other classes than ours
LAYERS = ".layers."  # in the names of all that is no classifier
TORCH_PREAMBLE = "WeightsUnpickler error:"  # ends its advice to run the code in a file
COUNTERS = "num_batches_tracked"  # which older files lack


def start_from(
    net: MultiExpertNet, recipe: Recipe, images_digest: str = "", classes: Sequence[str] = ()
) -> dict[str, Any]:
    """
    Set the trunk and every expert of `net` to the weights that `recipe.pretrained` names, stage by stage.

    A stage is taken whole or, where the recipe's is of another width, not at all; classifiers stay fresh. All experts
    begin with the same layers: only their classifiers tell them apart. From a run of ours each expert takes those of
    the expert with its number, and all of them must fit.

    Args:
        net: of the recipe's backbone, with fresh weights; changed in place.
        images_digest, classes: of the images that it will be trained on.

    Returns:
        "source"; "taken" and "fresh": names of the net's tensors, in its order.

    Raises:
        CheckpointError: for weights that torchvision does not have, a file that cannot be read, or one that is not of
            the backbone at full width, with the first differing tensor and both shapes, or none of whose tensors has a
            place in the net. For a run that is not finished, has other layers, or had other images of the same set
            or of the same classes: what is held out or tested here may be among them.
    """
    if Path(str(recipe.pretrained)).is_dir():
        return _from_run(net, recipe, images_digest, classes)
    source, weights = _read(recipe)
    _refuse_other_backbone(source, weights, recipe)
    taken: list[str] = []
    fresh: list[str] = []
    parts: dict[str, Any] = {"trunk.layers": net.trunk.layers}
    parts |= {f"experts.{index}.layers": expert.layers for index, expert in enumerate(net.experts)}
    for part, layers in parts.items():
        ours = layers.state_dict()
        unfit = {_stage_of(key) for key in ours if key in weights and weights[key].shape != ours[key].shape}
        fitting = [key for key in ours if key in weights and _stage_of(key) not in unfit]
        layers.load_state_dict({key: weights[key] for key in fitting}, strict=False)
        taken += [f"{part}.{key}" for key in fitting]
        fresh += [f"{part}.{key}" for key in ours if key not in fitting]
    if not taken:
        raise CheckpointError(
            f"pretrained={recipe.pretrained}: none of its tensors has a place in this recipe's network, which would "
            "start from nothing; take a recipe whose layers are the backbone's own, or leave pretrained out"
        )
    return {"source": source, "taken": taken, "fresh": fresh}


def _from_run(net: MultiExpertNet, recipe: Recipe, images_digest: str, classes: Sequence[str]) -> dict[str, Any]:
    from training.train import trained_model  # which imports this module

    run = Path(str(recipe.pretrained))
    try:
        checkpoint, model = trained_model(run)
    except CheckpointError as error:
        raise CheckpointError(f"pretrained: {error}") from None
    same_set = Path(checkpoint.recipe.data).resolve() == Path(recipe.data).resolve()  # however it was spelled
    copied = checkpoint.classes == tuple(classes) != unnamed_classes(len(classes))  # or moved
    if (same_set or copied) and not checkpoint.saw(images_digest):
        raise CheckpointError(
            f"pretrained={run}: trained on other images of these classes than this training has, "
            "perhaps on such as are held out or tested here; draw the same ones"
        )
    weights = model.net.state_dict()
    wanted = {key: tensor for key, tensor in net.state_dict().items() if LAYERS in key}
    for key, tensor in wanted.items():
        if key not in weights or weights[key].shape != tensor.shape:
            has = tuple(weights[key].shape) if key in weights else "missing"
            raise CheckpointError(f"pretrained={run}: tensor {key} is {has}, this recipe wants {tuple(tensor.shape)}")
    net.load_state_dict({key: weights[key] for key in wanted}, strict=False)
    return {"source": str(run), "taken": list(wanted), "fresh": []}


def _read(recipe: Recipe) -> tuple[str, dict[str, Tensor]]:
    """Where the weights come from, and the weights by torchvision's names."""
    name = BACKBONES[recipe.backbone].torchvision
    if recipe.pretrained == "torchvision":
        if name is None:
            have = ", ".join(key for key, backbone in BACKBONES.items() if backbone.torchvision)
            raise CheckpointError(f"pretrained=torchvision: it has no {recipe.backbone}; it has {have}, or name a file")
        weights = torchvision.models.get_model_weights(name).DEFAULT
        try:
            return str(weights), dict(weights.get_state_dict(progress=False, check_hash=True))
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"pretrained=torchvision: {weights.url} cannot be fetched ({error})") from None
    file = Path(str(recipe.pretrained))
    if not file.exists():
        raise CheckpointError(f"pretrained={file}: no such run or file; ride-train makes runs")
    try:
        if file.suffix == ".safetensors":
            return str(file), load_file(file)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling damaged or foreign bytes may fail in any way
        reason = str(error).rpartition(TORCH_PREAMBLE)[2].strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"pretrained={file}: cannot be read ({reason[0]})") from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"pretrained={file}: must hold tensors by name and nothing else, as torchvision's do")
    return str(file), content


def _refuse_other_backbone(source: str, weights: dict[str, Tensor], recipe: Recipe) -> None:
    backbone, full = BACKBONES[recipe.backbone], dataclasses.replace(recipe, reduced=False, share_stage3=False)
    with torch.random.fork_rng(devices=[]):  # only the shapes count
        layers: list[nn.Module] = [backbone.trunk(full), backbone.expert(full)]
    wanted = {key: tensor for part in layers for key, tensor in part.state_dict().items()}
    found = {key: tensor for key, tensor in weights.items() if not key.startswith(HEADS)}
    for key in sorted(wanted.keys() | found.keys()):
        if key not in found and key.endswith(COUNTERS):
            continue
        has, wants = (tuple(tensors[key].shape) if key in tensors else None for tensors in (found, wanted))
        if has != wants:
            raise CheckpointError(
                f"pretrained={source}: tensor {key} is {'missing' if has is None else has}, "
                f"{recipe.backbone} at full width wants {'none' if wants is None else wants}"
            )


def _stage_of(key: str) -> str:
    """layer3 of layer3.0.conv1.weight, features.5 of features.5.0.norm1.weight."""
    parts = key.split(".")
    return ".".join(parts[:2]) if parts[0] == "features" else parts[0]
