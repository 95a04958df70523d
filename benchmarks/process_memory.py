"""Time and peak memory of a process with all its children."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from twinbrush.memory import tree_bytes
from twinbrush.server.processes import children

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
            if (resident := _resident(pid)) > GROWTH * highest:
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


def _resident(pid: int) -> int:
    """Resident bytes of a process and its descendants; shared pages count more than once."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):  # it has just ended
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") + sum(map(_resident, children(pid)))
