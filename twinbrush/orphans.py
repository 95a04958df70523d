"""Ends a Python stub whose server is gone, however it went.

A stub can wait in Triton's own code for an answer of the server, which then never comes. The
kernel's signal at a parent's death is of no use: it comes when the parent's thread ends that has
started the process, and Triton loads models in threads that end. Knows no Triton.
"""

from __future__ import annotations

import os
import threading
import time

PERIOD = 1.0  # seconds


def end_with_server() -> None:
    """From now on, ends this process soon after the one that has started it has ended."""
    server = os.getppid()
    threading.Thread(target=_watch, args=[server], name="orphan", daemon=True).start()


def _watch(server: int) -> None:
    while os.getppid() == server:
        time.sleep(PERIOD)
    os._exit(1)
