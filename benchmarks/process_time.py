"""CPU seconds of a server's processes, by what they do. Knows nothing of Triton's models."""

from __future__ import annotations

import re
import time

from twinbrush.server import processes


def process_seconds(server: int) -> dict[str, float]:
    """User and system time so far: of this process, the server, and each of its stubs by model."""
    found = {"client": time.process_time(), "server": _seconds(server)}
    for pid in processes.children(server):
        line = (processes.PROC / str(pid) / "cmdline").read_bytes().decode()
        instances = re.findall(r"(\w+)_\d+_\d+(?=\0|$)", line)
        if instances:
            found[instances[-1]] = _seconds(pid)
    return found


def _seconds(pid: int) -> float:
    """By the scheduler's own count in nanoseconds, over all threads."""
    total = 0
    for task in (processes.PROC / str(pid) / "task").iterdir():
        try:
            total += int((task / "schedstat").read_text().split()[0])
        except OSError:  # it ended while we looked
            continue
    return total / 1e9
