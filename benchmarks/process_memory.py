"""Time and peak memory of a process with all its children."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

INTERVAL = 0.25  # seconds between looks
GROWTH = 1.01  # of resident memory, before it is worth a look at what is shared, which is dear


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
        highest = 0.0
        while not done.wait(INTERVAL):
            if (resident := sum(map(_resident, tree(pid)))) > GROWTH * highest:
                highest = resident
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
    """Proportional set size of a process and its descendants; the kernel walks all their pages."""
    return sum(map(_proportional, tree(pid)))


def tree(pid: int) -> Iterator[int]:
    """A process and its descendants."""
    yield pid
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        children = {child for task in tasks for child in (task / "children").read_text().split()}
    except OSError:  # it has just ended
        return
    for child in children:
        yield from tree(int(child))


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):  # it has just ended
        return 0


def _proportional(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has just ended
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
