"""Threads whose death is noticed, and model calls whose silence is. Knows nothing of the work."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping

import numpy as np

from twinbrush.engine.models import Models

log = logging.getLogger(__name__)
Fail = Callable[[str], None]


def start_guarded(name: str, loop: Callable[[], None], fail: Fail) -> threading.Thread:
    """Runs `loop` in a thread; calls `fail` with a sentence when the loop raises."""

    def run() -> None:
        try:
            loop()
        except BaseException as error:
            log.critical("%s died", name, exc_info=error)
            fail(f"{name} died: {type(error).__name__}")

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    return thread


class Pulse:
    """Calls `beat` about twice a second from a thread of its own, until it is closed.

    Args:
        beat: must return soon.
        fail: called with a sentence when `beat` raises.
    """

    PERIOD = 0.5  # seconds

    def __init__(self, beat: Callable[[], None], fail: Fail):
        self._beat, self._closing = beat, threading.Event()
        self._thread = start_guarded("heartbeat", self._run, fail)

    def close(self) -> None:
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing.wait(self.PERIOD):
            self._beat()


class Watchdog:
    """`Models` that notices a call which does not return.

    Args:
        models: the networks to call.
        limit: seconds that a call may take.
        fail: called once, with a sentence, when a call takes longer.
        beat: called about once a period while no call is over the limit.
    """

    def __init__(self, models: Models, limit: float, fail: Fail, beat: Callable[[], None]):
        self._models, self._limit, self._fail, self._beat = models, limit, fail, beat
        self._running: dict[object, tuple[str, float]] = {}
        self._failed = False
        self._pulse = Pulse(self._look, fail)

    def run(self, model: str, inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """See `Models.run`."""
        call = object()
        self._running[call] = model, time.monotonic()
        try:
            return self._models.run(model, inputs)
        finally:
            del self._running[call]

    def close(self) -> None:
        self._pulse.close()

    def _look(self) -> None:
        now = time.monotonic()
        for model, started in [] if self._failed else list(self._running.values()):
            if now - started > self._limit:
                self._failed = True
                self._fail(f"{model} has not answered for {self._limit:g} s")
                break
        if not self._failed:
            self._beat()
