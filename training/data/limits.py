"""What this process may use: of the machine, and of the control group that a container puts it in."""

from __future__ import annotations

import os
from pathlib import Path


def processors(root: Path = Path("/")) -> int:
    """
    How many it may keep busy, by affinity and by the control group's quota; at least 1.

    Args:
        root: where /sys lies; only tests change it.
    """
    affinity = len(os.sched_getaffinity(0))
    try:
        quota, period = (root / "sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return max(1, min(affinity, int(quota) // int(period)))
    except (OSError, ValueError):  # no such group, or its quota is "max"
        return affinity


def free_memory() -> int:
    """Bytes that can be taken without swapping."""
    meminfo = Path("/proc/meminfo").read_text(encoding="ascii")
    free = int(meminfo.split("MemAvailable:")[1].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        return min(free, limit - int((group / "memory.current").read_text(encoding="ascii")))
    except (OSError, ValueError):  # no such group, or its limit is "max"
        return free
