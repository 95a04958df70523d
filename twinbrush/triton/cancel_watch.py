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

    Each poll is a round trip to the server, so a round has a bounded number of polls, and after it
    the thread pauses in proportion to the processor time that they took: polling takes a small
    share of a core, however many requests live, and a busy machine does not make it rarer. Half of
    a round's polls are of the oldest requests, which are being painted or soon will be; the rest
    take turns, because a request that only waits costs little. Without requests there is no poll.

    Args:
        fail: called with a sentence when the thread dies.
    """

    # Seconds; the shortest is less than a step of one picture takes, so that a client which
    # leaves wastes hardly more than the call that runs.
    SHORTEST_PAUSE, LONGEST_PAUSE = 0.01, 0.5
    PAUSE_PER_SECOND_POLLED = 80.0
    MOST_POLLS = 32  # of a round

    def __init__(self, fail: Fail) -> None:
        self._watched: dict[Watched, Callable[[], None]] = {}  # the oldest first
        self._turn = 0  # of the younger ones, the place where the next round goes on
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
                watched = self._next_round()
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

    def _next_round(self) -> list[tuple[Watched, Callable[[], None]]]:
        """The requests to poll now. Callers hold the lock."""
        if len(self._watched) <= self.MOST_POLLS:
            return list(self._watched.items())
        half = self.MOST_POLLS // 2
        watched = list(self._watched.items())
        oldest, younger = watched[:half], watched[half:]
        start = self._turn if self._turn < len(younger) else 0
        self._turn = start + half
        return oldest + younger[start : self._turn]
