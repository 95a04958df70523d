"""Whose call the device runs next, where the networks share one: one call at a time.

Two calls at once on one device take longer than one after the other, and which of them ends first
is chance. So the stages take turns. Decoding goes first: it is short, ends a request and frees its
memory. Encoding goes last: while it waits for a UNet call, more newcomers join it. Nobody is passed
over for ever. Knows no networks.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from enum import IntEnum

MOST_PASSED = 4  # turns that may begin before that of a stage which has waited longer


class Stage(IntEnum):
    """What a turn is for; the least goes first."""

    DECODE = 0
    DENOISE = 1
    ENCODE = 2


@dataclass(eq=False)
class _Waiting:
    stage: Stage
    come: threading.Lock = field(default_factory=threading.Lock)  # held until its turn
    passed: int = 0


class Turns:
    """Turns on one device, for threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken = False
        self._waiting: list[_Waiting] = []  # as they came

    @contextmanager
    def take(self, stage: Stage) -> Iterator[None]:
        """Waits for a turn, which lasts as long as the context; a thread has one at a time."""
        with self._lock:
            waiting = _Waiting(stage) if self._taken else None
            if waiting is not None:
                waiting.come.acquire()
                self._waiting.append(waiting)
            self._taken = True
        if waiting is not None:
            waiting.come.acquire()
        try:
            yield
        finally:
            self._pass_on()

    def _pass_on(self) -> None:
        """Ends a turn; the next one is taken before anybody else can come."""
        with self._lock:
            if not self._waiting:
                self._taken = False
                return
            overdue = [w for w in self._waiting if w.passed >= MOST_PASSED]
            chosen = overdue[0] if overdue else min(self._waiting, key=lambda w: w.stage)
            place = self._waiting.index(chosen)
            del self._waiting[place]
            for earlier in self._waiting[:place]:
                earlier.passed += 1
        chosen.come.release()


class NoTurns:
    """For networks that run apart: a call begins at once."""

    def take(self, stage: Stage) -> AbstractContextManager[None]:
        return nullcontext()
