"""How many CPUs this process may use, by its affinity and its control group's quota."""

from __future__ import annotations

import math
import os
from pathlib import Path

from twinbrush.cgroups import CGROUP, MOUNT, control_groups


def available_cpus(cgroup: Path = CGROUP, mount: Path = MOUNT) -> int:
    """CPUs of the affinity mask, or the control group's quota (version 1 or 2) if that is less.

    A quota of 2.5 CPUs gives 3: fewer threads would leave half a CPU unused.
    """
    groups = control_groups("cpu", cgroup, mount)
    quotas = [math.ceil(quota) for group in groups if (quota := _quota(group)) is not None]
    return max(1, min([len(os.sched_getaffinity(0)), *quotas]))


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
