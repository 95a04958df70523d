"""How much memory networks may take on this machine: a share of what it has free.

The limit of the control group (version 1 or 2) counts in containers. On a GPU it is the GPU's free
memory, as `nvidia-smi` reports it. Knows nothing of networks.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from twinbrush.cgroups import CGROUP, MOUNT, control_groups
from twinbrush.engine.memory import DeviceMemory

PROC, MEMINFO = Path("/proc"), Path("/proc/meminfo")
GPU = Path("/dev/nvidiactl")
SHARE = 0.8  # the rest is for the server, its front doors and what a fit does not foresee
LIMITS = ("memory.max", "memory.limit_in_bytes")  # of version 2 and 1


def device_memory(gpu: Path = GPU) -> DeviceMemory:
    """What the networks of the server that this process is a part of may take.

    On a GPU where there is one, else in main memory.
    """
    if (free := gpu_memory(gpu)) is not None:
        return DeviceMemory(SHARE * free, blocks=False, chosen=False)
    return DeviceMemory(SHARE * available_memory(os.getppid()), chosen=False)


def available_memory(
    server: int, meminfo: Path = MEMINFO, cgroup: Path = CGROUP, mount: Path = MOUNT
) -> float:
    """Bytes that the processes of a server may take together.

    What the machine has available with what they have already, as networks are loaded at the
    same time; or the control group's limit, if that is less.

    Args:
        server: the process that started the others.
    """
    found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
    available = int(found[1]) * 1024 + tree_bytes(server) if found else float("inf")
    groups = control_groups("memory", cgroup, mount)
    limits = (_read(group / name) for group in groups for name in LIMITS)
    return min([available, *(limit for limit in limits if limit is not None)])


def tree_bytes(pid: int) -> int:
    """Proportional set size of a process and its descendants, as far as it may be read."""
    total, process = 0, PROC / str(pid)
    try:
        rollup = (process / "smaps_rollup").read_text()
        total += int(re.findall(r"^Pss:\s+(\d+) kB", rollup, re.MULTILINE)[0]) * 1024
        lists = [task / "children" for task in (process / "task").iterdir()]
        children = {child for file in lists for child in file.read_text().split()}
    except (OSError, IndexError):  # it has just ended, or is another user's
        return total
    return total + sum(tree_bytes(int(child)) for child in children)


def gpu_memory(device: Path) -> float | None:
    """Free bytes of the GPU with the least; None where there is none, or nobody says."""
    if not device.exists():
        return None
    query = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30)
        return min(int(line) for line in listed.stdout.split()) * 2.0**20
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def _read(file: Path) -> float | None:
    try:
        return float(int(file.read_text()))
    except (OSError, ValueError):  # no limit: "max"
        return None
