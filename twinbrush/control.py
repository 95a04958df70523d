"""The folder by which the launcher and the front doors watch each other, in their processes.

Each front door touches a file of its own about twice a second while it is well; that of the engine
stands for the engine too. The launcher creates `drain` to have new requests refused, and the engine
creates `drained` once the live ones have ended, after it has written to `streamed` when a stream
was answered last. The launcher names the folder in the environment variable `TWINBRUSH_CONTROL`; a
server that was started without the launcher has none, and then nothing of this happens. Whoever
writes makes the folder again where it is gone, as after something that cleans `/tmp`, so the two
find each other again.
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
HEARTBEAT = ".heartbeat"  # end of the names of the files that front doors touch


class Control:
    """The control folder, for both sides.

    Args:
        folder: where files appear.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._drain, self._drained = folder / "drain", folder / "drained"
        self._streamed = folder / "streamed"
        self._beats: dict[str, tuple[int, float]] = {}  # of each door: the last, and when it came

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

    # The front doors' side ------------------------------------------------------------------

    def beat(self, door: str) -> None:
        """Raises OSError where the folder can be neither written nor made."""
        self._touch(self._folder / f"{door}{HEARTBEAT}")

    @property
    def drain_requested(self) -> bool:
        return self._drain.exists()

    def report_drained(self) -> None:
        """Raises OSError where the folder can be neither written nor made."""
        self._touch(self._drained)

    def report_streamed(self, when: float) -> None:
        """Says when a stream was answered last, by the monotonic clock; raises as the others."""
        self._touch(self._streamed)
        self._streamed.write_text(repr(when))

    # The launcher's side --------------------------------------------------------------------

    def silence(self) -> tuple[str, float] | None:
        """The door that has been silent longest, and for how many seconds; None before any beat.

        Counted from the look that saw the last beat, by the monotonic clock: a step of the
        machine's clock changes the files' times, not what is counted here.
        """
        now = time.monotonic()
        for file in self._folder.glob(f"*{HEARTBEAT}"):
            with contextlib.suppress(OSError):
                beat, door = file.stat().st_mtime_ns, file.name.removesuffix(HEARTBEAT)
                if door not in self._beats or self._beats[door][0] != beat:
                    self._beats[door] = beat, now
        silent = {door: now - seen for door, (_, seen) in self._beats.items()}
        return max(silent.items(), key=lambda item: item[1], default=None)

    def request_drain(self) -> None:
        """Raises OSError where the folder can be neither written nor made."""
        self._touch(self._drain)

    @property
    def drained(self) -> bool:
        return self._drained.exists()

    @property
    def streamed(self) -> float:
        """When a stream was answered last, by the monotonic clock; known once drained."""
        try:
            return float(self._streamed.read_text())
        except (OSError, ValueError):
            return 0.0


class Beat:
    """A front door's look at the control folder: beats, and drains where the launcher wants it.

    Where the folder can be neither written nor made again, requests go on; the log says so once,
    and the launcher ends the server after `--heartbeat-timeout` seconds.

    Args:
        control: None makes every look do nothing.
        door: its name.
        drain: refuses new requests, and returns whether all live ones have ended; only the engine
            can tell.
    """

    def __init__(
        self, control: Control | None, door: str, drain: Callable[[], bool] = lambda: False
    ):
        self._control, self._door, self._drain = control, door, drain
        self._lost = False

    def __call__(self) -> None:
        if self._control is None:
            return
        try:
            self._control.beat(self._door)
            if self._control.drain_requested and self._drain():
                self._control.report_drained()
        except OSError as error:
            if not self._lost:
                log.error("the launcher cannot see the heartbeat of %s: %s", self._door, error)
            self._lost = True
        else:
            self._lost = False
