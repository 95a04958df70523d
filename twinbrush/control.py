"""The folder by which the launcher and the engine watch each other, in two processes.

The engine touches `heartbeat` about twice a second while it is well. The launcher creates `drain`
to have new requests refused, and the engine creates `drained` once the live ones have ended. The
launcher names the folder in the environment variable `TWINBRUSH_CONTROL`; a server that was started
without the launcher has none, and then nothing of this happens. Whoever writes makes the folder
again where it is gone, as after something that cleans `/tmp`, so the two find each other again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger(__name__)

VARIABLE = "TWINBRUSH_CONTROL"


class Control:
    """The control folder, for both sides.

    Args:
        folder: where files appear.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._heartbeat, self._drain, self._drained = (
            folder / name for name in ("heartbeat", "drain", "drained")
        )
        self._last_beat: float | None = None  # that was seen, in the epoch's seconds

    @classmethod
    def from_environment(cls) -> Control | None:
        """The folder that the launcher has named, if any."""
        folder = os.environ.get(VARIABLE)
        return cls(Path(folder)) if folder else None

    def _touch(self, file: Path) -> None:
        try:
            file.touch()
        except FileNotFoundError:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            file.touch()

    # The engine's side ----------------------------------------------------------------------

    def beat(self) -> None:
        """Raises OSError where the folder can be neither written nor made."""
        self._touch(self._heartbeat)

    @property
    def drain_requested(self) -> bool:
        return self._drain.exists()

    def report_drained(self) -> None:
        """Raises OSError where the folder can be neither written nor made."""
        self._touch(self._drained)

    # The launcher's side --------------------------------------------------------------------

    def seconds_since_beat(self) -> float | None:
        """Since the last beat that was seen; None before the first."""
        with contextlib.suppress(OSError):
            self._last_beat = self._heartbeat.stat().st_mtime
        return None if self._last_beat is None else max(0.0, time.time() - self._last_beat)

    def request_drain(self) -> None:
        """Raises OSError where the folder can be neither written nor made."""
        self._touch(self._drain)

    @property
    def drained(self) -> bool:
        return self._drained.exists()


class Beat:
    """The engine's look at the control folder: beats, and drains where the launcher wants it.

    Where the folder can be neither written nor made again, requests go on; the log says so once,
    and the launcher ends the server after `--heartbeat-timeout` seconds.

    Args:
        control: None makes every look do nothing.
        drain: refuses new requests, and returns whether all live ones have ended.
    """

    def __init__(self, control: Control | None, drain: Callable[[], bool]):
        self._control, self._drain = control, drain
        self._lost = False

    def __call__(self) -> None:
        if self._control is None:
            return
        try:
            self._control.beat()
            if self._control.drain_requested and self._drain():
                self._control.report_drained()
        except OSError as error:
            if not self._lost:
                log.error("the launcher cannot see the engine's heartbeat: %s", error)
            self._lost = True
        else:
            self._lost = False
