"""The folder by which the launcher and the engine watch each other, in two processes.

The engine touches `heartbeat` about twice a second while it is well. The launcher creates `drain`
to have new requests refused, and the engine creates `drained` once the live ones have ended. The
launcher names the folder in the environment variable `TWINBRUSH_CONTROL`; a server that was started
without the launcher has none, and then nothing of this happens.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

VARIABLE = "TWINBRUSH_CONTROL"
PERIOD = 0.5  # seconds between two looks of the engine


class Control:
    """The control folder, for both sides.

    Args:
        folder: it exists; files appear in it.
    """

    def __init__(self, folder: Path):
        self._heartbeat, self._drain, self._drained = (
            folder / name for name in ("heartbeat", "drain", "drained")
        )

    @classmethod
    def from_environment(cls) -> Control | None:
        """The folder that the launcher has named, if any."""
        folder = os.environ.get(VARIABLE)
        return cls(Path(folder)) if folder else None

    # The engine's side ----------------------------------------------------------------------

    def beat(self) -> None:
        self._heartbeat.touch()

    @property
    def drain_requested(self) -> bool:
        return self._drain.exists()

    def report_drained(self) -> None:
        self._drained.touch()

    # The launcher's side --------------------------------------------------------------------

    def seconds_since_beat(self) -> float | None:
        """None before the first beat."""
        try:
            return max(0.0, time.time() - self._heartbeat.stat().st_mtime)
        except FileNotFoundError:
            return None

    def request_drain(self) -> None:
        self._drain.touch()

    @property
    def drained(self) -> bool:
        return self._drained.exists()
