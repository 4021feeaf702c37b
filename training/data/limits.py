"""What this process may use: of the machine, and of the control group that a container puts it in."""

from __future__ import annotations

import os
from pathlib import Path


def available_cores(root: Path = Path("/")) -> int:
    """
    How many this process may keep busy, by affinity and by the control group's quota; at least 1.

    Args:
        root: where /sys lies; only tests change it.
    """
    affinity = len(os.sched_getaffinity(0))
    try:
        quota, period = (root / "sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return max(1, min(affinity, int(quota) // int(period)))
    except (OSError, ValueError):  # no such group, or its quota is "max"
        return affinity


def free_memory(root: Path = Path("/")) -> int:
    """
    Bytes that can be taken without swapping; pages of files that nobody has used lately count as free.

    Args:
        root: where /proc and /sys lie; only tests change it.
    """
    meminfo = (root / "proc/meminfo").read_text(encoding="ascii")
    free = int(meminfo.split("MemAvailable:")[1].split()[0]) * 1024
    group = root / "sys/fs/cgroup"
    try:
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        taken = int((group / "memory.current").read_text(encoding="ascii"))
        statistics = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
        return min(free, limit - taken + int(statistics.get("inactive_file", 0)))
    except (OSError, ValueError):  # no such group, or its limit is "max"
        return free
