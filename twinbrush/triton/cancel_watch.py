"""One thread that learns of cancelled requests. Knows neither Triton nor the engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol


class Watched(Protocol):
    """A request that can tell, at some cost, whether its client has cancelled it."""

    def cancelled(self) -> bool: ...


class CancelWatch:
    """Asks for live requests whether their client has cancelled.

    Each question is a round trip to the server, so after a round it pauses in proportion to the
    round's length: asking takes a small share of a core, however many requests live.
    """

    SHORTEST_PAUSE, LONGEST_PAUSE = 0.05, 0.5  # seconds
    PAUSE_PER_SECOND_ASKED = 40.0

    def __init__(self) -> None:
        self._watched: dict[Watched, Callable[[], None]] = {}
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="cancel-watch", daemon=True)
        self._thread.start()

    def add(self, answer: Watched, on_cancel: Callable[[], None]) -> None:
        """`on_cancel` is called once a round after a cancel, until `discard`."""
        with self._changed:
            self._watched[answer] = on_cancel
            self._changed.notify()

    def discard(self, answer: Watched) -> None:
        with self._changed:
            self._watched.pop(answer, None)

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._watched)
                if self._closing:
                    return
                watched = list(self._watched.items())
            started = time.monotonic()
            for answer, on_cancel in watched:
                if answer.cancelled():
                    on_cancel()
            asked = time.monotonic() - started
            pause = max(self.SHORTEST_PAUSE, asked * self.PAUSE_PER_SECOND_ASKED)
            time.sleep(min(pause, self.LONGEST_PAUSE))
