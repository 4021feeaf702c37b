"""What the device that trains is capable of: in which precision it computes, and whether networks can be compiled."""

from __future__ import annotations

import os
import shutil

import torch

from training.recipe import Recipe, RecipeError


def autocast_dtype(recipe: Recipe, device: torch.device) -> torch.dtype | None:
    """
    In what the network computes; None: in fp32 throughout.

    Raises:
        RecipeError: for fp16 on a CPU.
    """
    if recipe.precision == "fp16":
        if device.type == "cpu":
            raise RecipeError("precision='fp16': needs a CUDA device, and there is none here; take bf16, fp32 or auto")
        return torch.float16
    half = recipe.precision == "bf16" or (recipe.precision == "auto" and has_bf16_units(device))
    return torch.bfloat16 if half else None


def refuse_without_compiler(recipe: Recipe, device: torch.device, *, resumed: bool) -> None:
    """
    torch.compile would look for one only when the first batch is there, and say so in a hundred lines.

    Args:
        resumed: whether the recipe cannot be changed any more.

    Raises:
        RecipeError: for a network that is to be compiled on a CPU, where there is no C++ compiler.
    """
    compiler = os.environ.get("CXX", "g++").partition(" ")[0]
    if recipe.compile and device.type == "cpu" and shutil.which(compiler) is None:
        other = "" if resumed else ", or --set compile=false"
        raise RecipeError(f"compile=True: needs a C++ compiler ({compiler}); install one{other}")


def has_bf16_units(device: torch.device) -> bool:
    """Whether bf16 is faster than fp32 there: tensor cores from Ampere on; AMX or AVX-512 bf16 on a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    return torch.cpu._is_avx512_bf16_supported()
