"""What a result was measured on, and with what."""

import datetime
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from service.cores import available_cores

ROOT: Final = Path(__file__).parents[1]
WRITTEN_HERE: Final = (":!benchmarks/results", ":!benchmarks/contestants/tuned.json")  # by benchmarks
FLAGS: Final = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
PACKAGES: Final = (
    "onnxruntime", "onnxruntime-gpu", "openvino", "numpy", "pillow", "simplejpeg", "fastapi", "starlette",
    "uvicorn", "uvloop", "httptools", "orjson", "pydantic",
)  # fmt: skip


def describe(seed: int, more: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Machine, versions, commit, command, seed and date, as JSON."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", "-m", _module(), *sys.argv[1:]]),
        "commit": _git("rev-parse", "--short", "HEAD"),
        "uncommitted": bool(_git("status", "--porcelain", "--untracked-files=no", "--", ".", *WRITTEN_HERE)),
        "seed": seed,
        "cpu": _cpu("model name"),
        "cpu_flags": [flag for flag in FLAGS if flag in _cpu("flags").split()],
        "cores": available_cores(),
        "gpus": _gpus(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": _versions(PACKAGES),
        **(more or {}),
    }


def _module() -> str:
    main = sys.modules["__main__"].__spec__
    return main.name.removesuffix(".__main__") if main else Path(sys.argv[0]).stem


def _git(*arguments: str) -> str:
    result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return result.stdout.strip()


def _cpu(field: str) -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == field:
            return value.strip()
    return platform.machine()


def _gpus() -> list[str]:
    """Name and driver of each; none where there is no NVIDIA driver."""
    try:
        found = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return []
    return found.stdout.splitlines()


def _versions(packages: Sequence[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
