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


class Watchdog:
    """`Models` that notices a call which does not return.

    Args:
        models: the networks to call.
        limit: seconds that a call may take.
        fail: called once, with a sentence, when a call takes longer.
        beat: called about once a period while no call is over the limit.
    """

    PERIOD = 0.5  # seconds

    def __init__(self, models: Models, limit: float, fail: Fail, beat: Callable[[], None]):
        self._models, self._limit, self._fail, self._beat = models, limit, fail, beat
        self._running: dict[object, tuple[str, float]] = {}
        self._closing = threading.Event()
        self._thread = start_guarded("watchdog", self._watch, fail)

    def run(self, model: str, inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """See `Models.run`."""
        call = object()
        self._running[call] = model, time.monotonic()
        try:
            return self._models.run(model, inputs)
        finally:
            del self._running[call]

    def close(self) -> None:
        self._closing.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._closing.wait(self.PERIOD):
            now = time.monotonic()
            for model, started in list(self._running.values()):
                if now - started > self._limit:
                    self._fail(f"{model} has not answered for {self._limit:g} s")
                    return
            self._beat()
