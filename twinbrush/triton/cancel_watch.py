"""One thread that finds cancelled requests. Knows neither Triton nor diffusion."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

from twinbrush.engine.request_ids import named
from twinbrush.engine.threads import Fail, start_guarded

log = logging.getLogger(__name__)


class Watched(Protocol):
    """A request that knows, at some cost, whether its client has cancelled it."""

    request_id: str

    def cancelled(self) -> bool: ...


class CancelWatch:
    """Polls live requests for a cancel by their client.

    Each poll is a round trip to the server, so after a round the thread pauses in proportion to
    the processor time that the round took: polling takes a small share of a core, however many
    requests live, and a busy machine does not make it rarer. Without requests there is no poll.

    Args:
        fail: called with a sentence when the thread dies.
    """

    # Seconds; the shortest is less than a step of one picture takes, so that a client which
    # leaves wastes hardly more than the call that runs.
    SHORTEST_PAUSE, LONGEST_PAUSE = 0.01, 0.5
    PAUSE_PER_SECOND_POLLED = 40.0

    def __init__(self, fail: Fail) -> None:
        self._watched: dict[Watched, Callable[[], None]] = {}
        self._changed = threading.Condition()
        self._closing = False
        self._thread = start_guarded("cancel-watch", self._run, fail)

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
            started = time.thread_time()
            for answer, on_cancel in watched:
                try:
                    if answer.cancelled():
                        on_cancel()
                except Exception:  # of one request; the others are polled further
                    log.exception("polling for a cancel failed: %s", named([answer.request_id]))
                    self.discard(answer)
            polled = time.thread_time() - started
            pause = max(self.SHORTEST_PAUSE, polled * self.PAUSE_PER_SECOND_POLLED)
            time.sleep(min(pause, self.LONGEST_PAUSE))
