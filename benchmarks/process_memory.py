"""Time and peak memory of a process with all its children."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

INTERVAL = 0.25  # seconds between looks


@dataclass
class Usage:
    """What a stage took.

    Attributes:
        seconds: from start to end.
        peak_gb: most memory at one moment, in 10⁹ bytes; pages that processes share count once.
    """

    seconds: float = 0.0
    peak_gb: float = 0.0


@contextmanager
def watch(pid: int) -> Iterator[Usage]:
    """Fills a `Usage` while the context lasts."""
    usage, done, started = Usage(), threading.Event(), time.monotonic()

    def look() -> None:
        while not done.wait(INTERVAL):
            usage.peak_gb = max(usage.peak_gb, round(tree_bytes(pid) / 1e9, 2))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield usage
    finally:
        done.set()
        thread.join()
        usage.seconds = round(time.monotonic() - started, 1)


def tree_bytes(pid: int) -> int:
    """Proportional set size of a process and its descendants."""
    total = 0
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        total += next(
            int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Pss:")
        )
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        children = {child for task in tasks for child in (task / "children").read_text().split()}
    except (OSError, StopIteration):  # it has just ended
        return total
    return total + sum(tree_bytes(int(child)) for child in children)
