"""
Files as RIDE's authors publish them, with random weights, and the forward pass of such a state dict, written out.

Independent of the package: the names and shapes are those of their public code, the mathematics is functional torch.
"""

import math
import sys
import types
from pathlib import Path

import torch
from torch.nn import functional as F

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

CIFAR_STAGES = {"layer1": (5, 16), "layer2": (5, 24), "layer3": (5, 48)}
STAGES = {
    "ResNet32": CIFAR_STAGES,
    "ResNet10": {f"layer{i}": (1, planes) for i, planes in enumerate((64, 128, 192, 384), start=1)},
    "ResNet50": {"layer1": (3, 64), "layer2": (4, 128), "layer3": (6, 192), "layer4": (3, 384)},
    "ResNeXt50": {"layer1": (3, 64), "layer2": (4, 128), "layer3": (6, 192), "layer4": (3, 384)},
}
FULL_WIDTH = {24: 32, 48: 64, 192: 256, 384: 512}


def family_of(arch):
    """ResNet32EAModel -> ResNet32."""
    return arch.removesuffix("Model").removesuffix("EA")


def state_dict(arch, n_experts, n_classes, *, reduced=True, cosine=True, top_k=30, n_hidden=16, seed=0):
    """The tensors of a model with random weights and lively running statistics, in the authors' names and layout."""
    family, generator, state = family_of(arch), torch.Generator().manual_seed(seed), {}
    bottleneck, groups = family in ("ResNet50", "ResNeXt50"), 32 if family == "ResNeXt50" else 1

    def convolution(name, width_in, width, size):
        std = math.sqrt(2 / (width_in * size * size))
        state[f"{name}.weight"] = torch.randn(width, width_in, size, size, generator=generator) * std

    def norm(name, width):
        for part, (low, high) in {"weight": (0.5, 1.5), "bias": (-0.2, 0.2), "running_mean": (-0.2, 0.2),
                                  "running_var": (0.5, 1.5)}.items():  # fmt: skip
            state[f"{name}.{part}"] = torch.empty(width).uniform_(low, high, generator=generator)
        state[f"{name}.num_batches_tracked"] = torch.tensor(17_000)

    def stage(name, index, width_in, strided):
        blocks, planes = STAGES[family][f"layer{index}"]
        planes = planes if reduced else FULL_WIDTH.get(planes, planes)
        inner = planes * 4 // 64 * 32 if family == "ResNeXt50" else planes
        width = 4 * planes if bottleneck else planes
        for block in range(blocks):
            at = f"{name}.{block}"
            if bottleneck:
                shapes = [(width_in, inner, 1), (inner // groups, inner, 3), (inner, width, 1)]
            else:
                shapes = [(width_in, width, 3), (width, width, 3)]
            for layer, (channels, out, size) in enumerate(shapes, start=1):
                convolution(f"{at}.conv{layer}", channels, out, size)
                norm(f"{at}.bn{layer}", out)
            if block == 0 and family != "ResNet32" and (strided or width_in != width):
                convolution(f"{at}.downsample.0", width_in, width, 1)
                norm(f"{at}.downsample.1", width)
            width_in = width
        return width_in

    shared = 1 if family == "ResNet32" else 2
    stem = 16 if family == "ResNet32" else 64
    convolution("conv1", 3, stem, 3 if family == "ResNet32" else 7)
    norm("bn1", stem)
    trunk = stem
    for index in range(1, shared + 1):
        trunk = stage(f"layer{index}", index, trunk, index > 1)
    for expert in range(n_experts):
        width = trunk
        for index in range(shared + 1, len(STAGES[family]) + 1):
            width = stage(f"layer{index}s.{expert}", index, width, True)
        if cosine:
            state[f"linears.{expert}.weight"] = torch.randn(width, n_classes, generator=generator)
        else:
            state[f"linears.{expert}.weight"] = torch.randn(n_classes, width, generator=generator) * 0.1
            state[f"linears.{expert}.bias"] = torch.randn(n_classes, generator=generator)
    if "EA" in arch:
        for router in range(n_experts - 1):
            state[f"expert_help_pred_hidden_fcs.{router}.weight"] = torch.randn(n_hidden, width, generator=generator)
            state[f"expert_help_pred_hidden_fcs.{router}.bias"] = torch.randn(n_hidden, generator=generator)
        state["expert_help_pred_fc.weight"] = torch.randn(1, top_k + n_hidden, generator=generator) * 0.1
        state["expert_help_pred_fc.bias"] = torch.randn(1, generator=generator)
    return {f"backbone.{name}": tensor for name, tensor in state.items()}


def every_expert(arch, state, images):
    """
    The authors' forward pass with all experts.

    Args:
        images: (B, H, W, 3), uint8.

    Returns:
        Logits (E, B, C) and, of each router, what it says of each image before the sigmoid, (E - 1, B).
    """
    family, s = family_of(arch), {name.removeprefix("backbone."): tensor for name, tensor in state.items()}
    mean, std = (CIFAR_MEAN, CIFAR_STD) if family == "ResNet32" else (IMAGENET_MEAN, IMAGENET_STD)
    x = images.permute(0, 3, 1, 2) / 255
    x = (x - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)

    def norm(x, name):
        return F.batch_norm(x, *(s[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")))

    def conv_norm(x, block, layer, **how):
        return norm(F.conv2d(x, s[f"{block}.conv{layer}.weight"], **how), f"{block}.bn{layer}")

    def stage(x, name, stride):
        block = 0
        while f"{name}.{block}.conv1.weight" in s:
            at, step = f"{name}.{block}", stride if block == 0 else 1
            if f"{at}.conv3.weight" in s:
                out = F.relu(conv_norm(x, at, 1))
                out = F.relu(conv_norm(out, at, 2, stride=step, padding=1, groups=32 if family == "ResNeXt50" else 1))
                out = conv_norm(out, at, 3)
            else:
                out = conv_norm(F.relu(conv_norm(x, at, 1, stride=step, padding=1)), at, 2, padding=1)
            if f"{at}.downsample.0.weight" in s:
                x = norm(F.conv2d(x, s[f"{at}.downsample.0.weight"], stride=step), f"{at}.downsample.1")
            elif step == 2:
                each_side = (out.shape[1] - x.shape[1]) // 2
                x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, each_side, each_side))
            x = F.relu(out + x)
            block += 1
        return x

    if family == "ResNet32":
        x = F.relu(norm(F.conv2d(x, s["conv1.weight"], padding=1), "bn1"))
        x = stage(x, "layer1", 1)
        own = ("layer2s", "layer3s")
    else:
        x = F.relu(norm(F.conv2d(x, s["conv1.weight"], stride=2, padding=3), "bn1"))
        x = stage(stage(F.max_pool2d(x, 3, 2, padding=1), "layer1", 1), "layer2", 2)
        own = ("layer3s", "layer4s")
    logits, asked, expert = [], [], 0
    while f"linears.{expert}.weight" in s:
        feature = x
        for name in own:
            feature = stage(feature, f"{name}.{expert}", 2)
        feature = feature.mean(dim=(2, 3))
        weight = s[f"linears.{expert}.weight"]
        if f"linears.{expert}.bias" in s:
            logits.append(feature @ weight.T + s[f"linears.{expert}.bias"])
        else:
            logits.append(30 * (feature / feature.norm(dim=1, keepdim=True)) @ (weight / weight.norm(dim=0)))
        hidden = f"expert_help_pred_hidden_fcs.{expert}"
        if f"{hidden}.weight" in s:
            direction = feature / feature.norm(dim=1, keepdim=True)
            values = F.relu(direction @ s[f"{hidden}.weight"].T + s[f"{hidden}.bias"])
            output = s["expert_help_pred_fc.weight"]
            mean_logits = torch.stack(logits).mean(dim=0)
            largest = mean_logits.sort(dim=1, descending=True).values[:, : output.shape[1] - values.shape[1]]
            asked.append(torch.cat([largest, values], dim=1) @ output[0] + s["expert_help_pred_fc.bias"])
        expert += 1
    return torch.stack(logits), torch.stack(asked) if asked else torch.empty(0, len(images))


def routed(logits, asked):
    """Mean logits (B, C) of the experts that ran and how many ran (B,): while a router says more than 0.5."""
    answers, used = [], []
    for image in range(logits.shape[1]):
        count = 1
        while count < len(logits) and torch.sigmoid(asked[count - 1, image]) > 0.5:
            count += 1
        used.append(count)
        answers.append(logits[:count, image].mean(dim=0))
    return torch.stack(answers), torch.tensor(used)


def make_routers_differ(arch, state, images):
    """Scale and shift what the routers say so that of each about half is above 0, and none near it."""
    first = "backbone.expert_help_pred_hidden_fcs.{}."
    output, bias = state["backbone.expert_help_pred_fc.weight"], state["backbone.expert_help_pred_fc.bias"]
    offset_unit = output.shape[1] - state[f"{first.format(0)}bias"].shape[0]  # the first hidden value of each router
    n_routers = sum("hidden_fcs" in name and name.endswith("weight") for name in state)
    output[0, offset_unit] = 0
    _, asked = every_expert(arch, state, images)
    middles = []
    for values in asked.sort(dim=1).values:
        inner = values[len(values) // 3 : -(len(values) // 3)]
        gap = inner.diff().argmax()
        middles.append((inner[gap] + inner[gap + 1]) / 2)
    scale = 1 / max((values - middle).abs().mean() for values, middle in zip(asked, middles, strict=True))
    output.mul_(scale)
    bias.copy_((bias - max(middles)) * scale)
    output[0, offset_unit] = 1
    for router in range(n_routers):
        state[f"{first.format(router)}weight"][0] = 0
        state[f"{first.format(router)}bias"][0] = (max(middles) - middles[router]) * scale


def content_of(arch, state, **fields):
    """What the authors' trainer hands to torch.save: an object of a class that readers do not have is among it."""
    module = types.ModuleType("parse_config")
    exec("class ConfigParser: pass", module.__dict__)
    config = module.ConfigParser()
    config._config = {"name": "Imbalance_CIFAR100_LT_RIDE", "n_gpu": 1, "arch": {"type": arch, "args": {}}}
    config._save_dir, config.log_levels = Path("saved/models"), {0: 30, 1: 20, 2: 10}
    sys.modules["parse_config"] = module
    part = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([part], 0.1, momentum=0.9)
    part.sum().backward()
    optimizer.step()
    return {
        "arch": arch, "epoch": 200, "state_dict": state, "optimizer": optimizer.state_dict(), "monitor_best": 0.486,
        "config": config, "criterion": torch.nn.CrossEntropyLoss(weight=torch.ones(3)),
    } | fields  # fmt: skip


def save(path, arch, state, *, stream=False, **fields):
    """Write a file as torch.save does, today or, as a stream, before torch 1.6; without the class it was made with."""
    try:
        torch.save(content_of(arch, state, **fields), path, _use_new_zipfile_serialization=not stream)
    finally:
        sys.modules.pop("parse_config", None)
    return path
