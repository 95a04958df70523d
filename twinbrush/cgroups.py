"""The control groups of this process, version 1 or 2, whose limits count in containers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

CGROUP = Path("/proc/self/cgroup")
MOUNT = Path("/sys/fs/cgroup")


def control_groups(controller: str, cgroup: Path = CGROUP, mount: Path = MOUNT) -> Iterator[Path]:
    """Folders of the group that a controller governs this process by, and of those that hold it."""
    try:
        lines = cgroup.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root = mount
        elif controller in controllers.split(","):
            root = mount / controllers if (mount / controllers).is_dir() else mount / controller
        else:
            continue
        group = root / path.lstrip("/")
        while True:
            yield group
            if group in (root, group.parent):
                break
            group = group.parent
