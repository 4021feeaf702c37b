"""
The checkpoints that RIDE's authors publish, as models of ours.

A file holds `arch` (the class of their network), `epoch` and `state_dict`, and what is not needed here: the optimiser's
state, the criterion and an object of their configuration's class. It says neither the classes and their counts nor the
normalisation nor the scale of the cosine classifier; those come from the caller.

Source: RIDE's public code and model zoo, arXiv:2010.01809.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model_export.torch_file import Stored, TorchFile, open_torch_file
from training.checkpoint import CheckpointError
from training.methods.method import Model, build_model
from training.models.backbones import BACKBONES
from training.recipe import IMAGENET_MEAN, IMAGENET_STD, Recipe, RecipeError

EXPERTS = range(2, 7)
SETTABLE = (
    "data", "profile", "imbalance", "n_max", "subset_order", "subset_seed", "holdout_per_class", "holdout_share",
    "image_size", "test_fit", "mean", "std", "cosine_scale",
)  # fmt: skip
_ONLY_THINNED = {"imbalance", "n_max", "subset_order", "holdout_per_class"}
_ONLY_NATURAL = {"holdout_share"}

_IMAGENET = Recipe(
    name="published", method="ride", data="", profile="natural", image_size=224, test_fit="inner_crop",
    mean=IMAGENET_MEAN, std=IMAGENET_STD,
)  # fmt: skip
_FAMILIES = {
    "ResNet32": Recipe(name="published", method="ride", data="", backbone="resnet32_cifar"),
    "ResNet10": dataclasses.replace(_IMAGENET, backbone="resnet10"),
    "ResNet50": dataclasses.replace(_IMAGENET, backbone="resnet50"),
    "ResNeXt50": dataclasses.replace(_IMAGENET, backbone="resnext50"),
}
_ARCH = re.compile(f"({'|'.join(_FAMILIES)})(EA)?Model")
_HEAD, _HIDDEN, _OUTPUT = "linears.{}.weight", "expert_help_pred_hidden_fcs.0.weight", "expert_help_pred_fc.weight"
_NAMES = (  # ours to theirs, without the prefix "backbone."
    (r"net\.trunk\.layers\.0\.", "conv1."),
    (r"net\.trunk\.layers\.1\.", "bn1."),
    (r"net\.trunk\.layers\.3\.", "layer1."),
    (r"net\.trunk\.layers\.(conv1|bn1|layer1|layer2)\.", r"\1."),
    (r"net\.experts\.(\d+)\.layers\.0\.", r"layer2s.\1."),
    (r"net\.experts\.(\d+)\.layers\.1\.", r"layer3s.\1."),
    (r"net\.experts\.(\d+)\.layers\.(layer3|layer4)\.", r"\2s.\1."),
    (r"net\.experts\.(\d+)\.classifier\.", r"linears.\1."),
    (r"routers\.hidden\.(\d+)\.", r"expert_help_pred_hidden_fcs.\1."),
    (r"routers\.output\.", "expert_help_pred_fc."),
)


@dataclass(frozen=True)
class Published:
    """
    A checkpoint of the authors.

    Attributes:
        arch, epoch: as the file says; "EA" in `arch` (expert assignment): with routers.
        recipe: the network as the file has it; the data, the normalisation and the cosine scale as the caller says.
        n_classes: C.
        model: on the CPU, in evaluation mode; without routers where the file has none.
    """

    file: Path
    arch: str
    epoch: int
    recipe: Recipe
    n_classes: int
    model: Model

    @property
    def assumed(self) -> dict[str, Any]:
        """What the file does not say, and what is taken for it, by the name of the setting that changes it."""
        idle = _ONLY_THINNED if self.recipe.profile == "natural" else _ONLY_NATURAL
        if self.recipe.classifier == "linear":
            idle = idle | {"cosine_scale"}
        return {name: self.recipe.to_dict()[name] for name in SETTABLE if name not in idle}


def read_published(file: Path, settings: Mapping[str, str]) -> Published:
    """
    The model in one of the authors' files. No code in the file is run, whatever it holds.

    Args:
        settings: what the file does not say, a field of the recipe to its text; of `SETTABLE`.

    Raises:
        CheckpointError: naming the missing field, or the first tensor that differs, with both shapes.
        RecipeError: for settings that are unknown, impossible, or the file's to decide.
    """
    with open_torch_file(file) as opened:
        arch, epoch, stored = _fields(opened)
        recipe, n_classes, routed = _network(file, arch, stored)
        recipe = _with_settings(recipe, settings)
        mean, std = recipe.mean, recipe.std
        if mean is None or std is None:
            raise RecipeError("mean and std: must be the numbers that the published model was trained with, not none")
        model = build_model(recipe, n_classes, mean, std)
        if not routed:
            model.routers = None
        _load_into(model, opened, arch, stored)
    return Published(file, arch, epoch, recipe, n_classes, model.eval())


def _fields(opened: TorchFile) -> tuple[str, int, dict[str, Stored]]:
    """`arch`, `epoch` and the tensors, by their names without "module." and "backbone."."""
    content, path = opened.content, opened.path
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds no dictionary; a checkpoint of the authors is one")
    for field, kind in (("arch", str), ("epoch", int), ("state_dict", dict)):
        if field not in content:
            found = ", ".join(str(key)[:50] for key in list(content)[:20])
            raise CheckpointError(f"{path}: the field {field} is missing; the file has {found or 'none'}")
        if type(content[field]) is not kind:
            raise CheckpointError(f"{path}: the field {field} is no {kind.__name__}")
    return content["arch"], content["epoch"], _tensors(path, content["state_dict"])


def _tensors(path: Path, state: dict[Any, Any]) -> dict[str, Stored]:
    if not state:
        raise CheckpointError(f"{path}: the state_dict is empty")
    prefix = "module.backbone." if all(str(name).startswith("module.") for name in state) else "backbone."
    size, tensors = path.stat().st_size, {}
    for name, tensor in state.items():
        shown = str(name)[:80]
        if not isinstance(name, str) or not name.startswith(prefix):
            raise CheckpointError(f"{path}: tensor {shown} is unexpected; all names begin with {prefix}")
        if not isinstance(tensor, Stored):
            raise CheckpointError(f"{path}: {shown} is no tensor")
        if tensor.storage.n_bytes > size or math.prod(tensor.shape) > tensor.storage.numel:
            raise CheckpointError(f"{path}: tensor {shown} of shape {tensor.shape[:8]} is larger than what is stored")
        tensors[name.removeprefix(prefix)] = tensor
    return tensors


def _network(path: Path, arch: str, tensors: dict[str, Stored]) -> tuple[Recipe, int, bool]:
    """The recipe of the network that the file claims, as far as a few shapes tell it; C; whether there are routers."""
    claimed = _ARCH.fullmatch(arch)
    if claimed is None:
        families = ", ".join(_FAMILIES)
        raise CheckpointError(f"{path}: arch is {arch[:50]!r}; read are {families}, each with Model or EAModel behind")
    recipe, routed = _FAMILIES[claimed[1]], claimed[2] is not None
    n_experts = next(count for count in range(len(tensors) + 1) if _HEAD.format(count) not in tensors)
    if n_experts not in EXPERTS:
        raise CheckpointError(
            f"{path}: tensors backbone.{_HEAD.format('E')} of {n_experts} experts; "
            f"read are {EXPERTS[0]} to {EXPERTS[-1]}"
        )
    linear = "linears.0.bias" in tensors
    head = _matrix(path, tensors, _HEAD.format(0))
    n_classes, n_features = head if linear else head[::-1]
    reduced, full = (BACKBONES[recipe.backbone].n_features(narrow) for narrow in (True, False))
    if n_features not in (reduced, full):
        expected = [(n_classes, width) if linear else (width, n_classes) for width in (reduced, full)]
        raise CheckpointError(
            f"{path}: tensor backbone.{_HEAD.format(0)} is {head}; "
            f"{arch} has {expected[0]}, or {expected[1]} at full width"
        )
    recipe = dataclasses.replace(
        recipe, name=path.stem, n_experts=n_experts, classifier="linear" if linear else "cosine",
        reduced=n_features == reduced, router_epochs=recipe.router_epochs if routed else 0,
    )  # fmt: skip
    if routed:
        hidden, n_inputs = _matrix(path, tensors, _HIDDEN), _matrix(path, tensors, _OUTPUT)[1]
        n_hidden = hidden[0]
        if hidden[1] != n_features:
            raise CheckpointError(f"{path}: tensor backbone.{_HIDDEN} is {hidden}; {arch} has {(n_hidden, n_features)}")
        if not 1 <= n_inputs - n_hidden <= n_classes:
            raise CheckpointError(
                f"{path}: tensor backbone.{_OUTPUT} takes {n_inputs} values, {n_hidden} of them hidden ones; "
                f"that leaves {n_inputs - n_hidden} of the logits of {n_classes} classes"
            )
        recipe = dataclasses.replace(recipe, router_top_k=n_inputs - n_hidden, router_hidden=n_hidden)
    return recipe, n_classes, routed


def _matrix(path: Path, tensors: dict[str, Stored], name: str) -> tuple[int, int]:
    """The shape of a tensor that must be there, with two axes, none of them empty."""
    shape = tensors[name].shape if name in tensors else None
    if shape is None or len(shape) != 2 or 0 in shape:
        raise CheckpointError(f"{path}: tensor backbone.{name} is {_shown(shape)}; expected a matrix")
    return shape[0], shape[1]


def _with_settings(recipe: Recipe, settings: Mapping[str, str]) -> Recipe:
    for name in settings:
        if name not in SETTABLE:
            raise RecipeError(f"{name}: cannot be set for a published checkpoint; what can is {', '.join(SETTABLE)}")
    return recipe.override(dict(settings))


def _load_into(model: Model, opened: TorchFile, arch: str, stored: dict[str, Stored]) -> None:
    """Set all weights; the classifier of a cosine head is features x classes there, classes x features here."""
    path, weights = opened.path, model.state_dict()
    ours = {_their_name(name): name for name in weights}
    cosine = set() if "linears.0.bias" in ours else {name for name in ours if name.startswith("linears.")}
    for theirs in [*ours, *(name for name in stored if name not in ours)]:
        wanted = tuple(weights[ours[theirs]].shape) if theirs in ours else None
        wanted = wanted[::-1] if wanted is not None and theirs in cosine else wanted
        found = stored[theirs].shape if theirs in stored else None
        if found != wanted:
            raise CheckpointError(
                f"{path}: tensor backbone.{theirs} is {_shown(found)}; {arch} with {len(model.net.experts)} experts "
                f"has {'no such tensor' if wanted is None else wanted}"
            )
    loaded = {}
    for theirs, name in ours.items():
        tensor = opened.tensor(stored[theirs])
        if tensor.is_floating_point() != weights[name].is_floating_point():
            raise CheckpointError(f"{path}: tensor backbone.{theirs} is of {tensor.dtype}, not {weights[name].dtype}")
        tensor = tensor.to(weights[name].dtype)
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"{path}: tensor backbone.{theirs} holds values that are not finite in {tensor.dtype}"
            )
        loaded[name] = tensor.T if theirs in cosine else tensor
    model.load_state_dict(loaded)


def _their_name(ours: str) -> str:
    for pattern, replacement in _NAMES:
        renamed, changed = re.subn("^" + pattern, replacement, ours)
        if changed:
            return renamed
    raise AssertionError(f"{ours} has no counterpart")


def _shown(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(shape[:8])
