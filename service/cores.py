"""What this process can compute on: the processor cores that it really has, and whether there is a GPU."""

import importlib.util
import os
from pathlib import Path
from typing import Final

CUDA_LIBRARY: Final = "libonnxruntime_providers_cuda.so"


def available_cores(root: Path = Path("/")) -> int:
    """
    Cores by affinity and by the cgroup's quota, whichever is fewer; at least 1.

    A quota of 1.5 cores counts as 1: a second thread would be throttled for half of its time.

    Args:
        root: where /proc and /sys lie; only tests change it.
    """
    affinity = len(os.sched_getaffinity(0))
    quotas = [*_quotas_v2(root), *_quotas_v1(root)]
    return max(1, min([affinity, *map(int, quotas)]))


def has_cuda(root: Path = Path("/")) -> bool:
    """
    Whether onnxruntime is the one for CUDA and this process sees an NVIDIA GPU.

    Nothing is opened for that: a process that has once used CUDA cannot fork any more.

    Args:
        root: where /dev lies; only tests change it.
    """
    if not any((root / "dev" / device).exists() for device in ("nvidiactl", "dxg")):  # dxg: WSL 2
        return False
    runtime = importlib.util.find_spec("onnxruntime")
    folders = runtime.submodule_search_locations if runtime else None
    return any((Path(folder) / "capi" / CUDA_LIBRARY).exists() for folder in folders or ())


def _quotas_v2(root: Path) -> list[float]:
    """Quotas in cores of this process's cgroup and of every one above it (version 2: one tree)."""
    tree = root / "sys/fs/cgroup"
    quotas = []
    group = tree / _own_group(root, "").lstrip("/")
    for directory in (group, *group.parents):
        if not directory.is_relative_to(tree):
            break
        words = _read(directory / "cpu.max").split()
        if len(words) == 2 and words[0] != "max":
            quotas.append(int(words[0]) / int(words[1]))
    return quotas


def _quotas_v1(root: Path) -> list[float]:
    """The quota in cores of this process's cgroup (version 1: a tree for each controller)."""
    tree = root / "sys/fs/cgroup/cpu"
    quotas = []
    for directory in (tree, tree / _own_group(root, "cpu").lstrip("/")):
        quota, period = _read(directory / "cpu.cfs_quota_us"), _read(directory / "cpu.cfs_period_us")
        if quota and period and int(quota) > 0:
            quotas.append(int(quota) / int(period))
    return quotas


def _own_group(root: Path, controller: str) -> str:
    """This process's cgroup in the tree of `controller` ("" is version 2); "" where there is none."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        if controller in controllers.split(","):
            return group
    return ""


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
