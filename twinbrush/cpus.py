"""How many CPUs this process may use, by its affinity and its control group's quota."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

CGROUP = Path("/proc/self/cgroup")
MOUNT = Path("/sys/fs/cgroup")


def available_cpus(cgroup: Path = CGROUP, mount: Path = MOUNT) -> int:
    """CPUs of the affinity mask, or the control group's quota (version 1 or 2) if that is less.

    A quota of 2.5 CPUs gives 3: fewer threads would leave half a CPU unused.
    """
    quotas = [math.ceil(quota) for quota in _quotas(cgroup, mount)]
    return max(1, min([len(os.sched_getaffinity(0)), *quotas]))


def _quotas(cgroup: Path, mount: Path) -> Iterator[float]:
    """Quotas of the group and of those that hold it, in CPUs."""
    try:
        lines = cgroup.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root = mount
        elif "cpu" in controllers.split(","):
            root = mount / controllers if (mount / controllers).is_dir() else mount / "cpu"
        else:
            continue
        group = root / path.lstrip("/")
        while True:
            if (quota := _quota(group)) is not None:
                yield quota
            if group in (root, group.parent):
                break
            group = group.parent


def _quota(group: Path) -> float | None:
    try:
        if (group / "cpu.max").is_file():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota = (group / "cpu.cfs_quota_us").read_text()
            period = (group / "cpu.cfs_period_us").read_text()
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):  # no quota: "max"
        return None
